"""Whole parameters in the places of those that are split over devices, to be merged or written.

Models that are not split are what they are: nothing here costs them anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsefit.ranks import own_rank
from sparsefit.sharded import is_sharded, reshard, shard_of

_Places = Sequence[tuple[nn.Module, str]]


def has_shards(model: nn.Module) -> bool:
    """Whether any parameter of a model is split."""
    return any(map(is_sharded, model.parameters()))


def own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """Of a tensor of a parameter's whole shape the part that this rank holds of the parameter: all of it, if that is
    not split."""
    if is_sharded(parameter):
        for axis, placement in enumerate(parameter.placements):
            if placement.is_shard():  # of fewer rows than ranks, the last ranks have none
                parts = whole.chunk(parameter.device_mesh.size(axis), placement.dim)
                rank = parameter.device_mesh.get_local_rank(axis)
                whole = parts[rank] if rank < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """A module whose parameters are whole, on every rank; what has become of them is put into the shards at the end.

    For a layer, not for a model, as it must fit on each device. All ranks must ask together.
    """
    with _gathered(module) as places, torch.no_grad():
        try:
            yield
        finally:
            for parameter, [(owner, name), *_] in places.items():
                shard_of(parameter).copy_(own_part(getattr(owner, name).detach(), parameter))


@contextmanager
def whole_on_first_rank(model: nn.Module) -> Iterator[None]:
    """A model that is whole on the first rank, in CPU memory, to be written from there; what is changed in it is lost.

    It is gathered one parameter at a time, of which the other ranks keep none. All ranks must ask together.
    """
    with _gathered(model, first_rank_only=True):
        yield


@contextmanager
def _gathered(module: nn.Module, first_rank_only: bool = False) -> Iterator[Mapping[nn.Parameter, _Places]]:
    """Puts whole parameters into the places of split ones; yields the latter, with the modules that have them."""
    reshard(module)
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if is_sharded(parameter):
                places.setdefault(parameter, []).append((owner, name))
    try:
        for parameter, own in places.items():
            full = parameter.detach().full_tensor()
            if not first_rank_only:
                _put(nn.Parameter(full, parameter.requires_grad), own)
            elif own_rank() == 0:
                _put(nn.Parameter(full.cpu(), parameter.requires_grad), own)
        yield places
    finally:
        for parameter, own in places.items():
            _put(parameter, own)


def _put(parameter: nn.Parameter, places: _Places) -> None:
    for owner, name in places:
        owner.register_parameter(name, parameter)
