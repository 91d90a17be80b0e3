"""What the ranks of a distributed run tell each other while they prune; nothing in a single process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsefit.errors import CalibrationError


def from_all(value: Any) -> list[Any]:
    """The value of every rank, in their order.

    >>> from_all(3)
    [3]
    """
    if not _is_distributed():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """A `CalibrationError` of one rank becomes everybody's, as those that went on would wait for it for ever.

    >>> with errors_on_all_ranks(): raise CalibrationError("no data")
    Traceback (most recent call last):
    sparsefit.errors.CalibrationError: no data
    """
    try:
        yield
    except CalibrationError as error:
        from_all(str(error))
        raise
    for rank, text in enumerate(from_all(None)):
        if text is not None:
            raise CalibrationError(f"on rank {rank}: {text}")


def add_up(values: Tensor, largest: bool = False) -> None:
    """The sum (or the largest) over all ranks, in place.

    >>> add_up(values := torch.ones(2)); values
    tensor([1., 1.])
    """
    if _is_distributed():
        dist.all_reduce(values, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)


def of_first_rank(values: Tensor) -> Tensor:
    """The tensor of rank 0.

    >>> of_first_rank(torch.tensor([True]))
    tensor([True])
    """
    if not _is_distributed():
        return values
    # Not every backend sends bool.
    sent = values.to(torch.uint8 if values.dtype == torch.bool else values.dtype).contiguous()
    dist.broadcast(sent, src=0)
    return sent.to(values.dtype)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
