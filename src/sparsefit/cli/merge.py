"""`sparsefit merge RUN` merges a run's adapter into its base and measures the change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsefit.callbacks.run_folder import RunFolder
from sparsefit.cli.class_paths import named_class
from sparsefit.cli.input_errors import Parser
from sparsefit.cli.library_output import silence_libraries
from sparsefit.errors import MaskError, RunFolderError, SparsefitError
from sparsefit.files import SUMS_FILE, check_sums, replacing
from sparsefit.pruning import MaskSet
from sparsefit.recovery.adapter_files import NOTES_FILE, load_adapter, read_notes
from sparsefit.recovery.inspection import MASKS_FILE, files_digest, inspect_folder
from sparsefit.recovery.merge import check_mergeable, merge
from sparsefit.recovery.run_files import check_ended
from sparsefit.reporting.console import console, stage_progress, summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge_run(arguments: list[str]) -> int:
    """Merge the adapter of a run into its base, measure both and count the zeros; return 1 if a mask does not hold."""
    parser = Parser(
        "sparsefit merge",
        description="Merge the adapter of a run into its sparse base. The result is a model in Hugging Face layout "
        "with exactly the zeros of the run's masks.",
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--output", type=Path, help="the folder to write, new or empty; by default RUN/model")
    parser.add_argument(
        "--reapply-masks",
        action="store_true",
        help="also merge an adapter that makes pruned weights nonzero, and set them to zero again. This changes the "
        "model; the quality is printed before and after",
    )
    parser.add_argument("--no-evaluation", action="store_true", help="do not measure the quality before and after")
    given = parser.parse_args(arguments)
    silence_libraries()
    folder = RunFolder(given.run)
    check_ended(folder.path)
    if given.output is None and folder.model.is_dir() and not given.reapply_masks:
        check_sums(folder.model)
        console.print(f"{folder.model} already holds the recovered model.", markup=False)
        return _print_zeros(folder.model)
    output = (given.output or (folder.path / "merged" if given.reapply_masks else folder.model)).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunFolderError(f"{output} exists and is not empty. Give --output another folder")
    _merge(folder, output, given.reapply_masks, evaluate=not given.no_evaluation)
    return _print_zeros(output)


def _merge(folder: RunFolder, output: Path, reapply_masks: bool, evaluate: bool) -> None:
    masks = _masks_of(folder)
    model, base = recovered_model(folder, masks)
    check_mergeable(model, masks, reapply_masks)
    measure, why = _measure_of(folder, model) if evaluate else (None, "--no-evaluation was given")
    before = measure(model, "with a separate adapter") if measure is not None else None
    merged: PreTrainedModel = merge(model, masks, reapply_masks)
    with replacing(output) as partial:
        merged.save_pretrained(partial)
        copy_other_files(base, partial)
        masks.save(partial / MASKS_FILE)
    console.print(f"merged model: {output}", markup=False, soft_wrap=True)
    if measure is None or before is None:
        console.print(f"quality: not measured ({why})", markup=False, soft_wrap=True)
        return
    after = measure(merged, "merged")
    for name, value in before.metrics.items():
        new = after.metrics[name]
        line = f"{name}: {value:.4f} with a separate adapter, {new:.4f} merged ({new - value:+.4f})"
        console.print(line, markup=False, soft_wrap=True)
    difference = max(float((a - b).abs().max()) for a, b in zip(before.outputs, after.outputs, strict=True))
    console.print(f"largest difference of an output in one batch: {difference:.2g}", soft_wrap=True)


def copy_other_files(base: Path, output: Path) -> None:
    """Copy the base's other files, such as tokenizer, processor and settings, if `output` does not have them."""
    for file in sorted(base.iterdir()):
        is_weights = file.name.endswith((".safetensors", ".safetensors.index.json", SUMS_FILE))
        is_weights |= file.name.startswith("pytorch_model")
        if file.is_file() and not is_weights and not (output / file.name).exists():
            shutil.copyfile(file, output / file.name)


def _masks_of(folder: RunFolder) -> MaskSet:
    if not folder.path.is_dir():
        raise RunFolderError(f"there is no run folder {folder.path}")
    if not folder.adapter.is_dir():
        raise RunFolderError(
            f"the run in {folder.path} has no adapter to merge: {folder.adapter} does not exist. If nothing was "
            f"trained, {folder.base} is the pruned model; if all weights were, {folder.model} is the recovered model"
        )
    return MaskSet.load(folder.masks)


