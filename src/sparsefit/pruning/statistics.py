"""Statistics of a layer's inputs. They are summed over batches, layers that share a weight, and ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from sparsefit.pruning.gram import precise_dtype
from sparsefit.ranks import add_up, from_all

KINDS = ("squared_norm", "abs_sum", "abs_max", "gram")
"""What can be accumulated: for each input feature its squared l2 norm, l1 norm and largest absolute value, all (in,),
and the Gram matrix X^T X, (in, in)."""
DERIVED = {"inverse_diagonal": "gram"}
"""What is computed from accumulated statistics at the end, and from which."""


def all_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite; allocates no temporary of the tensor's size.

    >>> all_finite(torch.tensor([1.0, torch.inf]))
    False
    """
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())


class InputStatistics:
    """Statistics of `KINDS`, always including the squared norm, over the tokens of a layer's inputs; read as float32.

    Sums over micro-batches are accumulated in float64 (float32 on Apple's GPUs). Rounded to float32 they do not depend
    on the order of the micro-batches, nor on how these are divided among ranks.

    >>> statistics = InputStatistics(2, torch.device("cpu"))
    >>> statistics.add(torch.tensor([[3.0, 1.0], [4.0, 1.0]]))
    >>> statistics["squared_norm"]
    tensor([25.,  2.])
    """

    def __init__(self, features: int, device: torch.device, kinds: Iterable[str] = ("squared_norm",)) -> None:
        shapes = {kind: (features, features) if kind == "gram" else (features,) for kind in {"squared_norm", *kinds}}
        dtype = precise_dtype(device)
        self._sums = {kind: torch.zeros(shapes[kind], dtype=dtype, device=device) for kind in sorted(shapes)}
        self.tokens = 0

    def __getitem__(self, kind: str) -> Tensor:
        return self._sums[kind].float()

    def has(self, kind: str) -> bool:
        """Whether a kind of statistic is accumulated."""
        return kind in self._sums

    def add(self, inputs: Tensor) -> None:
        """Add (tokens, in) inputs of any floating dtype."""
        device = self._sums["squared_norm"].device
        self._sums["squared_norm"] += _squared_norms(inputs).to(device)
        if "abs_sum" in self._sums:
            self._sums["abs_sum"] += torch.linalg.vector_norm(inputs, 1, dim=0, dtype=torch.float32).to(device)
        if "abs_max" in self._sums and len(inputs):
            largest = self._sums["abs_max"]
            torch.maximum(largest, inputs.abs().amax(dim=0).to(largest), out=largest)
        if "gram" in self._sums:
            self._sums["gram"] += _gram(inputs.to(device))
        self.tokens += len(inputs)

    def merge(self, other: InputStatistics) -> None:
        """Add other statistics of the same kinds."""
        for kind, values in other._sums.items():
            mine = self._sums[kind]
            torch.maximum(mine, values, out=mine) if kind == "abs_max" else mine.add_(values)
        self.tokens += other.tokens

    def columns(self, order: Tensor) -> InputStatistics:
        """A copy with the input features reordered."""
        other = copy.copy(self)
        other._sums = {kind: values[order] for kind, values in self._sums.items()}
        if "gram" in other._sums:
            other._sums["gram"] = other._sums["gram"][:, order]
        return other

    def reduce_over_ranks(self) -> None:
        """Sum the statistics over all ranks of a distributed run; does nothing in a single process."""
        for kind, values in self._sums.items():
            add_up(values, largest=kind == "abs_max")
        self.tokens = sum(from_all(self.tokens))


def _squared_norms(inputs: Tensor) -> Tensor:
    """Sum over tokens of the squares of (tokens, in) inputs: (in,)."""
    if inputs.device.type != "cpu":  # one kernel, and no copy in float32
        return torch.linalg.vector_norm(inputs, 2, dim=0, dtype=torch.float32).square_()
    total = torch.zeros(inputs.shape[1], dtype=torch.float64)
    rows = max(1, 2**18 // inputs.shape[1])  # so that the squares stay in the cache
    for some in inputs.split(rows):
        total += some.float().square().sum(dim=0)
    return total


def _gram(inputs: Tensor) -> Tensor:
    """X^T X of (tokens, in) inputs: (in, in), float32."""
    # A GPU multiplies half-precision inputs directly: their products are exact in float32, in which they are summed.
    if inputs.device.type == "cuda" and inputs.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(inputs.t(), inputs, out_dtype=torch.float32)
    values = inputs.float()
    return values.t() @ values
