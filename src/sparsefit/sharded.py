"""Helpers for models that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded over ranks.

Each rank holds a shard of every parameter. When a unit (a module that `fully_shard` was called with) is called, all
ranks gather its parameters together, and plain whole parameters replace the shards while it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch.distributed as dist
from torch import Tensor, nn

from sparsefit.errors import ConfigError
from sparsefit.ranks import from_all, is_distributed

_WAY_OUT = (
    "Pruned in place are parameters that `fully_shard` splits by their first dimension, over a one-dimensional mesh of "
    "all ranks; for any other layout prune first (`sparsefit prune`, on one device), and split the pruned model"
)


def is_sharded(parameter: object) -> bool:
    """Whether this rank holds a shard of a parameter (a DTensor).

    >>> is_sharded(nn.Parameter(Tensor(2)))
    False
    """
    if not is_distributed():
        return False
    from torch.distributed.tensor import DTensor  # the import takes most of a second

    return isinstance(parameter, DTensor)


def shard_of(parameter: Tensor) -> Tensor:
    """This rank's shard of a parameter, without a copy; the whole parameter if it is not sharded.

    >>> shard_of(nn.Parameter(Tensor([1.0, 2.0])))
    tensor([1., 2.])
    """
    return parameter.detach().to_local() if is_sharded(parameter) else parameter.detach()


def units_of(model: nn.Module) -> list[nn.Module]:
    """The units of a model, in module order; empty if it is not sharded.

    >>> units_of(nn.Linear(3, 5))
    []
    """
    if not is_distributed():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, so that each rank holds only its shards. FSDP2 leaves the outermost unit gathered after
    a pass without gradients. Writes to its shards then have no effect, and writes to its whole parameters are lost.

    >>> reshard(nn.Linear(3, 5))
    """
    for unit in units_of(model):
        unit.reshard()


def over_shards(counts: Mapping[str, int], sharded: Collection[str]) -> dict[str, int]:
    """Counts by name; those of sharded parameters, which each rank counts in its shard, are summed over ranks.

    >>> over_shards({"a": 3}, sharded=[])
    {'a': 3}
    """
    if not sharded:
        return dict(counts)
    of_ranks = from_all([counts[name] for name in sharded])
    return {**counts, **dict(zip(sharded, map(sum, zip(*of_ranks, strict=True)), strict=True))}


def check_layout(model: nn.Module) -> None:
    """Check that a model is sharded in a layout that can be pruned in place.

    Raises:
        ConfigError: names the first parameter with another layout, and the layout.

    >>> check_layout(nn.Linear(3, 5))
    """
    if not is_distributed():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import Shard

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ConfigError(f"FullyShardedDataParallel (FSDP1) keeps flattened weights, not matrices. {_WAY_OUT}")
    gathered = {id(parameter) for unit in units_of(model) for parameter in unit.parameters()}
    for name, parameter in model.named_parameters():
        if not is_sharded(parameter):
            continue
        mesh, placements = parameter.device_mesh, parameter.placements
        by_rows = len(placements) == 1 and type(placements[0]) is Shard and placements[0].dim == 0
        wrong = None
        if not by_rows or mesh.size() != dist.get_world_size():
            wrong = f"has the placements {placements} on a mesh of {tuple(mesh.shape)}"
        elif id(parameter) not in gathered:
            wrong = f"has the placements {placements}, but is in no module that `fully_shard` was called with"
        elif parameter.device.type not in ("meta", mesh.device_type):
            wrong = f"is kept on {parameter.device.type}, but its mesh is of {mesh.device_type}"
        if wrong:
            raise ConfigError(f"{name} {wrong}. {_WAY_OUT}")


def passes(model: nn.Module | None, run: Callable[[int], object], count: int, part: nn.Module | None = None) -> None:
    """Call run(0) to run(count - 1), each of which runs a model, or one part of it, once.

    In each pass through a sharded model all ranks gather its units. A rank with fewer passes, or with an error,
    therefore keeps gathering until all ranks are done, and raises its error then. It gathers the units in the order of
    its last complete pass, or before the first one in module order. Afterwards each rank holds only its shards.

    >>> passes(nn.Linear(3, 5), print, count=2)
    0
    1
    """
    if model is None or not units_of(model):
        for number in range(count):
            run(number)
        return
    units = order = units_of(part or model)
    holder = _holder(model, part) if part is not None else []
    failure: Exception | None = None
    try:
        _gather(holder)
        for number in range(max(from_all(count))):
            entered: list[nn.Module] = []
            if number < count and failure is None:
                try:
                    with _noting(units, entered):
                        run(number)
                    order = entered
                except Exception as error:
                    failure = error
            _gather(order[len(entered) :])
            if failure is not None:
                _reset(model)
            reshard(part or model)
    except BaseException:
        _reset(model)
        raise
    finally:
        for unit in holder:
            unit.reshard()
    if failure is not None:
        raise failure


@contextmanager
def _noting(units: list[nn.Module], entered: list[nn.Module]) -> Iterator[None]:
    """Append each unit to `entered` when it is called."""
    handles = [unit.register_forward_pre_hook(lambda unit, _: entered.append(unit)) for unit in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gather(units: list[nn.Module]) -> None:
    """Gather units one after the other, as a pass does; the last stays gathered. (A unit of several modules is gathered
    with its first module.)"""
    for unit, before in zip(units, [None, *units], strict=False):
        if before is unit:  # called twice in a row: a pass gathers it again
            unit.reshard()
        unit.unshard()
        if before is not None and before is not unit:
            before.reshard()


def _holder(model: nn.Module, part: nn.Module) -> list[nn.Module]:
    """The unit around a part of a model that manages some of the part's parameters, in a list; empty if none does."""
    own = {id(parameter) for unit in units_of(part) for parameter in unit.parameters()}
    if all(id(parameter) in own for parameter in part.parameters() if is_sharded(parameter)):
        return []
    around = [unit for unit in units_of(model) if unit is not part and any(part is inner for inner in unit.modules())]
    return around[-1:]


def _reset(model: nn.Module) -> None:
    """Reset FSDP2's state after an interrupted pass."""
    for unit in units_of(model):
        with suppress(RuntimeError, AttributeError):  # works only on the root; earlier releases of torch lack it
            unit.reset_iter_state()
