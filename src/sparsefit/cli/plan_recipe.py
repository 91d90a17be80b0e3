"""Extracts from a recipe what its plan needs: the model's configuration, a miniature of the run, the amount of work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import instantiate_class
from torch import Tensor

from sparsefit.calibration.samples import count_samples, tensors_in
from sparsefit.cli.miniature_run import Miniature
from sparsefit.cli.plan_reading import Data, first_samples, read_data
from sparsefit.machine import memory_held, process_memory
from sparsefit.modules.loading import configuration_of, find_tokenizer, load_skeleton
from sparsefit.modules.model_classes import blocks_in
from sparsefit.planning import Work
from sparsefit.pruning import PruningConfig
from sparsefit.pruning.fisher_checks import check_whole_weights

FIRST_BLOCKS = 2  # blocks of the first miniature: one block alone is not recognized as a list of repeated blocks
_TRAINER = ("accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm", "deterministic", "benchmark")
_SPLITTING = ("fsdp", "deepspeed", "modelparallel")  # in the names of strategies that split the weights


@dataclass(frozen=True)
class Recipe:
    """The parts of a recipe that its plan uses.

    Args:
        configuration: The model's configuration if the recipe names a model, else None; the module is then built whole.
        blocks: How many repeated blocks the model has; None if they cannot be counted.
        config: The pruning configuration.
        miniature: A reduced recipe, with the first data and the calibration samples of one micro-batch.
        calibration: All calibration batches.
        work: The amount of work.
        processes: Processes on each host.
    """

    configuration: Any
    blocks: int | None
    config: PruningConfig
    miniature: Miniature
    calibration: list[Any]
    work: Work
    processes: int


def recipe_of(settings: Any, on_gpu: bool) -> Recipe:
    """Read the data of a recipe and the configuration of its model, without running it.

    Args:
        settings: The settings of the recipe.
        on_gpu: Whether the run would use a GPU.

    Raises:
        ConfigError: if the run would refuse the recipe.
    """
    model_settings, pruning, trainer = settings.model.as_dict(), settings.pruning.as_dict(), settings.trainer
    arguments, passes = model_settings["init_args"], settings.reconstruction.passes
    name = arguments.get("model")
    is_new = arguments.get("config") is not None  # a new model, whose name is that of the architecture
    configuration = configuration_of(name) if isinstance(name, str) and not is_new else None
    blocks = None if configuration is None else blocks_in(configuration)
    module_class = class_at(model_settings["class_path"])
    data = read_data(settings, evaluates=callable(getattr(module_class, "evaluate", None)))
    calibration = data.calibration
    if (wanted := settings.pruning.calibration_samples) is not None:
        calibration = first_samples(calibration, wanted)
    config = PruningConfig(**{name: pruning[name] for name in PruningConfig.__dataclass_fields__})
    first = first_samples(calibration, max(pruning["micro_batch_size"], settings.reconstruction.batch_size))
    trains = data.train is not None and 0 not in (trainer.max_steps, trainer.max_epochs)
    miniature = Miniature(
        make_module=partial(make_module, model_settings["class_path"], arguments),
        blocks=None if blocks is None else min(blocks, FIRST_BLOCKS),
        pruning=pruning | {"calibration": None, "calibration_samples": None},
        reconstruction=settings.reconstruction.as_dict() | {"calibration": None, "calibration_samples": None},
        trainer={key: trainer[key] for key in _TRAINER if trainer[key] is not None},
        calibration=first,
        samples=sum(map(count_samples, first)),
        train=data.train if trains else None,
        test=data.test,
        val=data.val,
        tasks={key: settings.run[key] for key in ("tasks", "tasks_folder", "tasks_batch_size") if settings.run.tasks},
    )
    work = _work(settings, replace(data, calibration=calibration), config, trains, on_gpu)
    check_whole_weights(config, sharded=work.splits)
    state_bytes = _state_bytes(configuration, calibration[0], bool(passes))
    work = replace(work, blocks=blocks or 1, state_bytes=state_bytes, taught=bool(arguments.get("distill")))
    return Recipe(configuration, blocks, config, miniature, calibration, work, devices_of(trainer, on_gpu))


def _work(settings: Any, data: Data, config: PruningConfig, trains: bool, on_gpu: bool) -> Work:
    """The amount of work that does not depend on the model."""
    trainer, strategy = settings.trainer, str(settings.trainer.strategy).lower()
    max_steps, limited_by = _limit(trainer, data)
    return Work(
        blocks=1,
        samples=sum(map(count_samples, data.calibration)),
        sample_tokens=_positions(data.calibration[0]),
        test_batches=data.test_batches,
        batches_in_step=trainer.accumulate_grad_batches,
        batch_tokens=_positions(data.train) * count_samples(data.train) if trains else 0,
        max_steps=max_steps,
        limited_by=limited_by,
        gpu_hours=settings.budget.gpu_hours,
        reserve=settings.budget.reserve,
        devices=devices_of(trainer, on_gpu) * trainer.num_nodes,
        splits=any(name in strategy for name in _SPLITTING),
        test_tokens=_positions(data.test) * count_samples(data.test) if data.test_batches else 0,
        reading=data.reading,
        held=0.0 if on_gpu else memory_held(),
        host=process_memory() if on_gpu else None,
        removed=1.0 if config.reconstruction else config.sparsity,
        val_batches=data.val_batches if trains else 0,
        val_every=_val_every(trainer, data) if trains else math.inf,
        task_items=data.task_items,
        gram="gram" in config.statistics,
        micro_batch=config.micro_batch_size,
        control=settings.control,
        states_on_host=on_gpu and config.states_on_cpu,
        forwards=_forwards(config),
        gradients=config.allocation == "fisher",
    )


def _forwards(config: PruningConfig) -> int:
    """Forward passes of the calibration data; a backward pass counts as two."""
    to_allocate = config.passes_to_allocate + 2 * (config.allocation == "fisher")
    if config.takes_one_pass:  # which is the first one of an allocation, too
        return max(int(config.needs_inputs), to_allocate)
    # A block runs once for its statistics, and once more when it is pruned; a dense one gives both at once.
    return to_allocate + (2 if config.update == "block" else 1)


def class_at(path: str) -> type:
    """The class at a dotted path."""
    package, _, name = path.rpartition(".")
    return getattr(import_module(package), name)


def make_module(
    class_path: str, arguments: dict[str, Any], blocks: int | None, whole_skeleton: bool = False
) -> LightningModule:
    """The module of a recipe on a model of `blocks` blocks with random weights.

    If `blocks` is None, the module has its own model; with `whole_skeleton`, a random one with all blocks.
    """
    if blocks is None and not whole_skeleton:
        return instantiate_class((), {"class_path": class_path, "init_args": arguments})
    kept = {key: arguments[key] for key in ("dtype", "attn_implementation") if arguments.get(key) is not None}
    model = load_skeleton(arguments["model"], **kept, blocks=blocks)
    module = class_at(class_path)(**arguments | {"model": model})
    if hasattr(module, "tokenizer"):  # which a run saves with the model
        module.tokenizer = find_tokenizer(arguments["model"])
    return module


def devices_of(trainer: Mapping[str, Any], on_gpu: bool) -> int:
    """How many devices of a host the Trainer's settings select."""
    devices = trainer["devices"]
    if isinstance(devices, str) and "," in devices:
        return len([name for name in devices.split(",") if name.strip()])
    if isinstance(devices, list | tuple):
        return len(devices)
    if devices in ("auto", "-1", -1, None):
        return max(torch.cuda.device_count(), 1) if on_gpu else 1
    return int(devices)


