"""Gradient descent on the distance between a block's outputs and its targets, over the samples of all ranks."""

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
    """Minimize the mean squared distance between a block's outputs and those of the dense network.

    Each rank has its own samples. Gradients are averaged over ranks, weighted by the number of output elements, so the
    steps equal those of one process whose micro-batches are those of all ranks together.

    Args:
        block: The block, in float32.
        tuned: The weights of the block to train.
        run: The block's inputs and target outputs.
        optimizer: The optimizer of these weights; its learning rate falls linearly to zero with the steps or the time,
            whichever is faster.
        passes: Passes over the micro-batches.
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
    """Yield micro-batch indices, shuffled in each pass; None for steps in which only other ranks have a micro-batch."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(passes):
        yield from torch.randperm(batches, generator=generator).tolist()
        yield from [None] * (rounds - batches)


def _add_gradients(block: nn.Module, run: BlockRun, number: int, scale: float) -> int:
    """Add the gradients of the loss on one micro-batch; returns the number of output elements it is the mean over."""
    call = run.calls[number].mapped(lambda t: t.float() if t.is_floating_point() else t)
    # A copy, as a block may change its input in place.
    output = hidden_of(call.run(block, run.sparse[number].to(torch.float32, copy=True)))
    loss = nn.functional.mse_loss(output, run.dense[number].float()) / scale
    loss.backward()
    return output.numel()


def _average_over_ranks(weights: list[nn.Parameter], size: int) -> None:
    """Average gradients over ranks in place, weighted by `size`, the number of output elements on this rank."""
    if number_of_ranks() == 1:
        return
    share = size / sum(from_all(size))
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.mul_(share)
        add_up(weight.grad)
