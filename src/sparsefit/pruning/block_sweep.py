"""Carrying the calibration data through the blocks of a model, one block after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsefit.pruning.blocks import BlockCall, NotSweepable, capture_calls, hidden_of
from sparsefit.pruning.calibration import MicroBatch, device_of
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.inputs import AllSeen, Key
from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.pruning.watch import Seen, watching


@dataclass(frozen=True)
class SweepableBlocks:
    """A list of blocks that pass their hidden state straight on.

    Attributes:
        blocks: The blocks.
        simple: Whether they return it alone.
        weights: For each block (by id) the weights to prune in it.
        uses: How often a pass was seen to use each weight.
    """

    blocks: list[nn.Module]
    simple: bool
    weights: dict[int, list[PrunableWeight]]
    uses: Counter[Key]


def sweepable(
    blocks: list[nn.Module], weights: Sequence[PrunableWeight], forward: Callable[[], Any]
) -> SweepableBlocks | None:
    """Look at a list of blocks with one sample, which goes through the dense model to its end.

    Args:
        blocks: The list.
        weights: All weights that are to be pruned.
        forward: Runs the model on one sample.

    Returns:
        None if there is nothing to prune in the list.

    Raises:
        NotSweepable: if the blocks cannot be run one by one; the message says why.

    >>> import torch
    >>> from sparsefit.pruning.layers import matrices_of
    >>> block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> model = nn.Sequential(block, nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    >>> sweepable(list(model), matrices_of(block[0], "0.0"), lambda: model(torch.ones(1, 2))).uses
    Counter({('0.0.weight', None): 1})
    """
    by_block = _weights_by_block(blocks, weights)
    if not by_block:
        return None
    uses: Counter[Key] = Counter()

    def count(seen: Seen) -> None:
        uses[seen.weight.name, seen.rows] += 1

    with watching([weight for own in by_block.values() for weight in own], count):
        shown = capture_calls(blocks, forward, to_the_end=True)
    if not shown.calls:
        raise NotSweepable("no block is called")
    return SweepableBlocks(blocks, shown.simple, by_block, uses)


def _weights_by_block(blocks: list[nn.Module], weights: Sequence[PrunableWeight]) -> dict[int, list[PrunableWeight]]:
    owners: dict[int, set[int]] = {}
    for block in blocks:
        for module in block.modules():
            owners.setdefault(id(module), set()).add(id(block))
    by_block: dict[int, list[PrunableWeight]] = {}
    for weight in weights:
        homes = set().union(*(owners.get(id(layer), {0}) for layer in weight.layers))
        if len(homes) > 1:
            raise NotSweepable(f"blocks share the weight {weight.name}")
        if homes != {0}:
            by_block.setdefault(homes.pop(), []).append(weight)
    return by_block


class BlockTurn:
    """A block at its turn: what goes into it in each micro-batch, and what comes out.

    Attributes:
        weights: The weights to prune in it.
        ends_after: How often a pass uses each of them, if it may end once it has, as what comes out is of no use.
        hidden: The hidden states before the block; after `advance` those before the next.
    """

    def __init__(
        self,
        found: SweepableBlocks,
        index: int,
        calls: list[BlockCall],
        hidden: list[Tensor],
        settings: PruningConfig,
        step: Callable[[], None],
        is_last: bool,
    ) -> None:
        self._block, self._calls, self._settings, self._step = found.blocks[index], calls, settings, step
        self._outputs: list[Tensor] = []
        self._is_last, self.hidden = is_last, hidden
        self.weights = found.weights.get(id(self._block), [])
        names = {weight.name for weight in self.weights}
        uses = {key: count for key, count in found.uses.items() if key[0] in names}
        self.ends_after = uses if is_last or settings.update != "none" else None
        self._device = device_of(self._block) if settings.states_on_cpu or settings.device else None

    def run(self, number: int) -> Tensor:
        """Run the block on one micro-batch. What went in stays."""
        return self._output(number, self.hidden[number].clone())  # a block may add to its input in place

    def run_dense(self, number: int) -> None:
        """The same, and what comes out is what the next block sees, whatever becomes of this one."""
        self._outputs.append(self.run(number))

    def advance(self) -> None:
        """Go on to what is before the next block: what the pruned one gives, or what the dense one has given."""
        if self._is_last:
            return
        if self._outputs:
            self.hidden = self._outputs
            return
        for number, hidden in enumerate(self.hidden):
            self.hidden[number] = None  # each output takes the place of its input
            self.hidden[number] = self._output(number, hidden)

    def _output(self, number: int, hidden: Tensor) -> Tensor:
        call = self._calls[number]
        if self._device is not None:
            call, hidden = call.moved(self._device, {}), hidden.to(self._device)
        try:
            output = hidden_of(call.run(self._block, hidden))
        except AllSeen:
            self._step()
            raise
        self._step()
        return output.cpu() if self._settings.states_on_cpu else output


class BlockSweep:
    """All micro-batches before the first block of a list, with the arguments that the model calls each block with.

    Args:
        found: The list.
        data: Calibration data.
        forward: Runs the model on a batch.
        config: Where blocks are computed and hidden states are kept.
        step: Called after each pass of a micro-batch.

    Raises:
        NotSweepable: if the batches take different ways through the blocks.
    """

    def __init__(
        self,
        found: SweepableBlocks,
        data: Sequence[MicroBatch],
        forward: Callable[[Any], Any],
        config: PruningConfig,
        step: Callable[[], None],
    ) -> None:
        self._found, self._config, self._step = found, config, step
        captured = [self._captured(batch, forward) for batch in data]
        self._order = [index for index, _ in captured[0]]
        if not self._order or any([index for index, _ in calls] != self._order for calls in captured):
            raise NotSweepable(
                "batches take different ways through the blocks" if self._order else "no block is called"
            )
        self._hidden = [calls[0][1].hidden for calls in captured]
        # All calls hold the hidden state before the first block, which is of no use to the later ones.
        self._calls = [[call.without_hidden() for _, call in calls] for calls in captured]

    @property
    def weights(self) -> list[PrunableWeight]:
        """The weights that are pruned in the blocks."""
        return [weight for own in self._found.weights.values() for weight in own]

    def turns(self) -> Iterator[BlockTurn]:
        """Each block in calling order, on the device that computes; whoever takes it has it `advance`."""
        for position, index in enumerate(self._order):
            # Popped: a block's masks and embeddings are not needed again.
            calls = [batch_calls.pop(0) for batch_calls in self._calls]
            with _on_device(self._found.blocks[index], self._config.device):
                is_last = position + 1 == len(self._order)
                turn = BlockTurn(self._found, index, calls, self._hidden, self._config, self._step, is_last)
                yield turn
            self._hidden = turn.hidden

    def _captured(self, batch: MicroBatch, forward: Callable[[Any], Any]) -> list[tuple[int, BlockCall]]:
        calls = capture_calls(self._found.blocks, lambda: forward(batch.data), simple=self._found.simple).calls
        if self._config.states_on_cpu:
            memo: dict[int, Tensor] = {}
            calls = [(index, call.moved("cpu", memo)) for index, call in calls]
        self._step()
        return calls


@contextmanager
def _on_device(block: nn.Module, device: str | None) -> Iterator[None]:
    """A block on the device that computes, and back where it was."""
    if device is None:
        yield
        return
    home = {tensor.device for tensor in (*block.parameters(), *block.buffers())}
    try:
        block.to(device)
        yield
    finally:
        block.to(home.pop() if len(home) == 1 else "cpu")
