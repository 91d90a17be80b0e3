"""What the ranks of a distributed run tell each other while they prune; nothing in a single process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor


def from_all(value: Any) -> list[Any]:
    """The value of every rank, in their order.

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
    """An error of one rank becomes everybody's, as those that went on would wait for it for ever.

    Errors of sparsefit keep their class; of another error the others raise a `RuntimeError` that quotes it.

    >>> from sparsefit.errors import CalibrationError
    >>> with errors_on_all_ranks(): raise CalibrationError("no data")
    Traceback (most recent call last):
    sparsefit.errors.CalibrationError: no data
    """
    try:
        yield
    except Exception as error:
        ours = type(error).__module__.startswith("sparsefit.")
        from_all((type(error), str(error)) if ours else (RuntimeError, f"{type(error).__name__}: {error}"))
        raise
    for rank, failure in enumerate(from_all(None)):
        if failure is not None:
            kind, text = failure
            raise kind(f"on rank {rank}: {text}")


def add_up(values: Tensor, largest: bool = False) -> None:
    """The sum (or the largest) over all ranks, in place.

    >>> import torch
    >>> add_up(values := torch.ones(2)); values
    tensor([1., 1.])
    """
    if is_distributed():
        dist.all_reduce(values, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)


def of_rank(values: Tensor, rank: int = 0) -> Tensor:
    """The tensor of one rank; the others give one of the same shape, type and device for it to be written to.

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
    """The number of this process among all, from 0.

    >>> own_rank()
    0
    """
    return dist.get_rank() if is_distributed() else 0


def number_of_ranks() -> int:
    """How many processes there are in all.

    >>> number_of_ranks()
    1
    """
    return dist.get_world_size() if is_distributed() else 1


def shared_out(costs: Sequence[float], ranks: int | None = None) -> list[int]:
    """Which rank does each of several pieces of work, so that all are done soon: the dearest first, each by the rank
    with the least to do. All ranks find the same.

    Args:
        costs: What each takes.
        ranks: How many there are; by default those of this run.

    >>> shared_out([3.0, 1.0, 1.0], ranks=2)
    [0, 1, 1]
    """
    loads, chosen = [0.0] * (ranks or number_of_ranks()), [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        chosen[number] = min(range(len(loads)), key=loads.__getitem__)
        loads[chosen[number]] += costs[number]
    return chosen


def is_distributed() -> bool:
    """Whether there is a group of processes, if only of one.

    >>> is_distributed()
    False
    """
    return dist.is_available() and dist.is_initialized()
