"""`sparsefit plan` predicts the time, memory and disk space of a recipe."""

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
from sparsefit.cli.input_errors import check_recipes
from sparsefit.cli.library_output import silence_libraries
from sparsefit.cli.miniature_run import Miniature, measure
from sparsefit.cli.plan_reading import first_samples
from sparsefit.cli.plan_recipe import FIRST_BLOCKS, Recipe, recipe_of
from sparsefit.errors import ConfigError
from sparsefit.machine import free_host_memory, host_memory, memory_of
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

_LONGEST_SECONDS = 8.0  # of a training batch (or the pruning) in the second miniature, estimated from the first
_STUDY_SECTIONS = {"study", "grid", "models"}


def plan(arguments: list[str], gpu_name: str | None = None) -> int:
    """Measure miniatures of a recipe and print the prediction; with a GPU's name, compute it from its data sheet."""
    silence_libraries()
    gpu = None if gpu_name is None else gpu_called(gpu_name)
    if any(_STUDY_SECTIONS & set(recipe) for recipe in check_recipes(arguments)):
        raise ConfigError("this is the recipe of a study: only recipes of `sparsefit fit` and `prune` can be planned")
    settings = read_recipe(arguments)
    on_gpu = gpu is not None or _has_gpu(settings.trainer.accelerator)
    recipe = recipe_of(settings, on_gpu)
    if gpu is None:
        console.print("measuring the recipe on a model of two blocks, and on a larger one", soft_wrap=True)
        prediction, memory = predict(recipe.work, *_measure(recipe)), memory_of(settings.trainer.accelerator)
    else:
        console.print(f"for {gpu_name}, computed at {REACHED:.0%} of its peak; nothing is measured", soft_wrap=True)
        prediction, memory = _from_data_sheet(recipe, settings, gpu), gpu.memory
    room = _room(settings, recipe, memory, None if gpu is not None else host_memory())
    lines = plan_summary(prediction, recipe.work, list(unfit(prediction, recipe.work, room)))
    if gpu is not None:
        lines.append("not computed from a data sheet: files of the run, export, zero-shot tasks")
    console.print(_first_line(prediction, recipe), _table(prediction), *lines, sep="\n", soft_wrap=True)
    return 0


def _has_gpu(accelerator: str) -> bool:
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def _first_line(prediction: Plan, recipe: Recipe) -> str:
    """The first line of the prediction, which a fit also prints first."""
    work = recipe.work
    steps = work.max_steps if recipe.miniature.train is not None else 0
    return plan_line(prediction.counts, prediction.least, work.gpu_hours, work.devices, steps)


def _from_data_sheet(recipe: Recipe, settings: Any, gpu: GPU) -> Plan:
    if recipe.blocks is None:
        raise ConfigError(
            "--gpu needs a model given by name whose blocks can be counted: leave out --gpu to measure this one"
        )
    arguments, text = settings.model.as_dict()["init_args"], recipe.configuration.get_text_config()
    if not hasattr(text, "vocab_size"):
        raise ConfigError("--gpu needs a language model: leave out --gpu to measure this model on this machine")
    # Mixed precision keeps the weights in float32.
    weight_bytes = 4 if arguments.get("dtype", "float32") == "float32" else 2
    checkpointing = bool(arguments.get("gradient_checkpointing"))
    activation_bytes = 2 if "16" in str(settings.trainer.precision) else weight_bytes  # "bf16-mixed", "16-true", ...
    sizes = (text.hidden_size, text.vocab_size, weight_bytes, activation_bytes)
    shape = Shape(*sizes, checkpointing, recipe.work.taught)
    passes = settings.reconstruction.passes
    evaluations = _evaluations(recipe, settings) * bool(recipe.work.test_batches)
    return predict(recipe.work, estimated(recipe.work, _counts(recipe), shape, gpu, passes, evaluations))


def _evaluations(recipe: Recipe, settings: Any) -> int:
    """How many evaluations the recipe makes: of the dense, pruned, reconstructed, recovered and merged model."""
    adapter = settings.model.as_dict()["init_args"].get("adapter")
    form = adapter.get("form", AdapterSettings().form) if isinstance(adapter, dict) else None
    trains = recipe.miniature.train is not None
    return 2 + bool(settings.reconstruction.passes) + trains * (1 + (form in LOSSLESS))


def _counts(recipe: Recipe) -> dict[str, float]:
    """All, pruned and trained weights of the recipe's model, counted on the meta device."""
    with torch.device("meta"):
        module = recipe.miniature.make_module(None, whole_skeleton=True)
    parameters, trains = list(module.parameters()), recipe.miniature.train is not None
    return {
        "all": float(sum(p.numel() for p in parameters)),
        "pruned": float(count_weights(module, recipe.config)),
        "train": float(sum(p.numel() for p in parameters if p.requires_grad and trains)),
    }


def _measure(recipe: Recipe) -> tuple[Measured, Measured | None, Measured | None]:
    one, whole = recipe.miniature, recipe.miniature.blocks == recipe.blocks
    small, *further = measure(one, _with_more_samples(one, recipe.calibration) if whole else None)
    if whole:
        return small, None, further[0] if further else None
    # A small model is measured with all its blocks, so that nothing is extrapolated.
    taken = small.seconds.get("batch", small.seconds.get("pruning", 0.0))
    by_time = int(FIRST_BLOCKS * _LONGEST_SECONDS / max(taken, 1e-3))
    blocks = min(by_time, blocks_within(_free(recipe), recipe.work, small))
    two = replace(one, blocks=min(recipe.blocks, max(FIRST_BLOCKS + 1, blocks)))
    larger, *further = measure(two, _with_more_samples(two, recipe.calibration))
    return small, larger, further[0] if further else None


def _free(recipe: Recipe) -> Room:
    """The free memory, and the free disk space of the temporary folder, to which miniatures write."""
    host, folder = free_host_memory(), tempfile.gettempdir()
    device = host if recipe.work.host is None else float(torch.cuda.mem_get_info()[0])
    return Room(device, host, shutil.disk_usage(folder).free, folder)


def _with_more_samples(run: Miniature, calibration: list[Any]) -> Miniature | None:
    """A copy with twice the calibration samples that is only pruned; None if there are not enough."""
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
