"""`sparsefit plan`: what a recipe will take, told before any of its hours is spent."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from sparsefit.calibration.samples import count_samples
from sparsefit.cli.fit import read_recipe
from sparsefit.cli.input_errors import Parser, check_recipes
from sparsefit.cli.library_output import silence_libraries
from sparsefit.cli.miniature_run import Miniature, measure
from sparsefit.cli.plan_reading import first_samples
from sparsefit.cli.plan_recipe import FEWEST, Recipe, recipe_of
from sparsefit.errors import ConfigError
from sparsefit.planning import (
    Measured,
    Plan,
    Room,
    Shape,
    blocks_within,
    estimated,
    gpu_called,
    plan_line,
    plan_summary,
    predict,
    unfit,
)
from sparsefit.planning.gpus import GPU, REACHED
from sparsefit.pruning.targets import count_weights
from sparsefit.recovery.adapters import LOSSLESS, AdapterSettings
from sparsefit.reporting.console import console
from sparsefit.reporting.formats import hours, percent, seconds
from sparsefit.reporting.machine import free_host_memory, host_memory, memory_of

_LONGEST = 8.0  # seconds that a training batch (or the pruning) of the second miniature may take, by the first one
_OF_A_STUDY = {"study", "grid", "models"}


def plan(arguments: list[str]) -> int:
    """Measure a recipe in miniature and print what all of it will take; nothing of it is run or written."""
    silence_libraries()
    parser = Parser(prog="sparsefit plan", add_help=False)
    parser.add_argument("--gpu", help="plan for this GPU, by its data sheet, and not for the machine at hand")
    given, arguments = parser.parse_known_args(arguments)
    gpu = None if given.gpu is None else gpu_called(given.gpu)
    if any(_OF_A_STUDY & set(found) for found in check_recipes(arguments)):
        raise ConfigError("this is the recipe of a study, and only those of `sparsefit fit` and `prune` are planned")
    settings = read_recipe(arguments)
    on_gpu = gpu is not None or _has_gpu(settings.trainer.accelerator)
    recipe = recipe_of(settings, on_gpu)
    if gpu is None:
        console.print("measuring the recipe on a model of two blocks, and of some more", soft_wrap=True)
        made, memory = predict(recipe.work, *_measured(recipe)), memory_of(settings.trainer.accelerator)
    else:
        console.print(f"for {given.gpu}, reckoned with {REACHED:.0%} of its peak: nothing is measured", soft_wrap=True)
        made, memory = _by_data_sheet(recipe, settings, gpu), gpu.memory
    room = _room(settings, recipe, memory, None if gpu is not None else host_memory())
    said = plan_summary(made, recipe.work, list(unfit(made, recipe.work, room)))
    if gpu is not None:
        said.append("not computed for a GPU by its data sheet: files of the run, export, zero-shot tasks")
    console.print(_opening(made, recipe), _table(made), *said, sep="\n", soft_wrap=True)
    return 0


def _has_gpu(accelerator: str) -> bool:
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def _opening(made: Plan, recipe: Recipe) -> str:
    """The line that opens the fit, too."""
    work = recipe.work
    steps = work.max_steps if recipe.miniature.train is not None else 0
    return plan_line(made.counts, made.least, work.gpu_hours, work.devices, steps)


def _by_data_sheet(recipe: Recipe, settings: Any, gpu: GPU) -> Plan:
    if recipe.blocks is None:
        raise ConfigError(
            "--gpu plans for models by name whose blocks can be counted: leave it out to measure this one"
        )
    arguments, text = settings.model.as_dict()["init_args"], recipe.configuration.get_text_config()
    if not hasattr(text, "vocab_size"):
        raise ConfigError("--gpu plans for language models: leave it out to measure this one on the machine at hand")
    # Mixed precision keeps float32 weights.
    weight_bytes = 4 if arguments.get("dtype", "float32") == "float32" else 2
    checkpointing = bool(arguments.get("gradient_checkpointing"))
    shape = Shape(text.hidden_size, text.vocab_size, weight_bytes, checkpointing, recipe.work.taught)
    passes = settings.reconstruction.passes
    evaluations = _evaluations(recipe, settings) * bool(recipe.work.test_batches)
    return predict(recipe.work, estimated(recipe.work, _counts(recipe), shape, gpu, passes, evaluations))


def _evaluations(recipe: Recipe, settings: Any) -> int:
    """Of the dense, pruned, reconstructed, recovered and merged model, as far as the recipe has them."""
    adapter = settings.model.as_dict()["init_args"].get("adapter")
    form = adapter.get("form", AdapterSettings().form) if isinstance(adapter, dict) else None
    trains = recipe.miniature.train is not None
    return 2 + bool(settings.reconstruction.passes) + trains * (1 + (form in LOSSLESS))


def _counts(recipe: Recipe) -> dict[str, float]:
    """Weights of the recipe's model, of which no memory is taken: in all, to be pruned, and trained."""
    with torch.device("meta"):
        module = recipe.miniature.make_module(None, whole_skeleton=True)
    parameters, trains = list(module.parameters()), recipe.miniature.train is not None
    return {
        "all": float(sum(p.numel() for p in parameters)),
        "pruned": float(count_weights(module, recipe.config)),
        "train": float(sum(p.numel() for p in parameters if p.requires_grad and trains)),
    }


def _measured(recipe: Recipe) -> tuple[Measured, Measured | None, Measured | None]:
    one, whole = recipe.miniature, recipe.miniature.blocks == recipe.blocks
    small, *further = measure(one, _with_more_samples(one, recipe.calibration) if whole else None)
    if whole:
        return small, None, further[0] if further else None
    # Of a small model all blocks, so that nothing is extrapolated.
    by_time = int(FEWEST * _LONGEST / max(small.seconds.get("batch", small.seconds.get("pruning", 0.0)), 1e-3))
    blocks = min(by_time, blocks_within(_free(recipe), recipe.work, small))
    two = replace(one, blocks=min(recipe.blocks, max(FEWEST + 1, blocks)))
    larger, *further = measure(two, _with_more_samples(two, recipe.calibration))
    return small, larger, further[0] if further else None


def _free(recipe: Recipe) -> Room:
    """What miniatures may use: free memory, and free disk space of the temporary folder that they write to."""
    host, folder = free_host_memory(), tempfile.gettempdir()
    device = host if recipe.work.host is None else float(torch.cuda.mem_get_info()[0])
    return Room(device, host, shutil.disk_usage(folder).free, folder)


def _with_more_samples(run: Miniature, calibration: list[Any]) -> Miniature | None:
    """The same on twice the calibration samples, and only pruned; None where there are no more."""
    twice = first_samples(calibration, 2 * run.samples)
    samples = sum(map(count_samples, twice))
    return replace(run, calibration=twice, samples=samples, train=None) if samples > run.samples else None


def _room(settings: Any, recipe: Recipe, memory: float | None, host: float | None) -> Room:
    place = next(parent for parent in Path(settings.run.folder).absolute().parents if parent.exists())
    return Room(memory, host, shutil.disk_usage(place).free, str(place), recipe.processes)


def _table(plan: Plan) -> Table:
    table = Table("stage", "", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0))
    for name in ("time", "GPU-hours", "share"):
        table.add_column(name, justify="right")
    total = sum(stage.seconds for stage in plan.stages)
    for stage in plan.stages:
        part = stage.seconds / total
        table.add_row(stage.name, stage.what, seconds(stage.seconds), hours(plan.gpu_hours * part), percent(part, 0))
    table.add_row("all", "", seconds(total), hours(plan.gpu_hours), "")
    return table
