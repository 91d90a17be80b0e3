"""Finding the budget, the ledger and the masks of a trainer, for the callbacks that work with them."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from sparsefit.callbacks.budget import GPUHourBudget
from sparsefit.pruning import MaskSet
from sparsefit.recovery.ledger import GPUHourLedger

_ledgers: WeakKeyDictionary[Trainer, GPUHourLedger] = WeakKeyDictionary()


def budget_of(trainer: Trainer) -> GPUHourBudget | None:
    """The GPUHourBudget among the trainer's callbacks, or None."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, GPUHourBudget)), None)


def ledger_of(trainer: Trainer) -> GPUHourLedger:
    """The ledger that a trainer's callbacks charge their stages to.

    With a GPUHourBudget it is the budget's, started by this call if its own `setup` has not run yet. Without one it is
    kept for the trainer, runs from the first call on, and charges time outside every stage to "fit".
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
    """The masks that a callback of the trainer holds, or None while there are none."""
    return next((c.masks for c in trainer.callbacks if isinstance(getattr(c, "masks", None), MaskSet)), None)
