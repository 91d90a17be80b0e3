"""The number of optimizer steps after which a trainer ends training."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer


def last_steps(trainer: Trainer, of_epochs: bool = True) -> tuple[float, float]:
    """The optimizer step at which training ends, by `max_steps` and by `max_epochs`; infinity where unknown."""
    by_steps, by_epochs = trainer.max_steps if trainer.max_steps > 0 else math.inf, math.inf
    if of_epochs and 0 < trainer.num_training_batches < math.inf and trainer.max_epochs != -1:
        by_epochs = max(trainer.max_epochs, 1) * _steps_of_epoch(trainer)
    return by_steps, by_epochs


def steps_done_here(trainer: Trainer) -> int:
    """Optimizer steps that the epochs and batches done so far take on the current number of devices.

    Differs from `global_step` if part of the run was on another number of devices.
    """
    batches = trainer.fit_loop.batch_idx + 1
    return trainer.current_epoch * _steps_of_epoch(trainer) + batches // trainer.accumulate_grad_batches


def _steps_of_epoch(trainer: Trainer) -> int:
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
