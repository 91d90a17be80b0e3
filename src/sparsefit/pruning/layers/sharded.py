"""Weights of which each rank holds a shard (FSDP2): they are read whole, and each rank writes what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sparsefit.pruning.layers.base import PrunableWeight, as_matrix, stored_view
from sparsefit.sharded import is_sharded, over_shards, shard_of


@dataclass(frozen=True, eq=False)
class ShardedWeight(PrunableWeight):
    """A weight that is split by the first dimension of its parameter: by rows, where that is stored (out, in).

    Attributes:
        own: The name of the parameter in its layer, which has a plain one in its place while it computes.
    """

    own: str = ""

    @property
    def view(self) -> Tensor:
        """The rows (or columns, where stored transposed) that this rank holds, where they are; maybe none."""
        held = shard_of(self.parameter)
        if self.index is not None:  # of a stack each rank holds some of the matrices
            start = self.index - self._start if self._holds_index else len(held)
            held = held[start : start + 1].flatten(0, 1)
        return stored_view(held, self.transposed)

    @property
    def in_product(self) -> Tensor:
        """The whole weight where a product finds it, or nothing while it is not gathered."""
        gathered = self.layers[0].get_parameter(self.own).detach()
        return gathered.new_empty(0) if is_sharded(gathered) else stored_view(gathered, self.transposed, self.index)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the whole."""
        out, inputs = as_matrix(self._shape_alone, self.transposed, self.index).shape
        return out, inputs

    def matrix(self) -> Tensor:
        """The whole weight, (out, in): a copy. All ranks ask for it together."""
        if self.index is None:
            return as_matrix(self.parameter.detach().full_tensor(), self.transposed)
        shape, group = self.parameter.shape[1:], self.parameter.device_mesh.get_group()
        held = stored_view(self.view, self.transposed)
        one = held.contiguous() if self._holds_index else held.new_empty(shape)
        dist.broadcast(one, dist.get_global_rank(group, self.index // self._each), group)
        return stored_view(one, self.transposed)

    def part(self, matrix: Tensor) -> Tensor:
        """What of an (out, in) tensor belongs to the weights that this rank holds."""
        stored = stored_view(matrix, self.transposed)
        if self.index is None:
            stored = stored[self._start : self._start + len(shard_of(self.parameter))]
        elif not self._holds_index:
            stored = stored[:0]
        return stored_view(stored, self.transposed)

    @property
    def _shape_alone(self) -> Tensor:
        return torch.empty(self.parameter.shape, device="meta")

    @property
    def _each(self) -> int:
        """How many of the first dimension a rank holds; the last ones hold what is left."""
        return -(-len(self.parameter) // self.parameter.device_mesh.size())

    @property
    def _start(self) -> int:
        return self._each * self.parameter.device_mesh.get_local_rank()

    @property
    def _holds_index(self) -> bool:
        return self._start <= self.index < self._start + len(shard_of(self.parameter))


def as_sharded(weight: PrunableWeight) -> PrunableWeight:
    """The weight of a layer, named as in that, as one that is sharded, if it is.

    >>> weight = PrunableWeight("weight", torch.nn.Parameter(Tensor(3, 5)), ())
    >>> as_sharded(weight) is weight
    True
    """
    if not is_sharded(weight.parameter):
        return weight
    own = weight.name.partition("[")[0]
    return ShardedWeight(weight.name, weight.parameter, weight.layers, weight.transposed, weight.index, own=own)


def counted(weights: Iterable[PrunableWeight], count: Callable[[PrunableWeight], Tensor | int]) -> dict[str, int]:
    """By name what `count` finds in the weights that are held here, and of sharded ones on all other ranks together.

    >>> weight = PrunableWeight("weight", torch.nn.Parameter(torch.ones(3, 5)), ())
    >>> counted([weight], lambda weight: weight.held().sum())
    {'weight': 15}
    """
    found, sharded = {}, []
    for weight in weights:  # they may be in memory one at a time
        found[weight.name] = int(count(weight))
        if isinstance(weight, ShardedWeight):
            sharded.append(weight.name)
    return over_shards(found, sharded)
