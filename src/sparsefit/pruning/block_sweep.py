"""Carrying the calibration data through the blocks of a model, one block after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from sparsefit.calibration.batches import Forward, MicroBatch, device_of
from sparsefit.pruning.blocks import BlockCall, NotSweepable, capture_calls, hidden_of, order_of
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.ranks import errors_on_all_ranks
from sparsefit.sharded import passes, units_of


class BlockSweep:
    """The micro-batches on their way through a list of blocks, before the block whose turn it is.

    One sample goes through the dense model to its end first: `NotSweepable` if the blocks cannot be run one by one.
    `step` is called after each pass of a micro-batch, but for those of `run`.

    Attributes:
        weights: Those of the weights to prune that are in the blocks; if there are none, nothing is run.
        block: The block whose turn it is.
        to_the_end: Whether what comes out of the block in a pass is of use.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        weights: Sequence[PrunableWeight],
        data: Sequence[MicroBatch],
        forward: Forward,
        config: PruningConfig,
        step: Callable[[], None],
    ) -> None:
        self._by_block = _weights_by_block(blocks, weights)
        self.weights = [weight for own in self._by_block.values() for weight in own]
        self._model, self._blocks, self._config, self._step = model, blocks, config, step
        self._dense = config.update == "none"
        self._order: list[int] = []
        if not self.weights:
            return
        self._hidden, self._calls = [], []
        simple, broken_off = False, not units_of(model)

        def capture(number: int) -> None:
            nonlocal simple
            if number == 0:
                _, calls, simple = capture_calls(blocks, lambda: forward(data[0].first_sample()), to_the_end=True)
                order_of([calls])
                return
            given = data[number - 1].data
            hidden, calls, _ = capture_calls(blocks, lambda: forward(given), simple=simple, broken_off=broken_off)
            if calls and config.states_on_cpu:
                hidden, calls = hidden.cpu(), _on(calls, "cpu")
            self._hidden.append(hidden)
            self._calls.append(calls)
            step()

        passes(model, capture, 1 + len(data))
        self._order = order_of(self._calls)

    def turns(self) -> Iterator[list[PrunableWeight]]:
        """The weights of each block, on the device that computes; whoever takes them has the sweep `advance`."""
        for index in self._order:
            self.block, self._outputs = self._blocks[index], {}
            # Popped: a block's masks and embeddings are not needed again.
            self._block_calls = [calls.pop(0) for calls in self._calls]
            self._is_last = not self._calls[0]
            self.to_the_end = self._dense and not self._is_last
            with _on_device(self.block, self._config.device):
                yield self._by_block.get(self.block, [])

    def run(self, number: int) -> None:
        """Run the block on the micro-batch of that number. What went in stays."""
        output = self._output(number, self._hidden[number].clone())  # a block may add to its input in place
        if self._dense:
            self._outputs[number] = output

    def advance(self) -> None:
        """Go on to what is before the next block: what the pruned one gives, or what the dense one has given."""
        if self._dense:
            self._hidden = list(self._outputs.values())
        elif not self._is_last:
            with errors_on_all_ranks():
                passes(self._model, self._go_on, len(self._hidden), self.block)

    def _go_on(self, number: int) -> None:
        hidden, self._hidden[number] = self._hidden[number], None  # the output takes the place of the input
        self._hidden[number] = self._output(number, hidden)
        self._step()

    def _output(self, number: int, hidden: Tensor) -> Tensor:
        call = self._block_calls[number]
        if self._config.states_on_cpu or self._config.device:
            device = device_of(self.block)
            [call], hidden = _on([call], device), hidden.to(device)
        output = hidden_of(call.run(self.block, hidden))
        return output.cpu() if self._config.states_on_cpu else output


def _weights_by_block(
    blocks: list[nn.Module], weights: Sequence[PrunableWeight]
) -> dict[nn.Module, list[PrunableWeight]]:
    owners: dict[nn.Module, set[nn.Module]] = {}
    for block in blocks:
        for module in block.modules():
            owners.setdefault(module, set()).add(block)
    found: dict[nn.Module, list[PrunableWeight]] = {}
    for weight in weights:
        homes = set().union(*(owners.get(layer, {None}) for layer in weight.layers))
        if len(homes) > 1:
            raise NotSweepable(f"blocks share the weight {weight.name}")
        if homes != {None}:
            found.setdefault(homes.pop(), []).append(weight)
    return found


def _on(calls: Sequence[BlockCall], device: torch.device | str) -> list[BlockCall]:
    move = cache(lambda tensor: tensor.to(device))  # tensors hash by identity: one in several places stays one
    return [call.mapped(move) for call in calls]


@contextmanager
def _on_device(block: nn.Module, device: str | None) -> Iterator[None]:
    """A block on the device that computes, and back where it was."""
    if device is None:
        yield
        return
    home = {tensor.device for tensor in (*block.parameters(), *block.buffers())}
    memory = {parameter: parameter.data for parameter in block.parameters() if type(parameter) is nn.Parameter}
    try:
        block.to(device)
        yield
    finally:
        for parameter, own in memory.items():  # what was there stays theirs: it may be a file
            if parameter.data_ptr() != own.data_ptr():
                parameter.data = own.copy_(parameter.data)
        block.to(home.pop() if len(home) == 1 else "cpu")
