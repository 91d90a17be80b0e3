"""`sparsefit plan`: what a recipe will take, told before any of its hours is spent."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import instantiate_class
from rich import box
from rich.table import Table
from torch import Tensor

from sparsefit.calibration.samples import count_samples, cut_batch, tensors_in
from sparsefit.cli.fit import read_recipe
from sparsefit.cli.parsing import Parser, check_recipes
from sparsefit.cli.probing import Miniature, measure
from sparsefit.cli.quiet import quieten
from sparsefit.errors import CalibrationError, ConfigError, SparsefitError
from sparsefit.modules.loading import configuration_of, find_tokenizer, load_skeleton
from sparsefit.modules.model_classes import blocks_in
from sparsefit.planning import Measured, Plan, Shape, Work, estimated, gpu_called, predict
from sparsefit.planning.gpus import GPU, REACHED
from sparsefit.planning.prediction import at
from sparsefit.pruning import PruningConfig
from sparsefit.pruning.blocks import find_block_lists
from sparsefit.pruning.targets import find_weights
from sparsefit.reporting.console import console
from sparsefit.reporting.formats import hours, percent, seconds, size
from sparsefit.reporting.machine import memory_held, memory_of

_TRAINER = ("accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm", "deterministic", "benchmark")
_FEWEST = 2  # blocks of the first miniature: a single one is no list of repeated blocks
_LONGEST = 8.0  # seconds that a training batch of the second miniature may take, as far as the first one tells


@dataclass(frozen=True)
class Recipe:
    """What of a recipe the plan goes by.

    Args:
        configuration: Of the model, where the module is told its name; else the module is built as it is.
        blocks: Repeated blocks of that model; None where they cannot be counted.
        miniature: The recipe on its first data, with the calibration samples of one micro-batch.
        calibration: All calibration batches.
        work: What there is to do.
    """

    configuration: Any
    blocks: int | None
    miniature: Miniature
    calibration: list[Any]
    work: Work


@dataclass(frozen=True)
class Data:
    """All calibration batches, the first batch of the training and of the test data, how many of these there are, and
    the seconds that reading took."""

    calibration: list[Any]
    train: Any
    reading: dict[str, float]
    test: Any = None
    test_batches: int = 0


def plan(arguments: list[str]) -> int:
    """Measure a recipe in miniature and print what all of it will take; nothing of it is run or written."""
    quieten()
    parser = Parser(prog="sparsefit plan", add_help=False)
    parser.add_argument("--gpu", help="plan for this GPU, by its data sheet, and not for the machine at hand")
    given, arguments = parser.parse_known_args(arguments)
    gpu = None if given.gpu is None else gpu_called(given.gpu)
    check_recipes(arguments)
    settings = read_recipe(arguments)
    recipe = _recipe(settings)
    if gpu is None:
        console.print("measuring the recipe on a model of two blocks, and of some more", soft_wrap=True)
        made, room = predict(recipe.work, *_measured(recipe)), memory_of(settings.trainer.accelerator)
    else:
        console.print(f"for {given.gpu}, reckoned with {REACHED:.0%} of its peak: nothing is measured", soft_wrap=True)
        made, room = _by_data_sheet(recipe, settings, gpu), int(gpu.memory)
    console.print(_table(made), *_words(made, recipe, settings, room), sep="\n", soft_wrap=True)
    return 0


def _by_data_sheet(recipe: Recipe, settings: Any, gpu: GPU) -> Plan:
    if recipe.blocks is None:
        raise ConfigError(
            "--gpu plans for models by name whose blocks can be counted: leave it out to measure this one"
        )
    work, few = replace(recipe.work, held=0.0), min(_FEWEST, recipe.blocks)
    first, second = (_counts(recipe, blocks, settings) for blocks in (few, few + 1))
    counts = {key: at(work.blocks, (few, first[key]), (few + 1, second[key])) for key in first}
    arguments, text = settings.model.as_dict()["init_args"], recipe.configuration.get_text_config()
    # Mixed precision keeps float32 weights.
    weight_bytes = 4 if arguments.get("dtype", "float32") == "float32" else 2
    checkpointing, taught = bool(arguments.get("gradient_checkpointing")), bool(arguments.get("distill"))
    shape = Shape(text.hidden_size, text.vocab_size, weight_bytes, checkpointing, taught)
    evaluations = (3 + bool(settings.reconstruction.passes)) * bool(work.test_batches)
    return predict(work, estimated(work, counts, shape, gpu, settings.reconstruction.passes, evaluations))


def _counts(recipe: Recipe, blocks: int, settings: Any) -> dict[str, float]:
    """Weights of the recipe's model with so many blocks: in all, to be pruned, and trained."""
    module, pruning = recipe.miniature.make_module(blocks), settings.pruning.as_dict()
    config = PruningConfig(**{name: pruning[name] for name in PruningConfig.__dataclass_fields__})
    lists = find_block_lists(module)
    found = find_weights(module, [block for blocks in lists for block in blocks], config)
    parameters = list(module.parameters())
    return {
        "all": float(sum(p.numel() for p in parameters)),
        "pruned": float(sum(weight.parameter.numel() for weight in found.weights)),
        "train": float(sum(p.numel() for p in parameters if p.requires_grad)),
    }


