"""After how many optimizer steps a trainer ends a training."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer


def last_steps(trainer: Trainer, of_epochs: bool = True) -> tuple[float, float]:
    """At which optimizer step training ends, by `max_steps` and by `max_epochs`; infinity where that is not known."""
    by_steps, by_epochs = trainer.max_steps if trainer.max_steps > 0 else math.inf, math.inf
    if of_epochs and 0 < trainer.num_training_batches < math.inf and trainer.max_epochs != -1:
        by_epochs = max(trainer.max_epochs, 1) * _steps_of_epoch(trainer)
    return by_steps, by_epochs


def steps_done_here(trainer: Trainer) -> int:
    """Optimizer steps that as many epochs and batches take on the devices of now, whatever others have taken."""
    batches = trainer.fit_loop.batch_idx + 1
    return trainer.current_epoch * _steps_of_epoch(trainer) + batches // trainer.accumulate_grad_batches


def _steps_of_epoch(trainer: Trainer) -> int:
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
