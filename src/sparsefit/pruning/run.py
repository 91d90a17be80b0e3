"""One pruning under way: what it is to prune, what it has decided, and how to take that back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsefit.errors import ConfigError
from sparsefit.pruning.allocation import allocate
from sparsefit.pruning.block_sweep import BlockSweep, sweepable
from sparsefit.pruning.blocks import NotSweepable, find_block_lists
from sparsefit.pruning.calibration import Forward, MicroBatch, calibration_data
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.groups import InputGroup, Parts
from sparsefit.pruning.inputs import collect
from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.pruning.padding import PaddingWatch
from sparsefit.pruning.ranks import of_first_rank
from sparsefit.pruning.results import PruningResult
from sparsefit.pruning.scores import SCORES
from sparsefit.pruning.steps import Steps, describe_unseen
from sparsefit.pruning.targets import find_weights
from sparsefit.pruning.undo import Undo

Progress = Callable[[int, int], None]


class PruningRun:
    """Finds the weights of a model, and holds what becomes of them.

    Args:
        model: The dense model.
        config: What to prune and how.
        progress: Called with (steps done, steps in all).

    Attributes:
        weights: All weights that are pruned, in the order of the model.
        counts: How many weights each loses, where that is not the same share of every comparison group.
        result: The account so far.

    Raises:
        ConfigError: if the configuration does not fit the model.
    """

    def __init__(self, model: nn.Module, config: PruningConfig, progress: Callable[[int, int], None] | None) -> None:
        self._start = time.perf_counter()
        _check_device_is_here(config.device)
        self.config, self._model, self._progress = config, model, progress
        self._block_lists = find_block_lists(model)
        blocks = [block for blocks in self._block_lists for block in blocks]
        self.weights, left_dense = find_weights(model, blocks, config)
        update = "none" if self.takes_one_pass else config.update
        self.result = PruningResult(config, update, left_dense=left_dense)
        self.counts: dict[str, int] = {} if config.allocation == "owl" else allocate(self.weights, config)
        self._undo, self._unseen = Undo(), []
        self._steps_done, self._steps_in_all = 0, 1

    @property
    def takes_one_pass(self) -> bool:
        """Whether all statistics are taken at once: those of the dense network, where they fit in memory."""
        config = self.config
        if not config.statistics:
            return True
        return config.update == "none" and "gram" not in config.statistics and config.device is None

    @contextmanager
    def undone_by_errors(self) -> Iterator[None]:
        """Whatever goes wrong in it, the model is dense afterwards. Ends with the account of the pruning."""
        try:
            yield
            self.finish()
        except BaseException:
            with torch.no_grad():
                self._undo.restore()
            raise

    def finish(self) -> None:
        """Close the account."""
        for sentence in describe_unseen(self._unseen):
            self.result.note(sentence)
        self.result.seconds = time.perf_counter() - self._start
        if self._progress is not None:
            self._progress(self._steps_in_all, self._steps_in_all)

    def calibration_data(
        self, batches: Iterable[Any] | None, forward: Forward | None, watch: PaddingWatch
    ) -> list[MicroBatch]:
        """The calibration data in micro-batches; nothing if none is needed."""
        if not self.config.needs_inputs:
            return []
        size, needed_by = self.config.micro_batch_size, _what_needs_inputs(self.config)
        data = calibration_data(self._model, batches, size, forward, needed_by, watch)
        self.result.samples = sum(len(batch.origin) for batch in data)
        passes = 1
        if not self.takes_one_pass:
            of_blocks = 1 if self.config.update == "none" else 2
            passes = of_blocks * sum(map(len, self._block_lists)) + len(self._block_lists) or 1
            passes += self.config.allocation == "owl"
        self._steps_in_all = passes * len(data) + 1  # the last step is that all is done
        return data

    def step(self) -> None:
        """Tell that one more micro-batch has gone through a block, or the model."""
        self._steps_done = min(self._steps_done + 1, self._steps_in_all - 1)
        if self._progress is not None:
            self._progress(self._steps_done, self._steps_in_all)

    def collect(
        self,
        weights: Sequence[PrunableWeight],
        data: Sequence[MicroBatch],
        run: Callable[[int], object],
        until: Mapping[Any, int] | None = None,
    ) -> Parts:
        """Statistics of some weights while `run` runs micro-batches: see `inputs.collect`."""
        return self._counted(collect(weights, self.config.statistics, data, run, self.result.note, until))

    def collect_whole(
        self, weights: Sequence[PrunableWeight], kinds: Iterable[str], data: Sequence[MicroBatch], forward: Forward
    ) -> Parts:
        """Statistics of some weights while the whole model runs; nothing, and no run, for no weights."""

        def run(number: int) -> None:
            forward(data[number].data)
            self.step()

        return self._counted(collect(weights, kinds, data, run, self.result.note)) if weights else {}

    def _counted(self, parts: Parts) -> Parts:
        tokens = [part.statistics.tokens for found in parts.values() for part in found]
        self.result.tokens = max([self.result.tokens, *tokens])
        return parts

    def allocate(self, parts: Parts) -> None:
        """Decide how many weights each matrix loses by what the dense network shows, if that is asked for (OWL)."""
        if self.config.allocation == "owl":
            self.counts = allocate(self.weights, self.config, self._blocks_of_weights(), parts)

    def _blocks_of_weights(self) -> dict[str, int]:
        """The block of each weight, by number; a weight outside the blocks is a group of its own."""
        blocks = (block for blocks in self._block_lists for block in blocks)
        owners = {id(module): number for number, block in enumerate(blocks) for module in block.modules()}
        return {w.name: owners.get(id(w.layers[0]), -1 - number) for number, w in enumerate(self.weights)}

    def sweeps(self, data: Sequence[MicroBatch], forward: Forward) -> Iterator[BlockSweep]:
        """Each list of blocks, with the calibration data before its first block: what the model gives at that time.

        A list whose blocks cannot be run one by one is left out, with a note.
        """
        reasons, found = [], 0
        for blocks in self._block_lists:
            try:
                shown = sweepable(blocks, self.weights, lambda: forward(data[0].first_sample()))
                if shown is not None:
                    yield BlockSweep(shown, data, forward, self.config, self.step)
                    found += 1
            except NotSweepable as reason:
                reasons.append(str(reason))
        if not self._block_lists:
            reasons.append("no repeated blocks were found in the model")
        self._tell_not_sweepable(reasons, found)

    def _tell_not_sweepable(self, reasons: list[str], found: int) -> None:
        if reasons and self.config.device is not None:
            raise ConfigError(
                f"the model cannot be pruned block by block on '{self.config.device}': {reasons[0]}. Put the whole "
                "model on one device and leave out `device`"
            )
        if reasons and not found:
            self.result.update = "none"
        for reason in reasons if self.config.update != "none" else ():
            if found:
                self.result.note(f"{reason}; these blocks are pruned after the others, from one pass of the data")
            else:
                self.result.note(f"{reason}; pruned with update='none': statistics of the dense network in one pass")

    def outside(self, sweeps: Iterable[BlockSweep] = ()) -> list[PrunableWeight]:
        """The weights that are not pruned yet, and are in none of some lists of blocks."""
        swept = {weight.name for sweep in sweeps for weight in sweep.weights}
        return [weight for weight in self.weights if weight.name not in swept and weight.name not in self.result.masks]

    def apply(
        self, group: InputGroup, steps: Steps, masks: dict[str, Tensor], values: dict[str, Tensor] | None
    ) -> None:
        """Prune the weights of a group, in place.

        Masks and values are those of the first rank: rounding on other hardware must not make models differ.
        """
        if not group.seen and self.config.statistics:
            self._unseen += masks
        elif "gram" in self.config.statistics:
            self.result.layer_errors |= steps.errors(masks, values)
        masks = steps.in_own_order(masks)
        values = None if values is None else steps.in_own_order(values)
        for weight in group.weights:
            mask = of_first_rank(masks[weight.name])
            bits = self.result.masks.add(weight.name, mask, weight.transposed)
            if values is None:
                self._undo.apply_mask(weight, mask, bits)
            else:
                self._undo.set_values(weight, of_first_rank(values[weight.name]))


def _check_device_is_here(device: str | None) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{device}' cannot be used here: {error}") from error


def _what_needs_inputs(config: PruningConfig) -> str:
    if SCORES[config.score].needs:
        return f"score '{config.score}'"
    if config.reconstruction:
        return f"reconstruction '{config.reconstruction}'"
    return f"swaps={config.swaps}" if config.swaps else f"allocation '{config.allocation}'"
