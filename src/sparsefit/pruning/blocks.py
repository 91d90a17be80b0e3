"""The repeated blocks of a model: finding them, and the arguments with which the model calls each one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsefit.pruning.calibration import map_tensors, tensors_in
from sparsefit.pruning.layers import convolution, matrices_of
from sparsefit.pruning.watch import version_of


class NotSweepable(Exception):
    """The model does not pass its hidden state straight from block to block; the message says how."""


def find_block_lists(model: nn.Module) -> list[list[nn.Module]]:
    """The repeated blocks of a model: the outermost lists whose members all hold prunable layers.

    One list for most models; several where a model has an encoder and a decoder, two towers, or stages of blocks, as
    ConvNeXt and Swin have (what leads from one stage to the next is in no block).
    """
    if _is_list(model) and _is_block_list(model):
        return _stages(model) or [list(model)]
    return [blocks for child in model.children() for blocks in find_block_lists(child)]


def _stages(modules: nn.ModuleList | nn.Sequential) -> list[list[nn.Module]]:
    """The blocks of each stage, where the members of a list are stages: lists of blocks, with what leads from one to
    the next between them, or modules that each keep their blocks in one list. Those of one stage are wider than those
    of another. (Lists in blocks that are all alike are experts, or parallel heads.)"""
    stages = [list(member) for member in modules if isinstance(member, nn.Sequential) and _are_blocks(list(member))]
    if not stages:
        inner = [[list(child) for child in member.children() if _is_list(child)] for member in modules]
        lists = [[blocks for blocks in found if _are_blocks(blocks)] for found in inner]
        if any(len(found) != 1 for found in lists):
            return []
        stages = [blocks for [blocks] in lists]
    widths = {tuple(tuple(p.shape) for p in first.parameters()) for first, *_ in stages}
    return stages if len(widths) > 1 else []


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential)


def _are_blocks(modules: list[nn.Module]) -> bool:
    return len({type(module) for module in modules}) == 1 and all(map(_holds_matrices, modules))


def _is_block_list(modules: nn.ModuleList | nn.Sequential) -> bool:
    members = list(modules)
    alike = len({type(member) for member in members}) == 1 or isinstance(modules, nn.ModuleList)
    # Lists of lists are called by nobody: the inner ones hold the blocks.
    nested = any(isinstance(member, nn.ModuleList) for member in members)
    return len(members) >= 2 and alike and not nested and all(_holds_matrices(member) for member in members)


def _holds_matrices(module: nn.Module) -> bool:
    # A bare layer is no block: a list of them is a plain network or a set of parallel heads. Nor is one convolution
    # with its normalisation and activation.
    if matrices_of(module):
        return False
    layers = [layer for layer in module.modules() if matrices_of(layer)]
    return len(layers) > 1 or any(not convolution.matrices(layer) for layer in layers)


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

    def without_hidden(self) -> BlockCall:
        """The same call, which no longer keeps its hidden state alive; only to be `run` with another."""
        key = self._key
        placeholder = self.hidden.new_empty(0)
        if key == 0:
            return BlockCall((placeholder, *self.args[1:]), self.kwargs)
        return BlockCall(self.args, {**self.kwargs, key: placeholder})

    @property
    def hidden(self) -> Tensor:
        """The hidden state that goes into the block."""
        key = self._key
        return self.args[0] if key == 0 else self.kwargs[key]

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
        key = self._key
        if key == 0:
            return block(hidden, *self.args[1:], **self.kwargs)
        return block(*self.args, **{**self.kwargs, key: hidden})


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a block's output, which is a tensor, a tuple or a mapping, by version and model."""
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
        first = next(iter(output))
        return type(output)(**{**output, first: hidden})
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
    """
    if len({id(block) for block in blocks}) < len(blocks):
        raise NotSweepable("a block stands more than once in the list of blocks")
    calls: list[tuple[int, BlockCall]] = []
    first_output: list[Any] = []
    last_output: list[Any] = []
    handed_on: list[tuple[Tensor, int]] = []
    last = len(blocks) - 1

    def enter(index: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = BlockCall(args, kwargs)
        if any(earlier in (index, last) for earlier, _ in calls):
            raise NotSweepable(f"block {index} is called more than once in a pass, or after the last block")
        if calls and (call.hidden is not handed_on[-1][0] or version_of(call.hidden) != handed_on[-1][1]):
            raise NotSweepable(f"the model computes something between blocks {calls[-1][0]} and {index}")
        # To the end every block has a hidden state of its own, and none is needed later.
        calls.append((index, call.without_hidden() if to_the_end else call))
        if index == last and not to_the_end:
            raise _LastBlockReached
        if to_the_end or not (simple or first_output):
            output = call.run(original, call.hidden.clone())
            if to_the_end:
                _check_replayable(call, [*first_output, *last_output], output, index == last)
                last_output[:] = [output]
            if not first_output:
                first_output.append(output)
        else:
            output = call.hidden if simple else _with_hidden(first_output[0], call.hidden)
        handed_on[:] = [(hidden_of(output), version_of(hidden_of(output)))]
        return output

    with _replaced_forwards(blocks, enter), suppress(_LastBlockReached):
        forward()
    return Capture(calls, bool(first_output) and isinstance(first_output[0], Tensor))


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
