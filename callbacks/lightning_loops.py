"""The callbacks' code that depends on the internals of Lightning's loops: the position of a run, and ending a run.

Lightning resumes exactly only from the loop state of a few moments. A `Position` is recorded at each of these, and a
checkpoint always holds the last recorded position, whenever it is saved:

| recorded                                          | loop state in the checkpoints that follow                   |
|---------------------------------------------------|-------------------------------------------------------------|
| when training begins                              | none                                                        |
| at the end of a batch that took an optimizer step | Lightning's, as it is in `on_train_batch_end`               |
| at the end of a validation that followed a step   | Lightning's, as it is in `on_validation_end`                |
| at any of these, if no batch of an epoch is left, | that of a run that is about to begin the next epoch         |
| and at the end of such an epoch                   |                                                             |
| when a checkpoint is read                         | that of the checkpoint, until the first step after it       |

So a checkpoint that is saved between the batches of a step, by an interrupt, or after training stopped within an epoch
holds the position at the end of a step. An interrupted validation is not repeated.

Two of these states differ from Lightning's own. Lightning treats loops that have not started like loops that have just
done a batch. What it does with the loops of an epoch that has ended depends on `max_steps`, on whether there is a
validation and on whether the data have a length: it may count the first batch of the next epoch to this one, or ask
for the data twice.

Lightning skips a run that has no step left, including the hooks at its end: `reopen` lets such a run begin, and
`end_now` ends it there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from sparsefit.callbacks.random_states import RandomStates
from sparsefit.callbacks.trainer_lookup import budget_of

Limits = dict[str, Any]
"""The limits that end a run: steps, epochs and GPU-hours."""


def limits_of(trainer: Trainer) -> Limits:
    """The limits of a trainer: steps, epochs and, with a `GPUHourBudget`, GPU-hours."""
    budget = budget_of(trainer)
    gpu_hours = None if budget is None else float(budget.gpu_hours)
    return {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs, "gpu_hours": gpu_hours}


def limits_reached(trainer: Trainer, checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has taken all steps or epochs of a trainer, so that Lightning would skip its training."""
    epochs = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {})
    limits = ((checkpoint["global_step"], trainer.max_steps), (epochs.get("processed", 0), trainer.max_epochs))
    return any(limit is not None and 0 < limit <= reached for reached, limit in limits)


def reopen(trainer: Trainer) -> Limits:
    """Lift the limits of a run that Lightning would skip; returns them for `end_now`."""
    limits = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
    trainer.fit_loop.epoch_loop.max_steps = trainer.fit_loop.max_epochs = sys.maxsize
    return limits


def end_now(trainer: Trainer, limits: Limits | None) -> None:
    """Restore the limits that `reopen` lifted, and end the run before its next batch."""
    if limits is not None:
        trainer.fit_loop.epoch_loop.max_steps = limits["max_steps"]
        trainer.fit_loop.max_epochs = limits["max_epochs"]
    trainer.should_stop = True


def set_batches_done(loops: dict[str, Any], batches: int | None) -> None:
    """Set the number of batches done in the epoch in a saved loop state.

    Args:
        loops: The state of a fit loop that was saved within an epoch; changed in place.
        batches: Batches done by each of the current devices; None moves to the beginning of the next epoch.
    """
    if batches is None:
        _begin_next_epoch(loops)
        return
    progress = loops["epoch_loop.batch_progress"]
    more = batches - progress["current"]["ready"]
    for part in ("current", "total"):
        progress[part] = {name: count + more for name, count in progress[part].items()}
    loops["state_dict"] = {}  # drop the state of stateful loaders: it belongs to another number of devices


@dataclass(frozen=True)
class Position:
    """The position of a run at a moment from which Lightning resumes exactly.

    Attributes:
        loops: The state of the fit loop; None at the start.
        data: The state of the datamodule; None if it has none.
        random: The random states.
        between_epochs: Whether the next action is to start an epoch of the data, which may draw random numbers.
        whole_step: Whether the weights saved with the position belong to it.
        training: At the start of training, the random states at that moment; `random` is then the state before the
            loader drew, which may have been before calibration.
    """

    loops: dict[str, Any] | None
    data: dict[str, Any] | None
    random: RandomStates
    between_epochs: bool
    whole_step: bool = True
    training: RandomStates | None = None

    @classmethod
    def now(cls, trainer: Trainer, random: RandomStates) -> Position:
        """The current position; must be called at one of the moments in the table above."""
        loops, ended = trainer.fit_loop.state_dict(), epoch_has_ended(trainer)
        loops["state_dict"] = deepcopy(loops["state_dict"])  # state of stateful loaders; the rest is copied already
        if ended:
            _begin_next_epoch(loops)
        return cls(loops, _data_state(trainer), random, between_epochs=ended)

    @classmethod
    def at_start(cls, trainer: Trainer, random: RandomStates, training: RandomStates | None = None) -> Position:
        """The position before the first batch of this fit; the trainer may have run an earlier fit."""
        loops = trainer.fit_loop.state_dict() if trainer.global_step > 0 else None
        return cls(loops, _data_state(trainer), random, between_epochs=True, training=training)

    def write(self, checkpoint: dict[str, Any], data_name: str | None) -> None:
        """Write this position into a checkpoint."""
        if self.loops is None:
            checkpoint.pop("loops", None)
        else:
            checkpoint["loops"]["fit_loop"] = self.loops
        if data_name is not None and self.data is not None:
            checkpoint[data_name] = self.data


def epoch_has_ended(trainer: Trainer) -> bool:
    """Whether all batches of the epoch are done; valid in the hooks at the end of a batch, a validation or an epoch."""
    batches = trainer.fit_loop.epoch_loop.batch_progress
    return batches.is_last_batch or batches.current.ready == trainer.num_training_batches


def at_batch_end(trainer: Trainer) -> bool:
    """Whether the trainer is calling `on_train_batch_end` at this moment."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current
    return batches.ready == batches.processed > batches.completed


def _data_state(trainer: Trainer) -> dict[str, Any] | None:
    return None if trainer.datamodule is None else deepcopy(trainer.datamodule.state_dict()) or None


def _begin_next_epoch(loops: dict[str, Any]) -> None:
    """Move a loop state from the end of an epoch to the beginning of the next one, in place."""
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    if epochs["current"]["processed"] < epochs["current"]["started"]:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1  # the step number that loggers get
    for part in ("current", "total"):
        epochs[part] = dict.fromkeys(epochs[part], epochs[part]["started"])
        batches[part] = dict.fromkeys(batches[part], batches[part]["ready"] if part == "total" else 0)
    batches["is_last_batch"] = False
    loops["state_dict"] = {}  # stateful loaders are at their end and start again
