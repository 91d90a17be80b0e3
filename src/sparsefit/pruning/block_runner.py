"""Running the calibration data through a model one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from sparsefit.calibration.batches import Forward, MicroBatch, device_of
from sparsefit.pruning.blocks import BlockCall, BlocksNotSequential, capture_calls, hidden_of, order_of
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.ranks import errors_on_all_ranks
from sparsefit.sharded import passes, units_of


class BlockRunner:
    """Runs the micro-batches through a list of blocks, one block at a time, and holds the inputs of the current block.

    One sample first runs through the whole dense model, which raises `BlocksNotSequential` if the blocks cannot be run
    one by one. `step` is called after each pass of a micro-batch, except those of `run_block`.

    Attributes:
        weights: The weights to prune that are in these blocks; if there are none, nothing is run.
        block: The current block.
        to_the_end: Whether the output of `run_block` is needed, so that the pass must not stop early.
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

    def each_block(self) -> Iterator[list[PrunableWeight]]:
        """Make each block the current one, on the compute device, and yield its weights to prune. The caller must call
        `advance` before it takes the next one."""
        for index in self._order:
            self.block, self._outputs = self._blocks[index], {}
            # Popped to free memory: a block's attention masks and position embeddings are not needed again.
            self._block_calls = [calls.pop(0) for calls in self._calls]
            self._is_last = not self._calls[0]
            self.to_the_end = self._dense and not self._is_last
            with _on_device(self.block, self._config.device):
                yield self._by_block.get(self.block, [])

    def run_block(self, number: int) -> None:
        """Run the current block on the micro-batch of that number. Its input is kept."""
        output = self._output(number, self._hidden[number].clone())  # a block may add to its input in place
        if self._dense:
            self._outputs[number] = output

    def advance(self) -> None:
        """Compute the inputs of the next block: the outputs of the pruned block or, with update "none", those that the
        dense one gave in `run_block`."""
        if self._dense:
            self._hidden = list(self._outputs.values())
        elif not self._is_last:
            with errors_on_all_ranks():
                passes(self._model, self._advance_one, len(self._hidden), self.block)

    def _advance_one(self, number: int) -> None:
        hidden, self._hidden[number] = self._hidden[number], None  # the output replaces the input
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
            raise BlocksNotSequential(f"blocks share the weight {weight.name}")
        if homes != {None}:
            found.setdefault(homes.pop(), []).append(weight)
    return found


def _on(calls: Sequence[BlockCall], device: torch.device | str) -> list[BlockCall]:
    move = cache(lambda tensor: tensor.to(device))  # tensors hash by identity: a tensor used twice is moved once
    return [call.mapped(move) for call in calls]


@contextmanager
def _on_device(block: nn.Module, device: str | None) -> Iterator[None]:
    """Move a block to the compute device, and back afterwards."""
    if device is None:
        yield
        return
    home = {tensor.device for tensor in (*block.parameters(), *block.buffers())}
    memory = {parameter: parameter.data for parameter in block.parameters() if type(parameter) is nn.Parameter}
    try:
        block.to(device)
        yield
    finally:
        for parameter, own in memory.items():  # back into the original memory, which may be a mapped file
            if parameter.data_ptr() != own.data_ptr():
                parameter.data = own.copy_(parameter.data)
        block.to(home.pop() if len(home) == 1 else "cpu")
