"""`sparsefit prune --stream` prunes a model larger than memory in its files, one block at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import yaml
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import instantiate_class

from sparsefit.calibration.samples import count_samples
from sparsefit.callbacks import RunReport
from sparsefit.callbacks.calibration import first_samples
from sparsefit.callbacks.report_entries import beginning, pruned
from sparsefit.callbacks.run_folder import RunFolder
from sparsefit.cli.fit import read_recipe
from sparsefit.cli.input_errors import check_recipes
from sparsefit.cli.library_output import clear_write_errors, silence_libraries
from sparsefit.cli.model_data_checks import check_data, check_vocabulary
from sparsefit.errors import CalibrationError, ConfigError, DivergenceError, MaskError
from sparsefit.files import replacing
from sparsefit.machine import peak_memory
from sparsefit.modules import CausalLMModule
from sparsefit.modules.loading import find_tokenizer
from sparsefit.modules.streaming import stream_causal_lm
from sparsefit.pruning import PruningConfig, PruningResult, prune
from sparsefit.pruning.fisher_checks import check_whole_weights
from sparsefit.pruning.mapped_weights import MappedWeights
from sparsefit.recovery.export import exported_masks
from sparsefit.recovery.finite_checks import nonfinite_count, nonfinite_message
from sparsefit.recovery.inspection import BASE_FOLDER, Inspection, inspect_folder
from sparsefit.recovery.run_files import CLAIMED, FAILED, FINISHED, PRUNED
from sparsefit.reporting.console import console, stage_progress, summary

STREAM = "--stream"
_PRECISIONS = (None, 32, "32", "32-true")


def prune_streamed(arguments: list[str]) -> int:
    """Prune the model of a recipe without holding all of it in memory; write what `sparsefit prune` writes."""
    silence_libraries()
    check_recipes(arguments)
    settings = read_recipe(arguments)
    _check(settings)
    report = RunReport(**settings.run.as_dict())
    folder: RunFolder = report.folder
    folder.check(resuming=False)
    with clear_write_errors(), _locked(folder) as run:
        recipe = {key: value for key, value in settings.as_dict().items() if key != "config"}  # the path of the recipe
        text = yaml.safe_dump(recipe, sort_keys=False)
        folder.write_configuration(text)
        _prune(settings, report, run, text)
    console.print(summary(report.report))
    return 0


def _check(settings: Any) -> None:
    """Check that streaming supports the recipe.

    Raises:
        ConfigError: if it does not; names the setting.
    """
    package, _, name = settings.model.class_path.rpartition(".")
    if getattr(import_module(package), name) is not CausalLMModule:
        raise ConfigError(f"{STREAM} prunes causal language models (CausalLMModule); model.class_path is {name}")
    if settings.get("data") is None:
        raise ConfigError("data is required: without it there is nothing to calibrate on")
    if settings.ckpt_path is not None or settings.resume is not None:
        raise ConfigError(f"{STREAM} cannot resume a run: a run with a checkpoint is already pruned")
    if settings.reconstruction.passes:
        raise ConfigError(
            f"{STREAM} does not reconstruct blocks: leave out `reconstruction` (`pruning.reconstruction`, which gives "
            "kept weights new values with SparseGPT or least squares, is supported)"
        )
    check_whole_weights(_config_of(settings), mapped=True)
    precision = settings.trainer.precision
    if precision not in _PRECISIONS:
        raise ConfigError(
            f"trainer.precision is {precision!r}, and {STREAM} computes in the dtype of the weights: leave it out, and "
            "set model.init_args.dtype to 'bfloat16', 'float16', 'float32' or 'auto'"
        )


def _config_of(settings: Any) -> PruningConfig:
    given = settings.pruning.as_dict()
    return PruningConfig(**{name: given[name] for name in PruningConfig.__dataclass_fields__})


@contextmanager
def _locked(folder: RunFolder) -> Iterator[str]:
    """Lock the run folder, yield the id of the run, and record in the folder how the run ended."""
    folder.lock(resuming=False)
    run = uuid4().hex
    try:
        folder.write_state(CLAIMED, run, 0)
        yield run
        folder.write_state(FINISHED, run, 0)
    except BaseException as error:
        folder.write_state(FAILED, run, 0, f"{type(error).__name__}: {error}")
        raise
    finally:
        folder.release()


def _prune(settings: Any, report: RunReport, run: str, text: str) -> None:
    start, seconds, folder = time.monotonic(), {}, report.folder
    config, arguments = _config_of(settings), settings.model.as_dict()["init_args"]
    name, dtype, attention = (arguments[key] for key in ("model", "dtype", "attn_implementation"))
    if (seed := settings.seed_everything) is not None and seed is not False:
        seed_everything(seed, workers=True)
    with _timed(seconds, "setup"):
        data, batches = _calibration(settings.data, config, settings.pruning.calibration_samples, name)
    with replacing(folder.base) as base:
        with _timed(seconds, "copying the model"):
            model, weights = stream_causal_lm(name, base, dtype, attention)
            check_vocabulary(model, getattr(data, "tokenizer", None))
        module = CausalLMModule(model)  # names in settings and report are those of a run
        report.report = beginning(report.name, folder.path, module) | {"id": run, "configuration": text}
        shown = stage_progress("calibrating and pruning")
        with _timed(seconds, "calibration and pruning"), shown as advance:
            calls = {"forward": module.predict_step, "progress": _progress(advance)}
            result = prune(module, batches, config, **calls, mapped=weights)
        if config.reconstruction:
            _check_finite(weights)
        weights.flush()
    exported_masks(module, result.masks).save(folder.masks)
    folder.write_state(PRUNED, run, 0)
    with _timed(seconds, "counting the zeros"):
        inspection = inspect_folder(folder.path)
    if inspection.broken:
        raise MaskError(f"pruned weights are not zero in the files of {folder.base}: {', '.join(inspection.broken)}")
    total = time.monotonic() - start
    report.report |= _report_entries(result, inspection) | {"seconds": {"total": total, "stages": seconds}}
    report.write()


def _calibration(settings: Any, config: PruningConfig, samples: int | None, model: str) -> tuple[Any, list[Any]]:
    """The recipe's data module and its calibration batches: one sample if only a trace of the model is needed."""
    data = instantiate_class((), settings.as_dict())
    if callable(getattr(data, "write_with", None)):
        raise ConfigError(
            f"{type(data).__name__} lets the model generate its text, which needs the model in memory: use other data"
        )
    data.prepare_data()
    data.setup("fit")
    check_data(SimpleNamespace(tokenizer=find_tokenizer(model)), data)
    calibrate = getattr(data, "calibration_dataloader", None)
    if not callable(calibrate):
        raise CalibrationError(f"{type(data).__name__} has no calibration_dataloader(), which {STREAM} needs")
    wanted = samples if config.needs_inputs else 1
    batches = list(first_samples(calibrate(), wanted))
    available = sum(map(count_samples, batches))
    if not available or available < (wanted or 0):
        raise CalibrationError(
            f"the datamodule's calibration_dataloader() gives {available} calibration samples; {wanted or 'some'} were "
            "asked for: give more data or a smaller calibration_samples"
        )
    return data, batches


