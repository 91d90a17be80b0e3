"""Looks up the budget, the GPU-hour ledger and the masks of a trainer."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from sparsefit.callbacks.budget import GPUHourBudget
from sparsefit.pruning import MaskSet
from sparsefit.recovery.ledger import GPUHourLedger

_ledgers: WeakKeyDictionary[Trainer, GPUHourLedger] = WeakKeyDictionary()


def budget_of(trainer: Trainer) -> GPUHourBudget | None:
    """The first GPUHourBudget among the trainer's callbacks, or None."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, GPUHourBudget)), None)


def ledger_of(trainer: Trainer) -> GPUHourLedger:
    """The ledger that a trainer's callbacks charge their stages to.

    With a GPUHourBudget this is the budget's ledger; the call starts it if the budget's `setup` has not run yet.
    Otherwise each trainer has a ledger of its own, which starts with the first call and charges time outside all stages
    to "fit".
    """
    budget = budget_of(trainer)
    if budget is not None:
        if trainer.state.fn == TrainerFn.FITTING and not budget.ledger.started:
            budget.ledger.start(trainer.world_size)
        return budget.ledger
    if trainer not in _ledgers:
        _ledgers[trainer] = GPUHourLedger(base_stage="fit")
        _ledgers[trainer].start(trainer.world_size)
    return _ledgers[trainer]


def masks_of(trainer: Trainer) -> MaskSet | None:
    """The masks held by a callback of the trainer, or None before pruning."""
    return next((c.masks for c in trainer.callbacks if isinstance(getattr(c, "masks", None), MaskSet)), None)