def recovered_model(folder: RunFolder, masks: MaskSet) -> tuple[torch.nn.Module, Path]:
    """The trained model, on the CPU, and the folder of its base."""
    from sparsefit.modules.loading import load_model
    from sparsefit.recovery.quantize import dequantize_base, quantize_base

    check_sums(folder.adapter)
    notes = read_notes(folder.adapter)
    base = folder.path / notes.get("base", folder.base.name)
    if base not in (folder.base, folder.trained_base):
        raise RunFolderError(
            f"the adapter in {folder.adapter} names {notes['base']!r} as its base, which is not in the run folder, so "
            f"it is not read. If {folder.base} is its base, write that into {folder.adapter / NOTES_FILE}"
        )
    if not base.is_dir():
        raise RunFolderError(
            f"the base of the adapter in {folder.adapter} is not at {base}: it was moved or deleted. Restore it there"
        )
    check_sums(base)
    if notes.get("base_digest") not in (None, files_digest(base)):
        raise RunFolderError(
            f"the adapter in {folder.adapter} was trained on another base than {base}: the weights differ. Use the "
            "base of the adapter's own run"
        )
    if not (base / "config.json").is_file():
        raise RunFolderError(
            f"the base in {base} is a plain module, not a transformers model, so its class is not known. Merge in "
            "Python: create the module, load the base and the adapter (sparsefit.recovery.adapter_files.load_adapter), "
            "and call sparsefit.recovery.merge.merge"
        )
    model = load_model(str(base), dtype="auto", allow_unused=True)
    if quantization := notes.get("quantization"):
        # The adapter was trained on the quantized values; quantizing the same floats gives these values again.
        masks.verify(model)
        model.requires_grad_(False)
        quantize_base(model, quantization["kind"], masks, double_quant=quantization["double_quant"])
        dequantize_base(model)
    try:
        return load_adapter(model, folder.adapter, masks), base
    except MaskError as error:
        raise MaskError(f"{base} and {folder.masks} do not fit the adapter of the run: {error}") from error


@dataclass(frozen=True)
class Measured:
    """A model's metrics on the test data, and its first outputs."""

    metrics: dict[str, float]
    outputs: list[torch.Tensor]
    """Outputs on the first batch."""


def _measure_of(folder: RunFolder, model: torch.nn.Module) -> tuple[Callable[[Any, str], Measured] | None, str]:
    """A function that evaluates with the recipe's module and data; None and the reason if impossible."""
    import yaml
    from lightning.pytorch import LightningDataModule

    if not folder.configuration.is_file():
        return None, f"there is no recipe {folder.configuration}"
    try:
        recipe = yaml.safe_load(folder.configuration.read_text(encoding="utf-8"))
        if not isinstance(recipe, dict) or not recipe.get("data"):
            return None, "the recipe has no data"
        data = named_class(recipe["data"], LightningDataModule)(**recipe["data"].get("init_args") or {})
        data.setup("test")
        batches = list(data.test_dataloader())
        module = _module_around(recipe.get("model"), model)
    except yaml.YAMLError as error:
        return None, f"the recipe {folder.configuration} cannot be read: {error}"
    except SparsefitError as error:
        return None, str(error)
    if module is None:
        return None, "the recipe's module is not one of sparsefit's"
    return partial(_measured, module, batches), ""


def _module_around(recipe: Any, model: torch.nn.Module) -> Any:
    """The recipe's module around an existing model; None if its class does not take one."""
    from lightning.pytorch import LightningModule

    from sparsefit.modules.recoverable import RecoverableModule

    kind = named_class(recipe, LightningModule)
    ours = issubclass(kind, RecoverableModule) and callable(getattr(kind, "evaluate", None))
    return kind(model) if ours else None


@torch.no_grad()
def _measured(module: Any, batches: list[Any], model: torch.nn.Module, title: str) -> Measured:
    module.model = model.eval()
    with stage_progress(f"evaluating {title}", len(batches)) as advance:
        metrics = module.evaluate(batches, lambda _: advance())
    outputs = module.predict_step(batches[0])
    outputs = getattr(outputs, "logits", outputs)
    return Measured(metrics, [outputs.float()])


def _print_zeros(folder: Path) -> int:
    inspection = inspect_folder(folder)
    status = f"counted in {', '.join(str(file) for file in inspection.files)}"
    console.print(summary({"name": str(folder), "status": status, "sparsity": inspection.account()}))
    for name, count in inspection.broken.items():
        console.print(f"{name}: {count} weights that its mask prunes are not zero", markup=False)
    return 1 if inspection.broken else 0
