"""Records the products of watched weights, and creates weights that all matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsefit.pruning.input_watch import Seen, watching
from sparsefit.pruning.layers import matrices_of
from sparsefit.pruning.layers.base import PrunableWeight


class Record(NamedTuple):
    """A weight's name, its rows, the input tensor of the product, and the matrix's inputs, (tokens, in)."""

    name: str
    rows: tuple[int, int] | None
    inputs: Tensor
    tokens: Tensor


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a module random weights and biases that all matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def weights_of(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Module) -> list:
    """The weights of all modules of a kind, with their names in the model."""
    return [w for name, m in model.named_modules() if isinstance(m, kind) for w in matrices_of(m, name)]


def watch(weights: Iterable[PrunableWeight], run: Callable[[], Any]) -> tuple[Any, list[Record]]:
    """The output of a run with watched weights, and copies of the recorded products."""
    records = []

    def record(seen: Seen) -> None:
        records.append(Record(seen.weight.name, seen.rows, seen.inputs.clone(), torch.cat(list(seen.tokens())).clone()))

    with torch.no_grad(), watching(weights, record):
        return run(), records
