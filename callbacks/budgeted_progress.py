"""The progress bar of a stage before training, which checks the GPU-hour budget at each update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from lightning.pytorch import Trainer

from sparsefit.callbacks.trainer_lookup import budget_of
from sparsefit.reporting.console import stage_progress


@contextmanager
def paid_progress(trainer: Trainer, description: str, what: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of a stage, and stop it with an error when the budget is used up.

    Args:
        trainer: The trainer of the run.
        description: The text next to the progress bar.
        what: What the budget pays for, as the error message names it.

    Yields:
        `progress(done, total)`, to be called repeatedly; it raises a BudgetError when the budget is used up.
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
            # The check is collective. Ranks may have different numbers of steps, but all of them reach the last one.
            if budget is not None and (trainer.world_size == 1 or done == total):
                budget.check_before(trainer, what)

        yield progress
