"""Temporarily replaces sharded parameters by whole ones, to merge or write them.

Models without sharded parameters are not changed, and pay no overhead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from sparsefit.ranks import errors_on_all_ranks, own_rank
from sparsefit.sharded import is_sharded, reshard, shard_of

_Places = Sequence[tuple[nn.Module, str]]


def has_shards(model: nn.Module) -> bool:
    """Whether any parameter of a model is sharded."""
    return any(map(is_sharded, model.parameters()))


def own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """The part of `whole`, a tensor of a parameter's full shape, that matches this rank's shard of the parameter; the
    whole tensor if the parameter is not sharded."""
    if is_sharded(parameter):
        for axis, placement in enumerate(parameter.placements):
            if placement.is_shard():  # with fewer rows than ranks, the last ranks have none
                parts = whole.chunk(parameter.device_mesh.size(axis), placement.dim)
                rank = parameter.device_mesh.get_local_rank(axis)
                whole = parts[rank] if rank < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Gather all parameters of a module on every rank; at the end, their values are copied back to the shards.

    Meant for a layer, not for a model, as it must fit on each device. Collective.
    """
    with _gathered(module) as places, torch.no_grad():
        try:
            yield
        finally:
            for parameter, [(owner, name), *_] in places.items():
                shard_of(parameter).copy_(own_part(getattr(owner, name).detach(), parameter))


@contextmanager
def whole_on_first_rank(model: nn.Module) -> Iterator[None]:
    """Gather a model in the CPU memory of rank 0, to be written from there; changes to the weights are discarded.

    Parameters are gathered one at a time, and the other ranks keep none of them. An error of one rank is raised on all.
    Collective.
    """
    with _gathered(model, first_rank_only=True) as places, errors_on_all_ranks() if places else nullcontext():
        yield


@contextmanager
def _gathered(module: nn.Module, first_rank_only: bool = False) -> Iterator[Mapping[nn.Parameter, _Places]]:
    """Replace sharded parameters by whole ones; yields the sharded ones, with the modules and names that hold them."""
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
