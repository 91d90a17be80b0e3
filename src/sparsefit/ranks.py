"""Communication between the ranks of a distributed run; no-ops in a single process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor


def from_all(value: Any) -> list[Any]:
    """All-gather a picklable value: the values of all ranks, in rank order.

    >>> from_all(3)
    [3]
    """
    if not is_distributed():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """Raise an error of one rank on all ranks, as the remaining ranks would otherwise wait for it forever.

    Errors of sparsefit keep their class on all ranks; other errors become a `RuntimeError` with the message on the
    ranks that did not fail. If ranks fail in different ways, all raise the error of the same rank, so that code that
    catches one of the classes does so on all ranks or on none.

    >>> from sparsefit.errors import CalibrationError
    >>> with errors_on_all_ranks(): raise CalibrationError("no data")
    Traceback (most recent call last):
    sparsefit.errors.CalibrationError: no data
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    try:
        told = from_all(_told(own))
        failed = [rank for rank, failure in enumerate(told) if failure is not None]
        if not failed:
            return
        # An error that nobody expects is raised rather than one that may be caught.
        rank = min(failed, key=lambda rank: (told[rank][0] is not RuntimeError, rank))
        if own is not None and rank == own_rank():
            raise own
        kind, text = told[rank]
        raise kind(f"on rank {rank}: {text}") from own
    finally:
        del own  # its traceback holds this frame: together they would keep tensors alive


def _told(error: Exception | None) -> tuple[type[Exception], str] | None:
    """The class and message by which other ranks raise an error."""
    if error is None:
        return None
    if type(error).__module__.startswith("sparsefit."):
        return type(error), str(error)
    return RuntimeError, f"{type(error).__name__}: {error}"


def add_up(values: Tensor, largest: bool = False) -> None:
    """All-reduce a tensor in place: the sum, or with `largest` the maximum, over ranks.

    >>> import torch
    >>> add_up(values := torch.ones(2)); values
    tensor([1., 1.])
    """
    if is_distributed():
        dist.all_reduce(values, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)


def of_rank(values: Tensor, rank: int = 0) -> Tensor:
    """Broadcast the tensor of one rank. On other ranks, `values` has the same shape, dtype and device and may be
    overwritten.

    >>> import torch
    >>> of_rank(torch.tensor([1, 0]))
    tensor([1, 0])
    """
    if not is_distributed():
        return values
    sent = values.contiguous()
    dist.broadcast(sent, src=rank)
    return sent


def own_rank() -> int:
    """The rank of this process, from 0.

    >>> own_rank()
    0
    """
    return dist.get_rank() if is_distributed() else 0


def number_of_ranks() -> int:
    """The world size.

    >>> number_of_ranks()
    1
    """
    return dist.get_world_size() if is_distributed() else 1


def shared_out(costs: Sequence[float], ranks: int | None = None) -> list[int]:
    """Assign tasks to ranks with balanced load: the most expensive task first, each to the rank with the least load.
    Deterministic, so all ranks compute the same assignment.

    Args:
        costs: The cost of each task.
        ranks: Number of ranks; by default the world size.

    Returns:
        The rank for each task.

    >>> shared_out([3.0, 1.0, 1.0], ranks=2)
    [0, 1, 1]
    """
    loads, chosen = [0.0] * (ranks or number_of_ranks()), [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        chosen[number] = min(range(len(loads)), key=loads.__getitem__)
        loads[chosen[number]] += costs[number]
    return chosen


def is_distributed() -> bool:
    """Whether torch.distributed is initialized, also with a single process.

    >>> is_distributed()
    False
    """
    return dist.is_available() and dist.is_initialized()
