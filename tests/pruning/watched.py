"""What is recorded while parameters are watched, and weights that all matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparsefit.pruning.fused import FusedInputs


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and biases that all matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def watch(parameters: list[nn.Parameter], run: Callable[[], Any]) -> tuple[Any, list[tuple[Any, ...]]]:
    """What a run gives while the parameters are watched, and copies of what was recorded."""
    records = []
    with torch.no_grad(), FusedInputs(parameters, lambda p, i, rows, x: records.append((p, i, rows, x.clone()))):
        return run(), records
