"""What is looked at, and what is taken over, when a run goes on from a checkpoint."""

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
"""Of what `SparseCheckpoints` adds to a checkpoint."""

_WAY_OUT = "Resume with the settings of its run (config.yaml in the run folder), or start a new run in another folder"


def check_same_run(checkpoint: Mapping[str, Any], saved: Mapping[str, Any], trainer: Trainer, path: str | Path) -> None:
    """See that this version reads a checkpoint, and that a fit goes on with its data.

    Args:
        checkpoint: As it was read, before it is filled up and anything is restored.
        saved: What `SparseCheckpoints` added to it.
        trainer: Of this run.
        path: Where the checkpoint was read.

    Raises:
        ConfigError: if it cannot, or they are others; says which.
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
    """The key in a checkpoint under which the trainer's datamodule has its position; None where it has none."""
    name = type(trainer.datamodule).__qualname__
    return name if trainer.datamodule is not None and name in checkpoint else None


def optimizer_kinds(trainer: Trainer) -> list[str]:
    """The names of the optimizers' classes."""
    return [type(optimizer).__name__ for optimizer in trainer.optimizers]


def check_same_optimizers(saved: list[str], trainer: Trainer) -> None:
    """See that the optimizers can go on with the states of those that were saved.

    Raises:
        ConfigError: if they are of other kinds.
    """
    now = optimizer_kinds(trainer)
    if saved != now:
        raise ConfigError(
            f"the checkpoint has the state of {_listed(saved)}, and this run trains with {_listed(now)}, which cannot "
            f"go on with it. {_WAY_OUT}"
        )


class ChangedRates:
    """Learning rate and weight decay that a run is resumed with, where they are others than the checkpoint's: what
    an optimizer restores would silently take their places.

    Args:
        checkpoint: The checkpoint.
        module: The module, whose hyperparameters `learning_rate` (or `lr`) and `weight_decay` count.
    """

    def __init__(self, checkpoint: Mapping[str, Any], module: LightningModule) -> None:
        changed = changed_settings(checkpoint, module)
        names = ("learning_rate", "lr", "weight_decay")
        self._changed = {name: changed[name] for name in names if _are_numbers(changed.get(name))}

    def apply(self, trainer: Trainer) -> None:
        """Set them in the optimizers, once these are restored: rates in the proportion in which the setting changed,
        and weight decay where it was as the setting says."""
        for name, (was, is_) in self._changed.items():
            if name != "weight_decay" and (trainer.lr_scheduler_configs or not was):
                rank_zero_warn(f"{name} was {was} and is {is_}: the run goes on as the checkpoint's scheduler says")
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
