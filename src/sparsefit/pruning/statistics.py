"""What calibration keeps of a layer's inputs. Statistics add up: over batches, layers that share a weight, ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sparsefit.pruning.ranks import add_up, from_all

KINDS = ("squared_norm", "abs_sum", "abs_max", "gram")
"""What can be accumulated: for each input feature its squared l2 norm, l1 norm and largest absolute value, all (in,),
and the Gram matrix X^T X, (in, in)."""

DERIVED = {"inverse_diagonal": "gram"}
"""What is computed at the end, and from what."""


class InputStatistics:
    """Statistics of the inputs of a layer over all calibration tokens, accumulated in float32.

    Args:
        features: Width of the inputs.
        device: Where they are accumulated.
        kinds: Which of `KINDS`; the squared norm is always among them.

    Attributes:
        tokens: How many tokens (rows of the input matrix) were seen.
    """

    def __init__(self, features: int, device: torch.device, kinds: Iterable[str] = ("squared_norm",)) -> None:
        shapes = {kind: (features, features) if kind == "gram" else (features,) for kind in {"squared_norm", *kinds}}
        self._sums = {kind: torch.zeros(shapes[kind], dtype=torch.float32, device=device) for kind in sorted(shapes)}
        self.tokens = 0

    def __getitem__(self, kind: str) -> Tensor:
        """A statistic by its name in `KINDS`, float32."""
        return self._sums[kind]

    def add(self, inputs: Tensor) -> Tensor:
        """Add (tokens, in) further inputs of any floating dtype.

        Returns:
            (in,) their squared norms alone: finite if and only if no input is NaN or too large.
        """
        norms = squared_norms(inputs)
        device = self._sums["squared_norm"].device
        self._sums["squared_norm"] += norms.to(device)
        if "abs_sum" in self._sums:
            self._sums["abs_sum"] += torch.linalg.vector_norm(inputs, 1, dim=0, dtype=torch.float32).to(device)
        if "abs_max" in self._sums and len(inputs):
            largest = inputs.abs().amax(dim=0).float().to(device)
            torch.maximum(self._sums["abs_max"], largest, out=self._sums["abs_max"])
        if "gram" in self._sums:
            values = inputs.float().to(device)
            self._sums["gram"].addmm_(values.t(), values)
        self.tokens += len(inputs)
        return norms

    def merge(self, other: InputStatistics) -> None:
        """Add what other statistics of the same kinds have seen."""
        for kind, values in other._sums.items():
            mine = self._sums[kind]
            if kind == "abs_max":
                torch.maximum(mine, values.to(mine.device), out=mine)
            else:
                mine += values.to(mine.device)
        self.tokens += other.tokens

    def reduce_over_ranks(self) -> None:
        """Add up what every rank of a distributed run has seen; does nothing in a single process."""
        for kind, values in self._sums.items():
            add_up(values, largest=kind == "abs_max")
        self.tokens = sum(from_all(self.tokens))


def squared_norms(inputs: Tensor) -> Tensor:
    """Sum over tokens of the squares of (tokens, in) inputs, in float32: (in,)."""
    total = torch.zeros(inputs.shape[1], device=inputs.device)
    # A CPU keeps the squares of so many inputs in its cache; a GPU takes them at once.
    rows = max(1, 2**18 // inputs.shape[1]) if inputs.device.type == "cpu" else max(1, len(inputs))
    for some in inputs.split(rows):
        total += some.float().square().sum(dim=0)
    return total
