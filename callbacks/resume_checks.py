"""Checks when a run resumes from a checkpoint, and changed optimizer settings that are applied to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from sparsefit.errors import ConfigError
from sparsefit.recovery.recipe_checks import changed_settings

FORMAT = 1
"""Format version of what `SparseCheckpoints` adds to a checkpoint."""

_WAY_OUT = "Resume with the settings of its run (config.yaml in the run folder), or start a new run in another folder"


def check_same_run(checkpoint: Mapping[str, Any], saved: Mapping[str, Any], trainer: Trainer, path: str | Path) -> None:
    """Check that this version can read a checkpoint, and that a fit continues on the same data.

    Args:
        checkpoint: The checkpoint as it was read, before it is completed and restored.
        saved: What `SparseCheckpoints` added to it.
        trainer: The trainer of this run.
        path: The path it was read from.

    Raises:
        ConfigError: if the format is of another version, or the run trains on other data.
    """
    if saved["format"] != FORMAT:
        raise ConfigError(
            f"the checkpoint {path} has the format {saved['format']!r} of another version of sparsefit; this one "
            f"reads {FORMAT}. Resume with the version that saved it"
        )
    if trainer.state.fn != TrainerFn.FITTING:
        return
    data, name = trainer.datamodule, data_name(trainer, checkpoint)
    if saved.get("data") is not None and name is None:
        raise ConfigError(
            f"the checkpoint {path} has a position in the data of {saved['data']}, and this run trains on those of "
            f"{type(data).__qualname__ if data is not None else 'a loader'}. {_WAY_OUT}"
        )
    if name is not None and callable(check := getattr(data, "check_resumable", None)):
        check(checkpoint[name])


def data_name(trainer: Trainer, checkpoint: Mapping[str, Any]) -> str | None:
    """The key in a checkpoint of the position of the trainer's datamodule; None if there is none."""
    name = type(trainer.datamodule).__qualname__
    return name if trainer.datamodule is not None and name in checkpoint else None


def optimizer_kinds(trainer: Trainer) -> list[str]:
    """The names of the optimizers' classes."""
    return [type(optimizer).__name__ for optimizer in trainer.optimizers]


def check_same_optimizers(saved: list[str], trainer: Trainer) -> None:
    """Check that the optimizers can load the saved optimizer states.

    Raises:
        ConfigError: if their classes differ from those that were saved.
    """
    now = optimizer_kinds(trainer)
    if saved != now:
        raise ConfigError(
            f"the checkpoint has the state of {_listed(saved)}, and this run trains with {_listed(now)}, which cannot "
            f"go on with it. {_WAY_OUT}"
        )


class ChangedRates:
    """Learning rate and weight decay of a resumed run, where they differ from those of the checkpoint. Without this
    class, the restored optimizer state would silently overwrite them.

    Args:
        checkpoint: The checkpoint.
        module: The module, whose hyperparameters `learning_rate` (or `lr`) and `weight_decay` are compared.
    """

    def __init__(self, checkpoint: Mapping[str, Any], module: LightningModule) -> None:
        changed = changed_settings(checkpoint, module)
        names = ("learning_rate", "lr", "weight_decay")
        self._changed = {name: changed[name] for name in names if _are_numbers(changed.get(name))}

    def apply(self, trainer: Trainer) -> None:
        """Apply the changes to the restored optimizers: learning rates are scaled by the ratio of the settings, and
        weight decay is replaced in groups that had the old value."""
        for name, (was, is_) in self._changed.items():
            if name != "weight_decay" and (trainer.lr_scheduler_configs or not was):
                rank_zero_warn(f"{name} was {was} and is {is_}: the scheduler in the checkpoint sets the rate")
                continue
            for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
                if name == "weight_decay":
                    group[name] = is_ if group.get(name) == was else group.get(name, is_)
                else:
                    _scale(group, is_ / was)
            rank_zero_info(f"{name} was {was} and is {is_} from here on.")


def _scale(group: dict[str, Any], factor: float) -> None:
    for name in ("lr", "initial_lr"):
        if isinstance(group.get(name), Tensor):
            group[name].mul_(factor)
        elif name in group:
            group[name] *= factor


def _are_numbers(values: tuple[Any, Any] | None) -> bool:
    return values is not None and all(isinstance(value, int | float) for value in values)


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "no optimizer"
