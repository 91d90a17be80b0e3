"""The repeated blocks of a model: finding them, and the arguments with which the model calls each one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsefit.pruning.layers import matrices_of
from sparsefit.pruning.samples import map_tensors, tensors_in
from sparsefit.pruning.watch import version_of

_LISTS = (nn.ModuleList, nn.Sequential)


class NotSweepable(Exception):
    """The model does not pass its hidden state straight from block to block; the message says how."""


def find_block_lists(model: nn.Module) -> list[list[nn.Module]]:
    """The repeated blocks of a model: the outermost lists whose members all hold prunable layers.

    One list for most models; several where a model has an encoder and a decoder, two towers, or stages of blocks, as
    ConvNeXt and Swin have (what leads from one stage to the next is in no block).

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList(nn.TransformerEncoderLayer(4, 1) for _ in range(3)))
    >>> [[type(block).__name__ for block in blocks] for blocks in find_block_lists(model)]
    [['TransformerEncoderLayer', 'TransformerEncoderLayer', 'TransformerEncoderLayer']]
    """
    if isinstance(model, _LISTS) and _is_block_list(model):
        return _stages(model) or [list(model)]
    return [blocks for child in model.children() for blocks in find_block_lists(child)]


def _stages(modules: nn.ModuleList | nn.Sequential) -> list[list[nn.Module]]:
    """The blocks of each stage, where the members of a list are stages: lists of blocks, with what leads from one to
    the next between them, or modules that each keep their blocks in one list. Those of one stage are wider than those
    of another. (Lists in blocks that are all alike are experts, or parallel heads.)"""
    stages = [list(member) for member in modules if isinstance(member, nn.Sequential) and _are_blocks(member)]
    if not stages:
        inner = [[list(c) for c in member.children() if isinstance(c, _LISTS) and _are_blocks(c)] for member in modules]
        if any(len(found) != 1 for found in inner):
            return []
        stages = [blocks for [blocks] in inner]
    widths = {tuple(tuple(p.shape) for p in first.parameters()) for first, *_ in stages}
    return stages if len(widths) > 1 else []


def _are_blocks(modules: nn.ModuleList | nn.Sequential) -> bool:
    return len({type(module) for module in modules}) == 1 and all(map(_holds_matrices, modules))


def _is_block_list(modules: nn.ModuleList | nn.Sequential) -> bool:
    alike = len({type(member) for member in modules}) == 1 or isinstance(modules, nn.ModuleList)
    # Lists of lists are called by nobody: the inner ones hold the blocks.
    nested = any(isinstance(member, nn.ModuleList) for member in modules)
    return len(modules) >= 2 and alike and not nested and all(map(_holds_matrices, modules))


def _holds_matrices(module: nn.Module) -> bool:
    # A bare layer is no block: a list of them is a plain network or a set of parallel heads. Nor is one convolution
    # of more than a position, with its normalisation and activation.
    if matrices_of(module):
        return False
    weights = [weight for layer in module.modules() for weight in matrices_of(layer)]
    return len(weights) > 1 or any(weight.positions == 1 for weight in weights)


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one call of one block. Its hidden state is the first positional argument, or
    `hidden_states`, or the first tensor among the keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def _key(self) -> int | str:
        if self.args and isinstance(self.args[0], Tensor):
            return 0
        names = [name for name, value in self.kwargs.items() if isinstance(value, Tensor)]
        if not names:
            raise NotSweepable("a block is called without a tensor")
        return "hidden_states" if "hidden_states" in names else names[0]

    @property
    def hidden(self) -> Tensor:
        """The hidden state that goes into the block."""
        key = self._key
        return self.args[0] if key == 0 else self.kwargs[key]

    def without_hidden(self) -> BlockCall:
        """The same call, which no longer keeps its hidden state alive; only to be `run` with another."""
        return self._with_hidden(self.hidden.new_empty(0))

    def _with_hidden(self, hidden: Tensor) -> BlockCall:
        key = self._key
        if key == 0:
            return BlockCall((hidden, *self.args[1:]), self.kwargs)
        return BlockCall(self.args, {**self.kwargs, key: hidden})

    def moved(self, device: torch.device | str, memo: dict[int, Tensor]) -> BlockCall:
        """The same call with its tensors on a device; one tensor in several places stays one.

        Args:
            device: Where to.
            memo: By id of a tensor, what it became: one for all calls of a pass. The tensors must live as long as it.
        """

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.to(device)
            return memo[id(tensor)]

        return self._mapped(move)

    def cast(self, dtype: torch.dtype) -> BlockCall:
        """The same call with its floating tensors in a dtype."""
        return self._mapped(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> BlockCall:
        return BlockCall(map_tensors(function, self.args), map_tensors(function, self.kwargs))

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """Call the block with the very same arguments but another hidden state; returns all that it does. The block
        may change the hidden state in place."""
        call = self._with_hidden(hidden)
        return block(*call.args, **call.kwargs)


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a block's output, which is a tensor, a tuple or a mapping, by version and model.

    >>> hidden_of((torch.tensor(1.0), "attention"))
    tensor(1.)
    """
    if isinstance(output, Mapping):
        output = next(iter(output.values()))
    elif isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        raise NotSweepable(f"a block returns {type(output).__name__}, not a tensor")
    return output


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """A block's output with the hidden state replaced, in the same form."""
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(hidden, *output[1:])
    if isinstance(output, tuple | list):
        return type(output)([hidden, *output[1:]])
    if isinstance(output, Mapping):
        return type(output)(**{**output, next(iter(output)): hidden})
    return hidden


