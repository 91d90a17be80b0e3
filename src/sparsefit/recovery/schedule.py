"""The learning rate schedule of a run with a budget: a short warm-up, then linear decay to zero at its end.

Li, Yumer, Ramanan: Budgeted Training, 2020 (https://arxiv.org/abs/1905.04753): of the schedules they compare, a linear
decay that reaches zero when the budget ends is the best and needs no tuning.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def budget_factor(step: int, warmup_steps: int, progress: float) -> float:
    """The factor of the base learning rate: linear warm-up times linear decay (https://arxiv.org/abs/1905.04753).

    Args:
        step: Optimizer steps taken so far; the first step, number 0, has 1/warmup_steps of the rate, not zero.
        warmup_steps: The step with this number (counted from 1) is the first at full rate; 0 or 1: no warm-up.
        progress: How much of the budget or of the steps is used up, from 0 to 1.

    Returns:
        A number from 0 to 1.
    """
    warmup = min((step + 1) / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
    return warmup * (1.0 - min(max(progress, 0.0), 1.0))


def keep_base_rates(optimizers: Iterable[Optimizer], factor: float | None = None) -> None:
    """Store the base rate of each parameter group as its "initial_lr", which optimizers save and restore.

    Args:
        optimizers: Groups that have an "initial_lr" already, for instance from a checkpoint, keep it.
        factor: The current factor of the optimizer's other groups. A new group then keeps its current rate for this
            step and decays from it. None or 0: the current rate is the base rate.
    """
    for group in _groups(optimizers):
        if "initial_lr" not in group:
            group["initial_lr"] = float(group["lr"]) / (factor or 1.0)


def set_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set the learning rate of each parameter group to `factor` times its "initial_lr"."""
    for group in _groups(optimizers):
        rate = float(group["initial_lr"]) * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def first_rate(optimizers: Iterable[Optimizer]) -> float | None:
    """The learning rate of the first parameter group that has one; None if none has."""
    return next((float(group["lr"]) for group in _groups(optimizers)), None)


def _groups(optimizers: Iterable[Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups if "lr" in group]