def _recipe(settings: Any) -> Recipe:
    model_settings = settings.model.as_dict()
    name = model_settings["init_args"].get("model")
    configuration = configuration_of(name) if isinstance(name, str) else None
    blocks = None if configuration is None else blocks_in(configuration)
    data = _data(settings)
    calibration, train = data.calibration, data.train
    if (wanted := settings.pruning.calibration_samples) is not None:
        calibration = _first(calibration, wanted)
    samples, pruning, trainer = sum(map(count_samples, calibration)), settings.pruning.as_dict(), settings.trainer
    at_once = max(pruning["micro_batch_size"], settings.reconstruction.batch_size)
    first = _first(calibration, at_once)
    trains = train is not None and 0 not in (trainer.max_steps, trainer.max_epochs)
    miniature = Miniature(
        make_module=partial(make_module, model_settings["class_path"], model_settings["init_args"]),
        blocks=None if blocks is None else min(blocks, _FEWEST),
        pruning=pruning | {"calibration": None, "calibration_samples": None},
        reconstruction=settings.reconstruction.as_dict() | {"calibration": None, "calibration_samples": None},
        trainer={key: trainer[key] for key in _TRAINER if trainer[key] is not None},
        calibration=first,
        samples=sum(map(count_samples, first)),
        train=train if trains else None,
        test=data.test,
    )
    devices = trainer.devices if isinstance(trainer.devices, int) else 1
    work = Work(
        blocks=blocks or 1,
        samples=samples,
        sample_tokens=_positions(calibration[0]),
        test_batches=data.test_batches,
        batches_in_step=trainer.accumulate_grad_batches,
        batch_tokens=_positions(train) * count_samples(train) if trains else 0,
        max_steps=trainer.max_steps if trainer.max_steps >= 0 else None,
        gpu_hours=settings.budget.gpu_hours,
        reserve=settings.budget.reserve,
        devices=devices * trainer.num_nodes,
        state_bytes=_state_bytes(configuration, calibration[0], bool(settings.reconstruction.passes)),
        test_tokens=_positions(data.test) * count_samples(data.test) if data.test_batches else 0,
        reading=data.reading,
        held=memory_held(),
        control=settings.control,
    )
    return Recipe(configuration, blocks, miniature, calibration, work)


def _data(settings: Any) -> Data:
    """The data of a recipe, read as its run would read them.

    Raises:
        CalibrationError: if there is nothing to calibrate on.
    """
    data = instantiate_class((), settings.data.as_dict())
    data.prepare_data()
    data.setup("fit")
    train = next(iter(data.train_dataloader()), None)
    calibrate = getattr(data, "calibration_dataloader", None)
    start = time.monotonic()
    calibration = list(calibrate()) if callable(calibrate) else [train]
    reading = {"pruning": time.monotonic() - start}
    if not calibration or calibration[0] is None:
        raise CalibrationError("there is nothing to calibrate on: the data give no batch")
    start = time.monotonic()
    try:
        data.setup("test")
        loader = data.test_dataloader()
    except SparsefitError:  # a recipe may have no test data
        return Data(calibration, train, reading)
    reading["evaluation"] = time.monotonic() - start
    return Data(calibration, train, reading, next(iter(loader), None), len(loader))


def make_module(class_path: str, arguments: dict[str, Any], blocks: int | None) -> LightningModule:
    """The module of a recipe, on a model with so many blocks and random weights; with its own model where None."""
    if blocks is None:
        return instantiate_class((), {"class_path": class_path, "init_args": arguments})
    package, _, name = class_path.rpartition(".")
    kept = {key: arguments[key] for key in ("dtype", "attn_implementation") if arguments.get(key) is not None}
    model = load_skeleton(arguments["model"], **kept, blocks=blocks)
    module = getattr(import_module(package), name)(**arguments | {"model": model})
    if hasattr(module, "tokenizer"):  # which is written beside the model
        module.tokenizer = find_tokenizer(arguments["model"])
    return module


