"""A warning before a fit computes in a floating-point type for which the processor has no instructions."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cache

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
_SLOW = 4.0  # times as long as in float32


def warn_of_slow_precision(trainer: Trainer, parameters: Iterable[Tensor] = ()) -> None:
    """Warn if the trainer computes in bfloat16 or float16 on a CPU that needs several times as long for it as for
    float32: processors without AVX-512 emulate both. Nothing is measured on another device or in float32.

    Args:
        trainer: A trainer; its precision is looked at.
        parameters: The model's parameters: without autocast, it computes in their dtype.
    """
    if trainer.strategy.root_device.type != "cpu" or not trainer.is_global_zero:
        return
    with trainer.precision_plugin.forward_context():
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    used = {parameter.dtype for parameter in parameters} if autocast is None else {autocast}
    for dtype in used.intersection(_HALF):
        slower, name = slowdown(dtype), str(dtype).removeprefix("torch.")
        if slower > _SLOW:
            rank_zero_warn(
                f"This processor needs {slower:.0f} times as long for a product of matrices in {name} as in float32: "
                "train in float32 (`precision: 32-true` for the trainer, `dtype: float32` for the model), or on a GPU"
            )


@cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a product of matrices takes on this processor; measured once, in less than
    a second.

    >>> slowdown(torch.float32)
    1.0
    """
    return 1.0 if dtype == torch.float32 else _seconds(dtype) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest of a few products of matrices, (128, 256) and (256, 256)."""
    left, right = torch.ones(128, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - start)
    return min(times)
