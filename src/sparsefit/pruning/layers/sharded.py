"""Weights that are sharded over ranks (FSDP2): all ranks gather the whole weight, and each writes its own shard."""

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
    """A weight that is split along the first dimension of its parameter: by rows, if that is stored (out, in).

    Attributes:
        own: The name of the parameter in its layer, where FSDP puts the gathered parameter during computation.
    """

    own: str = ""

    @property
    def view(self) -> Tensor:
        """A view of the rows (or columns, if stored transposed) that this rank holds; may be empty."""
        held = shard_of(self.parameter)
        if self.index is not None:  # each rank holds some matrices of a stack
            start = self.index - self._start if self._holds_index else len(held)
            held = held[start : start + 1].flatten(0, 1)
        return stored_view(held, self.transposed)

    @property
    def in_product(self) -> Tensor:
        """The whole weight as products use it; empty while it is not gathered."""
        gathered = self.layers[0].get_parameter(self.own).detach()
        return gathered.new_empty(0) if is_sharded(gathered) else stored_view(gathered, self.transposed, self.index)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the whole weight."""
        whole = torch.empty(self.parameter.shape, device="meta")
        return tuple(as_matrix(whole, self.transposed, self.index).shape)

    def matrix(self) -> Tensor:
        """A copy of the whole weight, (out, in). All ranks must call this together."""
        if self.index is None:
            return as_matrix(self.parameter.detach().full_tensor(), self.transposed)
        shape, group = self.parameter.shape[1:], self.parameter.device_mesh.get_group()
        held = stored_view(self.view, self.transposed)
        one = held.contiguous() if self._holds_index else held.new_empty(shape)
        dist.broadcast(one, dist.get_global_rank(group, self.index // self._each), group)
        return stored_view(one, self.transposed)

    def part(self, matrix: Tensor) -> Tensor:
        """The part of an (out, in) tensor that belongs to the weights that this rank holds."""
        stored = stored_view(matrix, self.transposed)
        if self.index is None:
            stored = stored[self._start : self._start + len(shard_of(self.parameter))]
        elif not self._holds_index:
            stored = stored[:0]
        return stored_view(stored, self.transposed)

    @property
    def _each(self) -> int:
        """The size of a rank's shard along the first dimension; those of the last ranks may be smaller."""
        return -(-len(self.parameter) // self.parameter.device_mesh.size())

    @property
    def _start(self) -> int:
        return self._each * self.parameter.device_mesh.get_local_rank()

    @property
    def _holds_index(self) -> bool:
        return self._start <= self.index < self._start + len(shard_of(self.parameter))


def as_sharded(weight: PrunableWeight) -> PrunableWeight:
    """A weight, named as in its layer, as a `ShardedWeight` if its parameter is sharded; else unchanged.

    >>> weight = PrunableWeight("weight", torch.nn.Parameter(Tensor(3, 5)), ())
    >>> as_sharded(weight) is weight
    True
    """
    if not is_sharded(weight.parameter):
        return weight
    own = weight.name.partition("[")[0]
    return ShardedWeight(weight.name, weight.parameter, weight.layers, weight.transposed, weight.index, own=own)


def counted(weights: Iterable[PrunableWeight], count: Callable[[PrunableWeight], Tensor | int]) -> dict[str, int]:
    """The `count` of each weight by name; counts of sharded weights are summed over ranks.

    >>> weight = PrunableWeight("weight", torch.nn.Parameter(torch.ones(3, 5)), ())
    >>> counted([weight], lambda weight: weight.held().sum())
    {'weight': 15}
    """
    found, sharded = {}, []
    for weight in weights:  # one at a time: not all of them need be in memory
        found[weight.name] = int(count(weight))
        if isinstance(weight, ShardedWeight):
            sharded.append(weight.name)
    return over_shards(found, sharded)
