"""Gradient descent on the distance of a block's outputs from its targets, over the samples of all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import nn

from sparsefit.pruning.blocks import hidden_of
from sparsefit.ranks import add_up, errors_on_all_ranks, from_all, number_of_ranks
from sparsefit.recovery.block_runs import BlockRun


def descend(
    block: nn.Module,
    tuned: list[nn.Parameter],
    run: BlockRun,
    optimizer: torch.optim.Optimizer,
    passes: int,
    limit: float | None,
) -> int:
    """Minimize the mean squared distance of a block's outputs from those of the dense network.

    Every rank has samples of its own; their gradients are averaged, each number of an output counting once, so the
    steps are those of one process whose micro-batches are those of all ranks together.

    Args:
        block: The block, in float32.
        tuned: Those of its weights that train.
        run: What goes into it, and what shall come out.
        optimizer: Of these weights; its rate falls linearly to zero with the steps or the time, whichever is faster.
        passes: Times that each micro-batch is seen.
        limit: Seconds after which no further step is taken.

    Returns:
        Optimizer steps taken.
    """
    squares = [float(target.float().square().mean()) for target in run.dense]
    squares = [square for own in from_all(squares) for square in own]
    scale = max(sum(squares) / len(squares), 1e-12)
    rate, start, rounds = optimizer.param_groups[0]["lr"], time.monotonic(), max(from_all(len(run.calls)))
    total = passes * rounds
    for step, number in enumerate(_order(len(run.calls), rounds, passes)):
        spent = 0.0 if limit is None else max(from_all((time.monotonic() - start) / max(limit, 1e-9)))
        if spent >= 1:
            return step
        optimizer.param_groups[0]["lr"] = rate * (1 - max(step / total, spent))
        with torch.enable_grad(), errors_on_all_ranks():
            size = 0 if number is None else _add_gradients(block, run, number, scale)
        _average_over_ranks(tuned, size)
        optimizer.step()
        optimizer.zero_grad()
    return total


def _order(batches: int, rounds: int, passes: int) -> Iterator[int | None]:
    """Which micro-batch is next, those of each pass shuffled; None where other ranks have more in a pass."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(passes):
        yield from torch.randperm(batches, generator=generator).tolist()
        yield from [None] * (rounds - batches)


def _add_gradients(block: nn.Module, run: BlockRun, number: int, scale: float) -> int:
    """Add the gradients of the distance on one micro-batch; returns over how many numbers it is the mean."""
    call = run.calls[number].mapped(lambda t: t.float() if t.is_floating_point() else t)
    # A copy: a block may add to its input in place.
    output = hidden_of(call.run(block, run.sparse[number].to(torch.float32, copy=True)))
    loss = nn.functional.mse_loss(output, run.dense[number].float()) / scale
    loss.backward()
    return output.numel()


def _average_over_ranks(weights: list[nn.Parameter], size: int) -> None:
    """Gradients of the mean over what all ranks have, from those of the mean over `size` numbers of this one."""
    if number_of_ranks() == 1:
        return
    share = size / sum(from_all(size))
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.mul_(share)
        add_up(weight.grad)