class Capture(NamedTuple):
    """What one pass of a model has shown.

    Attributes:
        calls: Index and call of each block, in calling order.
        simple: Whether the first block was computed and returned a tensor alone.
    """

    calls: list[tuple[int, BlockCall]]
    simple: bool


class _LastBlockReached(Exception):
    """Ends a pass of the model once every block's arguments are known."""


def capture_calls(
    blocks: list[nn.Module], forward: Callable[[], Any], to_the_end: bool = False, simple: bool = False
) -> Capture:
    """The arguments with which one pass of the model calls each of its blocks, in calling order.

    Only the first block is computed (its output shows what form a block's output has); the others hand their
    hidden state through, and the pass ends at the last one (a pass `to_the_end` computes all). So masks, position
    embeddings and whatever else the model prepares for each block are the model's own, at the price of one block.

    Args:
        blocks: The blocks of one list.
        forward: Runs the model on one micro-batch.
        to_the_end: Compute every block and go on after the last one, to see that other passes can do without.
        simple: Blocks are known to return a tensor alone, so that not even the first must be computed.

    Raises:
        NotSweepable: if a block is called twice or after the last one, what goes into a block is not what came out of
            the one before, or (to the end) blocks change its shape or hand on more than it.

    >>> model = nn.Sequential(nn.ReLU(), nn.Flatten())
    >>> captured = capture_calls(model, lambda: model(torch.zeros(1, 2)))
    >>> [(index, call.hidden) for index, call in captured.calls]
    [(0, tensor([[0., 0.]])), (1, tensor([[0., 0.]]))]
    """
    if len({id(block) for block in blocks}) < len(blocks):
        raise NotSweepable("a block stands more than once in the list of blocks")
    calls: list[tuple[int, BlockCall]] = []
    outputs: list[Any] = []  # the first and the last of those computed
    handed_on: tuple[Tensor, int] | None = None  # with its version
    last = len(blocks) - 1

    def enter(index: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal handed_on
        call = BlockCall(args, kwargs)
        if any(earlier in (index, last) for earlier, _ in calls):
            raise NotSweepable(f"block {index} is called more than once in a pass, or after the last block")
        if calls and (call.hidden is not handed_on[0] or version_of(call.hidden) != handed_on[1]):
            raise NotSweepable(f"the model computes something between blocks {calls[-1][0]} and {index}")
        # To the end every block has a hidden state of its own, and none is needed later.
        calls.append((index, call.without_hidden() if to_the_end else call))
        if index == last and not to_the_end:
            raise _LastBlockReached
        if to_the_end or not (simple or outputs):
            output = call.run(original, call.hidden.clone())
            if to_the_end:
                _check_replayable(call, outputs, output, index == last)
            outputs[1:] = [output]
        else:
            output = call.hidden if simple else _with_hidden(outputs[0], call.hidden)
        handed_on = hidden_of(output), version_of(hidden_of(output))
        return output

    with _replaced_forwards(blocks, enter), suppress(_LastBlockReached):
        forward()
    return Capture(calls, bool(outputs) and isinstance(outputs[0], Tensor))


def _check_replayable(call: BlockCall, before: list[Any], output: Any, is_last: bool) -> None:
    """See that a block can be handed its input through, and that what blocks return beside the hidden state is what the
    first of them (the first of the outputs `before`) has made."""
    if before:
        first = {id(tensor) for tensor in tensors_in(before[0])}
        taken = {id(tensor) for tensor in tensors_in([call.args, call.kwargs])} - {id(call.hidden)}
        if any(id(tensor) in taken - first for tensor in tensors_in(before[-1])):
            raise NotSweepable("blocks hand on more than one tensor that they change")
    if not is_last and hidden_of(output).shape != call.hidden.shape:
        raise NotSweepable("blocks change the shape of the hidden state")


@contextmanager
def _replaced_forwards(blocks: list[nn.Module], enter: Callable[..., Any]) -> Iterator[None]:
    """Send every call of a block to `enter(index, original forward, args, kwargs)`."""

    def replacement(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: enter(index, original, args, kwargs)

    saved = [vars(block).get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = replacement(index, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, saved, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward
