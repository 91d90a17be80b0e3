"""Running a model's blocks one by one while each is tuned, in the sparse and in the dense network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefit.calibration.batches import MicroBatch
from sparsefit.errors import ConfigError
from sparsefit.pruning.blocks import BlockCall, BlocksNotSequential, capture_calls, find_block_lists, order_of
from sparsefit.ranks import errors_on_all_ranks


@dataclass
class BlockRun:
    """The calls of one block and its hidden states, in the sparse and in the dense network.

    The hidden states are the block's inputs; whoever tunes the block replaces them with its outputs.

    Attributes:
        calls: For each micro-batch, the arguments of the block other than the hidden state.
        dense_calls: As `calls`, in the dense network: those of a decoder hold the dense encoder's outputs.
        sparse: For each micro-batch, the hidden state in the sparse network.
        dense: For each micro-batch, the hidden state in the dense network.
    """

    calls: list[BlockCall]
    dense_calls: list[BlockCall]
    sparse: list[Tensor]
    dense: list[Tensor]


@dataclass(frozen=True)
class BlockList:
    """Blocks that pass their hidden state straight to the next; `simple` if they return nothing but it."""

    blocks: list[nn.Module]
    simple: bool


def runnable_lists(lists: list[list[nn.Module]], forward: Callable[[], Any]) -> list[BlockList]:
    """The lists whose blocks can be run one by one. Stages that change the shape are replaced by the lists in them.

    Args:
        lists: Lists of blocks from `find_block_lists`; those that the model never calls are left out.
        forward: Runs the model on one sample.

    Raises:
        ConfigError: if blocks do not pass their hidden state straight on and contain no lists of blocks.
    """
    found = []
    for blocks in lists:
        try:
            with torch.no_grad():
                _, calls, simple = capture_calls(blocks, forward, to_the_end=True)
        except BlocksNotSequential as reason:
            inner = [own for block in blocks for own in find_block_lists(block)]
            if not inner:
                raise _refused(reason) from reason
            found += runnable_lists(inner, forward)
            continue
        if calls:
            found.append(BlockList(blocks, simple))
    return found


def run_blocks(
    found: BlockList,
    data: list[MicroBatch],
    forward: Callable[[Any], Any],
    dense_before: AbstractContextManager[None] | None,
) -> Iterator[tuple[int, BlockRun]]:
    """Yield the index of each block of a list, in calling order, and its `BlockRun`.

    The caller must replace the hidden states with the outputs of the block before it takes the next one.

    Args:
        found: The list.
        data: Calibration data.
        forward: Runs the model on a batch.
        dense_before: A context in which everything before the list has its dense weights; None if it is still dense.

    Raises:
        ConfigError: if the batches do not all call the blocks in the same order.
    """
    order, calls, hidden = _captured(found, data, forward, nullcontext())
    run = BlockRun([], [], hidden, hidden)
    dense_calls = calls
    if dense_before is not None:
        _, dense_calls, run.dense = _captured(found, data, forward, dense_before)
    for position, index in enumerate(order):
        run.calls = [own[position] for own in calls]
        run.dense_calls = [own[position] for own in dense_calls]
        yield index, run


def _captured(
    found: BlockList, data: list[MicroBatch], forward: Callable[[Any], Any], weights: AbstractContextManager[None]
) -> tuple[list[int], list[list[BlockCall]], list[Tensor]]:
    """The calling order of the blocks and, for each micro-batch, their calls and the hidden state before the first."""
    with errors_on_all_ranks(), weights, torch.no_grad():
        shown = [capture_calls(found.blocks, lambda b=b: forward(b.data), simple=found.simple) for b in data]
        calls = [capture.calls for capture in shown]
        try:
            order = order_of(calls)
        except BlocksNotSequential as reason:
            raise _refused(reason) from reason
    return order, calls, [capture.hidden for capture in shown]


def _refused(reason: BlocksNotSequential) -> ConfigError:
    return ConfigError(f"the model cannot be reconstructed block by block: {reason}. Leave out the reconstruction")


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Disable all adapters in the model inside the context."""
    with ExitStack() as stack:
        for adapted in dict.fromkeys(_adapted_parts(model)):
            stack.enter_context(adapted.disable_adapter())
        yield


def _adapted_parts(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that can disable the adapters in them."""
    if callable(getattr(model, "disable_adapter", None)):
        return [model]
    return [part for child in model.children() for part in _adapted_parts(child)]


@contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """Convert a half-precision block to float32, so that small steps are not lost, and back afterwards."""
    halves = [t for t in (*block.parameters(), *block.buffers()) if t.dtype in (torch.float16, torch.bfloat16)]
    dtypes = [tensor.dtype for tensor in halves]
    try:
        for tensor in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in zip(halves, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)