def _limit(trainer: Any, data: Data) -> tuple[int | None, str]:
    """Optimizer steps after which a recipe ends (None: only its budget ends it), and the setting that ends it."""
    limits = {"max_steps": math.inf if trainer.max_steps < 0 else trainer.max_steps}
    if (trainer.max_epochs or -1) > 0 and data.epoch_batches < math.inf:
        limits["max_epochs"] = trainer.max_epochs * math.ceil(data.epoch_batches / trainer.accumulate_grad_batches)
    name = min(limits, key=limits.get)
    return (None if limits[name] == math.inf else int(limits[name])), name


def _val_every(trainer: Any, data: Data) -> float:
    """Optimizer steps between two validations; infinity if they depend on time or the data's length is unknown."""
    interval, epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
    interval = 1.0 if interval is None else interval
    if isinstance(interval, float):
        batches = interval * data.epoch_batches
    else:
        batches = interval if isinstance(interval, int) else math.inf
    return max(batches * (epochs or 1) / trainer.accumulate_grad_batches, 1)


def _positions(batch: Any) -> int:
    """Tokens of each sample; 1 if a batch holds no tokens."""
    tensor = next(tensors_in(batch), None)
    return tensor.shape[1] if isinstance(tensor, Tensor) and not tensor.is_floating_point() and tensor.ndim > 1 else 1


def _state_bytes(configuration: Any, batch: Any, reconstructs: bool) -> int:
    """Bytes of one sample's hidden states between two blocks, in float32; reconstruction also holds the dense ones."""
    width = 0 if configuration is None else getattr(configuration.get_text_config(), "hidden_size", 0)
    return 4 * width * _positions(batch) * (2 if reconstructs else 1)
