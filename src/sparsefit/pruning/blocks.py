"""The repeated blocks of a model: finding them, and the arguments with which the model calls each one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparsefit.calibration.samples import map_tensors, tensors_in
from sparsefit.pruning.input_watch import version_of
from sparsefit.pruning.layers import matrices_of

_LISTS = (nn.ModuleList, nn.Sequential)


class BlocksNotSequential(Exception):
    """The model does not pass its hidden state straight from block to block; the message says what it does instead."""


def find_block_lists(model: nn.Module) -> list[list[nn.Module]]:
    """The repeated blocks of a model: the outermost lists whose members all hold prunable layers.

    Most models have one list. Models with an encoder and a decoder, two towers, or stages of blocks (ConvNeXt, Swin)
    have several; layers between two stages are in no block.

    >>> [blocks] = find_block_lists(nn.ModuleList(nn.TransformerEncoderLayer(4, 1) for _ in range(3)))
    >>> len(blocks)
    3
    """
    if isinstance(model, _LISTS) and _is_block_list(model):
        return _stages(model) or [list(model)]
    return [blocks for child in model.children() for blocks in find_block_lists(child)]


def _stages(modules: nn.ModuleList | nn.Sequential) -> list[list[nn.Module]]:
    """The blocks of each stage if the members of a list are stages, else nothing. Stages are lists of blocks, possibly
    with layers between them, or modules that each hold one list of blocks. They must differ in width: lists inside
    members of equal width are experts or parallel heads."""
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
    # No model calls a list of lists: the inner lists hold the blocks.
    nested = any(isinstance(member, nn.ModuleList) for member in modules)
    return len(modules) >= 2 and alike and not nested and all(map(_holds_matrices, modules))


def _holds_matrices(module: nn.Module) -> bool:
    # A bare layer is no block: a list of them is a plain network or a set of parallel heads. Neither is a single
    # convolution with a kernel larger than 1, with its normalisation and activation.
    if matrices_of(module):
        return False
    weights = [weight for layer in module.modules() for weight in matrices_of(layer)]
    return len(weights) > 1 or any(weight.positions == 1 for weight in weights)


@dataclass(frozen=True)
class BlockCall:
    """The arguments with which the model calls a block, apart from the hidden state."""

    index: int  # of the block in its list
    arguments: Mapping[int | str, Any]  # keyword arguments by name, positional ones by number
    key: int | str  # where the hidden state goes; `arguments` has None there

    def mapped(self, function: Callable[[Tensor], Tensor]) -> BlockCall:
        """The same call with a function applied to its tensors."""
        return replace(self, arguments=map_tensors(function, self.arguments))

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """Call the block with a hidden state, which it may change in place; returns what the block returns."""
        arguments = {**self.arguments, self.key: hidden}
        named = {key: value for key, value in arguments.items() if isinstance(key, str)}
        return block(*(value for key, value in arguments.items() if key not in named), **named)


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a block's output, which is a tensor, a tuple or a mapping, depending on model and version.

    >>> hidden_of((Tensor([1.0]), "attention"))
    tensor([1.])
    """
    if isinstance(output, Mapping):
        output = next(iter(output.values()))
    elif isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        raise BlocksNotSequential(f"a block returns {type(output).__name__}, not a tensor")
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
    """The calls of a list of blocks that were recorded in one pass of the model."""

    hidden: Tensor | None  # before the first block
    calls: list[BlockCall]  # in calling order
    simple: bool  # whether the first block was computed and returned a single tensor


class _LastBlockReached(Exception):
    """Ends a pass of the model once every block's arguments are known."""