def _measured(recipe: Recipe) -> tuple[Measured, Measured | None, Measured | None]:
    one = recipe.miniature
    small, *_ = measure(one)
    if one.blocks == recipe.blocks:
        return small, None, None
    # Of a small model all blocks, so that nothing is extrapolated.
    blocks = int(_FEWEST * _LONGEST / max(small.seconds.get("batch", 0.0), 1e-3))
    blocks = min(recipe.blocks, max(_FEWEST + 1, blocks))
    two, twice = replace(one, blocks=blocks), _first(recipe.calibration, 2 * one.samples)
    samples = sum(map(count_samples, twice))
    more = replace(two, calibration=twice, samples=samples, train=None) if samples > one.samples else None
    larger, *further = measure(two, more)
    return small, larger, further[0] if further else None


def _first(batches: Iterable[Any], samples: int) -> list[Any]:
    """The first so many samples, in batches."""
    taken: list[Any] = []
    for batch in batches:
        if samples <= 0:
            break
        size = count_samples(batch)
        taken.append(batch if size <= samples else cut_batch(batch, samples))
        samples -= size
    return taken


def _positions(batch: Any) -> int:
    """Tokens of each sample; 1 where a batch holds no tokens."""
    tensor = next(tensors_in(batch), None)
    return tensor.shape[1] if isinstance(tensor, Tensor) and not tensor.is_floating_point() and tensor.ndim > 1 else 1


def _state_bytes(configuration: Any, batch: Any, reconstructs: bool) -> int:
    """Of a sample's hidden states between two blocks, in float32; reconstruction holds those of the dense model too."""
    width = 0 if configuration is None else getattr(configuration.get_text_config(), "hidden_size", 0)
    return 4 * width * _positions(batch) * (2 if reconstructs else 1)


def _table(plan: Plan) -> Table:
    table = Table("stage", "", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("time", justify="right")
    table.add_column("share", justify="right")
    total = sum(stage.seconds for stage in plan.stages)
    for stage in plan.stages:
        table.add_row(stage.name, stage.what, seconds(stage.seconds), percent(stage.seconds / total, 0))
    table.add_row("all", f"{hours(plan.gpu_hours)} GPU-hours", seconds(total), "")
    return table


def _words(plan: Plan, recipe: Recipe, settings: Any, room: int | None) -> list[str]:
    counts, work = plan.counts, recipe.work
    said = [
        f"weights: {counts['all']:,.0f}, of which {counts['pruned']:,.0f} are to be pruned "
        f"({percent(counts['pruned'] / counts['all'], 0)}) and {counts['train']:,.0f} train",
        f"memory: {size(max(plan.peaks.values()))} "
        f"({', '.join(f'{stage} {size(peak)}' for stage, peak in plan.peaks.items())}); files: {size(plan.disk)}",
    ]
    if plan.step:
        limit = {"budget": f"as many as {work.gpu_hours:g} GPU-hours buy", "max_steps": "which max_steps ends"}
        said.append(
            f"training: {plan.steps:,} steps of {seconds(plan.step)}, {limit.get(plan.ends_by, 'without an end')}"
        )
    if work.batch_tokens > 1:
        said.append(f"arithmetic: {plan.operations:.2g} floating-point operations in calibration and training")
    return said + _too_large(plan, settings, room)


def _too_large(plan: Plan, settings: Any, room: int | None) -> list[str]:
    """What will not fit, and the setting to change."""
    said = []
    ways = {
        "pruning": "a smaller pruning.micro_batch_size, pruning.states_on_cpu: true or fewer calibration_samples",
        "training": "model.init_args.gradient_checkpointing: true, or a smaller batch_size and as many times larger a "
        "trainer.accumulate_grad_batches",
    }
    for stage, peak in plan.peaks.items():
        if room is not None and peak > room:
            said.append(f"DOES NOT FIT: {stage} takes {size(peak)} of {size(room)} memory: set {ways[stage]}")
    place = next(parent for parent in Path(settings.run.folder).absolute().parents if parent.exists())
    if plan.disk > (free := shutil.disk_usage(place).free):
        said.append(
            f"DOES NOT FIT: the run folder takes {size(plan.disk)}, and {place} has {size(free)}: set run.folder"
        )
    if plan.ends_by == "budget" and plan.steps == 0:
        said.append("NOTHING IS TRAINED: the budget is spent before the first step: raise budget.gpu_hours")
    return said
