"""The progress of a stage before training, which ends where the budget cannot pay for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from lightning.pytorch import Trainer

from sparsefit.callbacks.trainer_lookup import budget_of
from sparsefit.reporting.console import stage_progress


@contextmanager
def paid_progress(trainer: Trainer, description: str, what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows the progress of a stage, and ends it where the budget cannot pay for it.

    Args:
        trainer: The trainer of the run.
        description: What is being done, as it is shown.
        what: What the budget is to pay for, as its error says it.

    Yields:
        `progress(done, total)`, to be called as the stage goes on; it raises a BudgetError.
    """
    budget = budget_of(trainer)
    with ExitStack() as stack:
        shown: list[Callable[..., None]] = []
        last = 0

        def progress(done: int, total: int) -> None:
            nonlocal last
            if not shown:
                bar = stage_progress(description, total, visible=trainer.is_global_zero)
                shown.append(stack.enter_context(bar))
            shown[0](done - last)
            last = done
            # Ranks may have different numbers of steps, but all come to the last one.
            if budget is not None and (trainer.world_size == 1 or done == total):
                budget.check_before(trainer, what)

        yield progress