def _check_finite(weights: MappedWeights) -> None:
    broken = {}
    for name, tensor in weights.tensors.items():
        if count := nonfinite_count(tensor):
            broken[name] = count
        weights.let_go([tensor])
    if broken:
        raise DivergenceError(f"the pruned model is not written: {nonfinite_message(broken)}")


def _report_entries(result: PruningResult, inspection: Inspection) -> dict[str, Any]:
    """Report entries of the pruning and of the zeros counted in the files."""
    needs = result.config.needs_inputs
    account = pruned(result, "the datamodule's calibration_dataloader()" if needs else "nothing: it needs no data")
    asked = {"pattern": result.config.pattern, "asked": result.config.sparsity}
    asked |= {"counted_on": f"{BASE_FOLDER}/: {len(inspection.files)} files"}
    memory, kind = peak_memory()
    for note in result.notes:
        console.print(note, markup=False, soft_wrap=True)
    return {
        "status": "finished",
        "streamed": True,
        "pruning": account,
        "sparsity": inspection.account() | asked | {key: account[key] for key in ("coverage", "overall_sparsity")},
        "memory": {"peak_bytes": memory, "kind": kind},
    }


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - start


def _progress(advance: Callable[..., None]) -> Callable[[int, int], None]:
    last = 0

    def progress(done: int, total: int) -> None:
        nonlocal last
        advance(done - last, total)
        last = done

    return progress
