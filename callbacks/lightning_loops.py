"""All that touches the inside of Lightning's loops: where a checkpoint stands in them, and the end of a run.

Lightning resumes exactly from what its loops note at the end of a batch, and of an epoch. Saved anywhere else, its
numbers are led back to such a point:

| saved                                                   | stands at                    | by             |
|---------------------------------------------------------|------------------------------|----------------|
| as training begins                                      | the start: no numbers at all | `at_the_start` |
| at the end of a batch that took a step, or of an epoch  | where it is                  | -              |
| amid the batches of a step; in a step, by an interrupt  | the end of the step before   | `move`         |
| before the first batch of an epoch, by an interrupt     | the end of the epoch before  | `close_epoch`  |
| after the last batch of data that have no length        | the end of that epoch        | `close_epoch`  |
| after training was stopped within an epoch              | within that epoch            | `close_epoch`  |
| before a resumed run has done a batch                   | where it was resumed from    | (as it was)    |

A run that has no step left to take would be skipped as a whole, with the hooks that close it: `reopen` has it begin,
and `end_now` has it end there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from sparsefit.callbacks.ledgers import budget_of

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


def at_the_start(checkpoint: dict[str, Any]) -> None:
    """Have a checkpoint that was saved as training begins stand at the start. Lightning would take loops that have
    begun nothing for ones that are at the end of a batch."""
    del checkpoint["loops"]


def batches_of(trainer: Trainer) -> Any:
    """The progress of the batches of an epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress


def move(trainer: Trainer, checkpoint: dict[str, Any], batches: int) -> bool:
    """Have a checkpoint stand where so many batches of the epoch are done; whether its data can be moved, too."""
    data, loops = trainer.datamodule, checkpoint["loops"]["fit_loop"]
    data_state = type(data).__qualname__
    if "combined_loader" in loops["state_dict"] or (data_state in checkpoint and not hasattr(data, "state_after")):
        return False
    if data_state in checkpoint:
        checkpoint[data_state] = data.state_after(batches)
    progress = loops["epoch_loop.batch_progress"]
    before = progress["total"]["processed"] - progress["current"]["processed"]
    for part, done in (("current", batches), ("total", before + batches)):
        progress[part] = {name: done for name in progress[part]}
    progress["is_last_batch"] &= batches >= batches_of(trainer).current.ready
    return True


def close_epoch(checkpoint: dict[str, Any], ended: bool, endless: bool) -> None:
    """Have a checkpoint between two epochs stand at the end of the first one, wherever it was saved. Lightning would
    take the second for done where that was about to begin, and count its batches on from those of the first one where
    that had just trained on its last batch (it knows the end of data that have a length). And have one that was saved
    after training had stopped within an epoch stand within it: Lightning counts it as completed."""
    loops = checkpoint["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    begun = epochs["current"]["started"]
    if epochs["current"]["ready"] > begun > 0:
        for part in ("current", "total"):
            done = epochs[part]["processed"]
            epochs[part] |= {"ready": done, "started": done, "completed": done - 1}
    elif ended and endless and epochs["current"]["processed"] < begun:
        for part in ("current", "total"):
            epochs[part] |= {"processed": epochs[part]["started"]}
            batches[part] |= {"completed": batches[part]["processed"]}
    elif not ended and batches["current"]["processed"] and epochs["current"]["completed"] == begun:
        for part in ("current", "total"):
            epochs[part]["completed"] -= 1
