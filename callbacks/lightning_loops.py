"""All that touches the inside of Lightning's loops: where a run is in them, and the end of a run.

Lightning goes on exactly from what its loops say at a few moments. A `Position` is noted at each of them, and whatever
is saved stands at the last one, wherever the run is:

| noted                                             | what is saved from then on has                              |
|---------------------------------------------------|-------------------------------------------------------------|
| as training begins                                | no numbers                                                  |
| at the end of a batch that took an optimizer step | Lightning's, as they are in `on_train_batch_end`            |
| at the end of a validation that followed a step   | Lightning's, as they are in `on_validation_end`             |
| at any of these, if no batch of an epoch is left  | those of a run that is about to begin the next epoch        |
| and at the end of such an epoch                   |                                                             |
| as a checkpoint is read                           | the checkpoint's, as long as no step has been taken from it |

So what is saved amid the batches of a step, by an interrupt, or after training was stopped amid an epoch stands at the
end of a step. A validation that is broken off is not made up for.

Two of these are not Lightning's own numbers. It takes loops that have begun nothing for ones that have just done a
batch. And what it does with those of an epoch that has ended depends on `max_steps`, on whether there is a validation
and on whether the data have a length: it may train the first batch of the next epoch as one of this, or ask for the
data twice.

A run that has no step left to take would be skipped as a whole, with the hooks that close it: `reopen` has it begin,
and `end_now` has it end there.
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
"""What ends a run: the most steps and epochs, and the budget."""


def limits_of(trainer: Trainer) -> Limits:
    """What ends a run of this trainer."""
    budget = budget_of(trainer)
    gpu_hours = None if budget is None else float(budget.gpu_hours)
    return {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs, "gpu_hours": gpu_hours}


def limits_reached(trainer: Trainer, checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has taken all steps or epochs of a trainer, so that Lightning would skip its training."""
    epochs = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {})
    limits = ((checkpoint["global_step"], trainer.max_steps), (epochs.get("processed", 0), trainer.max_epochs))
    return any(limit is not None and 0 < limit <= reached for reached, limit in limits)


def reopen(trainer: Trainer) -> Limits:
    """Have a run begin that would be skipped; returns the limits for `end_now`."""
    limits = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
    trainer.fit_loop.epoch_loop.max_steps = trainer.fit_loop.max_epochs = sys.maxsize
    return limits


def end_now(trainer: Trainer, limits: Limits | None) -> None:
    """Have a run end before its next batch, by the limits that were lifted."""
    if limits is not None:
        trainer.fit_loop.epoch_loop.max_steps = limits["max_steps"]
        trainer.fit_loop.max_epochs = limits["max_epochs"]
    trainer.should_stop = True


def count_anew(loops: dict[str, Any], batches: int | None) -> None:
    """Have loops that were saved amid an epoch count so many batches of it as done; None begins the next epoch.

    Args:
        loops: The state of a fit loop, changed in place.
        batches: Of each device, where there are as many as now.
    """
    if batches is None:
        _begin_next_epoch(loops)
        return
    progress = loops["epoch_loop.batch_progress"]
    more = batches - progress["current"]["ready"]
    for part in ("current", "total"):
        progress[part] = {name: count + more for name, count in progress[part].items()}
    loops["state_dict"] = {}  # of loaders that have one: it is that of another device's share


@dataclass(frozen=True)
class Position:
    """Where a run is, at a moment from which Lightning goes on exactly.

    Attributes:
        loops: The state of the fit loop; None at the start.
        data: That of the data module; None if it has none.
        random: The random numbers.
        between_epochs: Whether the data of an epoch are asked for next, which may draw from these.
        whole_step: Whether the weights saved with it are those of this moment.
        training: At the start, the random numbers once the data were asked for, which may have been before calibration.
    """

    loops: dict[str, Any] | None
    data: dict[str, Any] | None
    random: RandomStates
    between_epochs: bool
    whole_step: bool = True
    training: RandomStates | None = None

    @classmethod
    def now(cls, trainer: Trainer, random: RandomStates) -> Position:
        """At this moment, which must be one of the table above."""
        loops, ended = trainer.fit_loop.state_dict(), epoch_has_ended(trainer)
        loops["state_dict"] = deepcopy(loops["state_dict"])  # of loaders that have one; all else are copies
        if ended:
            _begin_next_epoch(loops)
        return cls(loops, _data_state(trainer), random, between_epochs=ended)

    @classmethod
    def at_start(cls, trainer: Trainer, random: RandomStates, training: RandomStates | None = None) -> Position:
        """Before any batch of this fit; another fit of the same trainer may have come before it."""
        loops = trainer.fit_loop.state_dict() if trainer.global_step > 0 else None
        return cls(loops, _data_state(trainer), random, between_epochs=True, training=training)

    def write(self, checkpoint: dict[str, Any], data_name: str | None) -> None:
        """Have a checkpoint stand here."""
        if self.loops is None:
            checkpoint.pop("loops", None)
        else:
            checkpoint["loops"]["fit_loop"] = self.loops
        if data_name is not None and self.data is not None:
            checkpoint[data_name] = self.data


def epoch_has_ended(trainer: Trainer) -> bool:
    """Whether all batches of an epoch are done, in the hooks at the end of a batch, a validation or an epoch."""
    batches = trainer.fit_loop.epoch_loop.batch_progress
    return batches.is_last_batch or batches.current.ready == trainer.num_training_batches


def at_batch_end(trainer: Trainer) -> bool:
    """Whether callbacks are just being told of the end of a batch."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current
    return batches.ready == batches.processed > batches.completed


def _data_state(trainer: Trainer) -> dict[str, Any] | None:
    return None if trainer.datamodule is None else deepcopy(trainer.datamodule.state_dict()) or None


def _begin_next_epoch(loops: dict[str, Any]) -> None:
    """Have loops that are at the end of an epoch stand before the next one."""
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    if epochs["current"]["processed"] < epochs["current"]["started"]:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1  # the step that loggers are told
    for part in ("current", "total"):
        epochs[part] = dict.fromkeys(epochs[part], epochs[part]["started"])
        batches[part] = dict.fromkeys(batches[part], batches[part]["ready"] if part == "total" else 0)
    batches["is_last_batch"] = False
    loops["state_dict"] = {}  # loaders that have a state are at their end, and begin anew