def capture_calls(
    blocks: list[nn.Module],
    forward: Callable[[], Any],
    to_the_end: bool = False,
    simple: bool = False,
    broken_off: bool = True,
) -> Capture:
    """Record the arguments with which the model calls each block of a list in one pass.

    Only the first block is computed, to see what form a block's output has; the remaining ones return their hidden
    state unchanged, and the pass ends at the last one. So attention masks, position embeddings and other arguments are
    exactly those that the model prepares for each block, at the cost of computing one block.

    Args:
        forward: Runs the model on one micro-batch.
        to_the_end: Compute every block and whatever follows the last one, to check that the blocks can be run one by
            one.
        simple: Blocks are known to return a single tensor, so that even the first need not be computed.
        broken_off: Whether the pass may stop at the last block. If not, it goes on, although nothing uses the result.

    Raises:
        BlocksNotSequential: if a block is called twice or after the last one, if its input is not the output of the
            block before it, or, with `to_the_end`, if blocks change the shape of the hidden state or pass on further
            tensors that they change.

    >>> model = nn.Sequential(nn.ReLU(), nn.Flatten())
    >>> hidden, calls, simple = capture_calls(model, lambda: model(Tensor([[1.0, 2.0]])))
    >>> calls[0].run(model[0], -hidden)
    tensor([[0., 0.]])
    """
    if len({id(block) for block in blocks}) < len(blocks):
        raise BlocksNotSequential("a block stands more than once in the list of blocks")
    calls: list[BlockCall] = []
    outputs: list[Any] = []  # the first and the last of those computed
    before_first: Tensor | None = None
    handed_on: tuple[Tensor, int] | None = None  # with its version
    last = len(blocks) - 1

    def enter(index: int, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        nonlocal before_first, handed_on
        arguments = {**dict(enumerate(args)), **kwargs}
        key = _place_of_hidden(arguments)
        hidden, arguments[key] = arguments[key], None
        call = BlockCall(index, arguments, key)
        if any(earlier.index in (index, last) for earlier in calls):
            raise BlocksNotSequential(f"block {index} is called more than once in a pass, or after the last block")
        if not calls:
            before_first = hidden
        elif hidden is not handed_on[0] or version_of(hidden) != handed_on[1]:
            raise BlocksNotSequential(f"the model computes something between blocks {calls[-1].index} and {index}")
        calls.append(call)
        if index == last and broken_off and not to_the_end:
            raise _LastBlockReached
        if to_the_end or not (simple or outputs):
            output = call.run(original, hidden.clone())
            if to_the_end:
                _check_no_other_stream(call, outputs)
                if calls[:-1] and any(tensor is hidden for tensor in tensors_in(arguments)):
                    raise BlocksNotSequential("blocks are given their hidden state in more than one place")
                if index != last and hidden_of(output).shape != hidden.shape:
                    raise BlocksNotSequential("blocks change the shape of the hidden state")
            outputs[1:] = [output]
        else:
            output = hidden if simple else _with_hidden(outputs[0], hidden)
        handed_on = hidden_of(output), version_of(hidden_of(output))
        return output

    with _replaced_forwards(blocks, enter), suppress(_LastBlockReached):
        forward()
    return Capture(before_first, calls, bool(outputs) and isinstance(outputs[0], Tensor))


def _place_of_hidden(arguments: Mapping[int | str, Any]) -> int | str:
    """The first positional argument, or `hidden_states`, or the first tensor that has a name."""
    for key in (0, "hidden_states", *(key for key in arguments if isinstance(key, str))):
        if isinstance(arguments.get(key), Tensor):
            return key
    raise BlocksNotSequential("a block is called without a tensor")


def _check_no_other_stream(call: BlockCall, outputs: list[Any]) -> None:
    """Check that a block takes nothing but the hidden state from the outputs of earlier blocks, except for tensors
    that the first block made."""
    if outputs:
        made_by_first = {id(tensor) for tensor in tensors_in(outputs[0])}
        taken = {id(tensor) for tensor in tensors_in(call.arguments)}
        if any(id(tensor) in taken - made_by_first for tensor in tensors_in(outputs[-1])):
            raise BlocksNotSequential("blocks pass on more than one tensor that they change")


@contextmanager
def _replaced_forwards(blocks: list[nn.Module], enter: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of each block with `enter(index, original forward, *args, **kwargs)`."""
    saved = [vars(block).get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = partial(enter, index, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, saved, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward


def order_of(captured: Sequence[Sequence[BlockCall]]) -> list[int]:
    """The numbers of the blocks in calling order; raises `BlocksNotSequential` if passes differ in it.

    >>> order_of([[BlockCall(1, {}, key=0)], [BlockCall(1, {}, key=0)]])
    [1]
    """
    first, *others = [[call.index for call in calls] for calls in captured]
    if not first or any(order != first for order in others):
        raise BlocksNotSequential("batches call the blocks in different orders" if first else "no block is called")
    return first
