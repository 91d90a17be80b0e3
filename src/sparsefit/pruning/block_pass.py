"""One block at its turn: running all micro-batches through it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsefit.pruning.blocks import BlockCall, hidden_of
from sparsefit.pruning.calibration import MicroBatch
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.layerwise import run_in_step
from sparsefit.pruning.recording import AllSeen, InputRecorder
from sparsefit.pruning.watching import Seen
from sparsefit.pruning.weights import PrunableWeight, device_of


class BlockPass:
    """One block at its turn: all micro-batches before it, with the arguments that the model calls it with.

    Attributes:
        block: The block.
    """

    def __init__(
        self,
        block: nn.Module,
        data: list[MicroBatch],
        calls: list[BlockCall],
        hidden: list[Tensor | None],
        config: PruningConfig,
        step: Callable[[], None],
    ) -> None:
        self.block, self._data, self._calls, self._hidden = block, data, calls, hidden
        self._config, self._step = config, step
        here = device_of(block) if config.states_on_cpu else None
        self._device = here if config.device is None else torch.device(config.device)

    def run_one(self, number: int, last: bool = False) -> Tensor:
        """The block's output for one micro-batch; `last` if its input is not needed any more."""
        call, hidden = self._calls[number], self._hidden[number]
        if last:
            self._hidden[number] = None
        if self._device is not None:
            call, hidden = call.moved(self._device, {}), hidden.to(self._device)
        # A block may add to its input in place.
        output = hidden_of(call.run(self.block, hidden if last else hidden.clone()))
        self._step()
        return output.cpu() if self._config.states_on_cpu else output

    def observe(self, recorder: InputRecorder) -> None:
        """Run all micro-batches for what the recorder sees alone, each no further than it must."""
        for number, batch in enumerate(self._data):
            recorder.next_batch(batch, may_stop=True)
            try:
                self.run_one(number)
            except AllSeen:
                self._step()

    def run(self, recorder: InputRecorder) -> list[Tensor]:
        """The block's outputs for all micro-batches, watched."""
        outputs = []
        for number, batch in enumerate(self._data):
            recorder.next_batch(batch)
            outputs.append(self.run_one(number))
        return outputs

    def run_last(self) -> list[Tensor]:
        """The block's outputs for all micro-batches. Each takes the place of its input, so this is the last run."""
        for number in range(len(self._data)):
            self._hidden[number] = self.run_one(number, last=True)
        return self._hidden

    def run_in_step(
        self, weights: list[PrunableWeight], before: Callable[[PrunableWeight, list[tuple[MicroBatch, Seen]]], None]
    ) -> list[Tensor]:
        """The block's outputs for all micro-batches, which wait for each other before each weight."""
        computations = [lambda number=number: self.run_one(number, last=True) for number in range(len(self._data))]
        return run_in_step(
            computations, weights, lambda weight, waiting: before(weight, [(self._data[n], s) for n, s in waiting])
        )
