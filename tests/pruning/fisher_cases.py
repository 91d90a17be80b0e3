"""A small classifier, its data and its weights, for the tests of allocation "fisher"."""

from __future__ import annotations

import torch
from torch import nn

from sparsefit import PruningConfig
from sparsefit.calibration.batches import MicroBatch
from sparsefit.pruning.layers import matrices_of

FISHER = PruningConfig(0.5, allocation="fisher")
IDS = torch.randint(3, 61, (6, 12), generator=torch.Generator().manual_seed(1))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).eval()


def weights_of(model: nn.Module) -> list:
    return [weight for name, module in model.named_modules() for weight in matrices_of(module, name)]


def smallest_half(model: nn.Module) -> dict[str, torch.Tensor]:
    matrices = {weight.name: weight.matrix() for weight in weights_of(model)}
    return {name: matrix.abs() < matrix.abs().median(1, keepdim=True).values for name, matrix in matrices.items()}


def micro_batches(inputs: torch.Tensor) -> list[MicroBatch]:
    return [MicroBatch(part, (0,) * len(part)) for part in inputs.split(8)]


def counts_of(result) -> dict[str, int]:
    return {name: int((~mask).sum()) for name, mask in result.masks.items()}
