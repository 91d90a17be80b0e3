"""The orders of a pruning: block by block, layer by layer, or all from the dense network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from sparsefit.errors import ConfigError
from sparsefit.pruning.allocation import allocate
from sparsefit.pruning.block_pass import BlockPass
from sparsefit.pruning.blocks import BlockCall, NotSweepable, capture_calls
from sparsefit.pruning.calibration import MicroBatch
from sparsefit.pruning.changes import Changes
from sparsefit.pruning.choice import Chooser, describe_unseen
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.ranks import errors_on_all_ranks, is_distributed
from sparsefit.pruning.recording import InputRecorder, InputsDiverged, Part, check_finite, real_tokens
from sparsefit.pruning.statistics import InputStatistics
from sparsefit.pruning.watching import Seen
from sparsefit.pruning.weights import PrunableWeight

Visit = Callable[[BlockPass, list[PrunableWeight], bool], list[Tensor]]


class Sweep:
    """One pruning under way: what has been chosen so far and the progress made."""

    def __init__(
        self,
        weights: list[PrunableWeight],
        block_lists: list[list[nn.Module]],
        data: list[MicroBatch],
        config: PruningConfig,
        forward: Callable[[Any], Any],
        progress: Callable[[int, int], None],
        note: Callable[[str], None],
        given: dict[str, list[Part]] | None = None,
    ) -> None:
        self.weights, self.block_lists, self.data, self.config = weights, block_lists, data, config
        self.forward, self.progress, self.note, self._given = forward, progress, note, given
        self.changes = Changes()
        self.chooser = Chooser(config, note)
        self.errors: dict[str, float] = {}
        self.tokens = 0
        self.update = config.update
        self._counts: dict[str, int] = {}
        self._steps_done, self._steps_in_all = 0, len(data) + 1  # the last step is the choice made

    def run(self) -> Changes:
        """Choose what becomes of all weights. The weights themselves are as they were when this returns."""
        # A whole pass would hold the Gram matrices of all layers at once, and needs all of the model on one device.
        whole = self.config.update == "none" and "gram" not in self.config.statistics and self.config.device is None
        in_blocks = bool(self.config.statistics) and not whole and self._given is None
        self._plan_steps(in_blocks)
        dense = self._allocate()
        if in_blocks:
            self._try_blocks()
        else:
            self.update = "none"
        rest = [weight for weight in self.weights if weight not in self.changes]
        if rest and self.config.statistics and not dense:
            with self.changes.made(self._chosen_before()):
                dense = self._statistics_of(rest, self.config.statistics, self._whole_passes)
        for weight in rest:
            self._choose(weight, dense.get(weight.name, []))
        for note in describe_unseen(self.chooser.unseen):
            self.note(note)
        self.progress(self._steps_in_all, self._steps_in_all)
        return self.changes

    def statistics_of_dense(self, kinds: frozenset[str]) -> dict[str, list[Part]]:
        """Statistics of the inputs of all weights in the network as it is, in one pass of the data."""
        self._steps_in_all = len(self.data) + 1
        parts = self._statistics_of(self.weights, kinds, self._whole_passes)
        self.progress(self._steps_in_all, self._steps_in_all)
        return parts

    def _plan_steps(self, in_blocks: bool) -> None:
        passes = {"block": 2, "layer": 1, "none": 1}[self.config.update]
        swept = passes * sum(map(len, self.block_lists)) + len(self.block_lists) if in_blocks else 1
        self._steps_in_all = (swept + (self.config.allocation == "owl")) * len(self.data) + 1

    def _try_blocks(self) -> None:
        visit = {"block": self._visit, "layer": self._visit_layer_by_layer, "none": self._visit_dense}
        try:
            self._sweep(visit[self.config.update])
        except NotSweepable as reason:
            self.changes, self.chooser, self.errors = Changes(), Chooser(self.config, self.note), {}
            if self.config.device is not None:
                raise ConfigError(
                    f"the model cannot be pruned block by block on '{self.config.device}': {reason}. Put the whole "
                    "model on one device and leave out `device`"
                ) from reason
            if self.config.update != "none":
                self.note(f"{reason}; pruned with update='none': statistics of the dense network in one pass")
            self.update = "none"

    def _sweep(self, visit: Visit) -> None:
        """Take all micro-batches through the blocks of every list, one block after the other."""
        if not self.block_lists:
            raise NotSweepable("no repeated blocks were found in the model")
        by_block = self._weights_by_block()
        for blocks in self.block_lists:
            # An encoder is pruned before its decoder's inputs are computed.
            with self.changes.made(self._chosen_before()):
                probe = self.data[0].first_sample()
                simple = capture_calls(blocks, lambda probe=probe: self.forward(probe), to_the_end=True).simple
                captured = [self._captured(blocks, batch, simple) for batch in self.data]
            order = [index for index, _ in captured[0]]
            if not order or any([index for index, _ in calls] != order for calls in captured):
                raise NotSweepable("batches take different ways through the blocks" if order else "no block is called")
            hidden = [calls[0][1].hidden for calls in captured]
            # All calls hold the hidden state before the first block, which is of no use to the later ones.
            captured = [[(index, call.without_hidden()) for index, call in calls] for calls in captured]
            for position, index in enumerate(order):
                block = blocks[index]
                # Popped: a block's masks and embeddings are not needed again.
                calls = [batch_calls.pop(0)[1] for batch_calls in captured]
                with self._on_device(block):
                    turn = BlockPass(block, self.data, calls, hidden, self.config, self._step)
                    hidden = visit(turn, by_block.get(id(block), []), position + 1 < len(order))

    def _weights_by_block(self) -> dict[int, list[PrunableWeight]]:
        owners: dict[int, set[int]] = {}
        for block in (block for blocks in self.block_lists for block in blocks):
            for module in block.modules():
                owners.setdefault(id(module), set()).add(id(block))
        by_block: dict[int, list[PrunableWeight]] = {}
        for weight in self.weights:
            homes = set().union(*(owners.get(id(layer), set()) for layer in weight.layers))
            if len(homes) > 1:
                raise NotSweepable(f"blocks share the weight {weight.name}")
            if homes:
                by_block.setdefault(homes.pop(), []).append(weight)
        return by_block

    def _captured(self, blocks: list[nn.Module], batch: MicroBatch, simple: bool) -> list[tuple[int, BlockCall]]:
        calls = capture_calls(blocks, lambda: self.forward(batch.data), simple=simple).calls
        if self.config.states_on_cpu:
            memo: dict[int, Tensor] = {}
            calls = [(index, call.moved("cpu", memo)) for index, call in calls]
        self._step()
        return calls

    @contextmanager
    def _on_device(self, block: nn.Module) -> Iterator[None]:
        """A block on the device that computes, and back where it was."""
        if self.config.device is None:
            yield
            return
        home = {parameter.device for parameter in (*block.parameters(), *block.buffers())}
        try:
            block.to(self.config.device)
            yield
        finally:
            block.to(home.pop() if len(home) == 1 else "cpu")

    def _visit(self, turn: BlockPass, weights: list[PrunableWeight], needs_outputs: bool) -> list[Tensor]:
        """Algorithm 1 of the paper: statistics of a dense block, its masks, and its pruned outputs for the next one."""
        self._choose_from(weights, turn.observe)
        if not needs_outputs:
            return []
        with self.changes.made(weights):
            return turn.run_last()

    def _visit_dense(self, turn: BlockPass, weights: list[PrunableWeight], needs_outputs: bool) -> list[Tensor]:
        """The same, but the next block sees what the dense one gives."""
        if not needs_outputs:
            self._choose_from(weights, turn.observe)
            return []
        outputs: list[Tensor] = []

        def run(recorder: InputRecorder) -> None:
            outputs[:] = turn.run(recorder)

        self._choose_from(weights, run)
        return outputs

    def _choose_from(self, weights: list[PrunableWeight], run: Callable[[InputRecorder], None]) -> None:
        parts = self._statistics_of(weights, self.config.statistics, run)
        for weight in weights:
            self._choose(weight, parts[weight.name])

    def _visit_layer_by_layer(
        self, turn: BlockPass, weights: list[PrunableWeight], needs_outputs: bool
    ) -> list[Tensor]:
        """Each layer's statistics come from layers pruned before it, within the block too, in a single pass."""
        gathered: dict[str, list[Part]] = {}
        last: list[tuple[list[tuple[MicroBatch, Seen]], InputStatistics]] = []

        def before(weight: PrunableWeight, waiting: list[tuple[MicroBatch, Seen]]) -> None:
            if weight in self.changes:
                self.note(f"{weight.name} is used again after it was pruned; its first use alone was counted")
                return
            # Ranks that share differently could not add up.
            if last and not is_distributed() and _same_inputs(last[0][0], waiting):
                statistics = last[0][1]
            else:
                statistics = self._statistics_from(weight, waiting)
                last[:] = [(waiting, statistics)]
            rows = waiting[0][1].rows if waiting else None
            parts = gathered.setdefault(weight.name, [])
            parts.append(Part(rows, statistics))
            if rows is None or rows.stop == weight.shape[0]:
                self._choose(weight, parts)
                pruned.enter_context(self.changes.made([weight], now=True))

        with ExitStack() as pruned:
            outputs = turn.run_in_step(weights, before)
        for weight in weights:
            if weight not in self.changes:
                self._choose(weight, gathered.get(weight.name, []))
        return outputs

    def _statistics_from(self, weight: PrunableWeight, waiting: list[tuple[MicroBatch, Seen]]) -> InputStatistics:
        statistics = InputStatistics(weight.shape[1], weight.device, self.config.statistics)
        with errors_on_all_ranks():
            for batch, seen in waiting:
                tokens, note = real_tokens(seen, batch)
                if note:
                    self.note(note)
                check_finite(statistics.add(tokens), seen, batch)
        statistics.reduce_over_ranks()
        self.tokens = max(self.tokens, statistics.tokens)
        return statistics

    def _statistics_of(
        self, weights: list[PrunableWeight], kinds: frozenset[str], run: Callable[[InputRecorder], None]
    ) -> dict[str, list[Part]]:
        for apart in (False, True):
            recorder = InputRecorder(weights, kinds, apart)
            try:
                with recorder.watching(), errors_on_all_ranks():
                    run(recorder)
                parts = recorder.parts()
                break
            except InputsDiverged:
                continue
        for note in sorted(recorder.notes):
            self.note(note)
        self.tokens = max([self.tokens, *(part.statistics.tokens for found in parts.values() for part in found)])
        return parts

    def _whole_passes(self, recorder: InputRecorder) -> None:
        for batch in self.data:
            recorder.next_batch(batch)
            self.forward(batch.data)
            self._step()

    def _allocate(self) -> dict[str, list[Part]]:
        """Decide how many weights each matrix loses, where that is not the same share of every group.

        Returns:
            The statistics of the dense network, if they were taken for it and will do for the choice as well.
        """
        if self.config.allocation != "owl":
            self._counts = allocate(self.weights, self.config)
            return self._given or {}
        reusable = self._given is not None or (self.config.update == "none" and "gram" not in self.config.statistics)
        kinds = self.config.statistics if reusable else frozenset()
        parts = self._given or self._statistics_of(self.weights, kinds, self._whole_passes)
        self._counts = allocate(self.weights, self.config, self._groups(), parts)
        return parts if reusable else {}

    def _groups(self) -> dict[str, int]:
        """The block of each weight, by number; a weight outside the blocks is a group of its own."""
        owners = {id(m): b for b, block in enumerate(b for bs in self.block_lists for b in bs) for m in block.modules()}
        return {w.name: owners.get(id(w.layers[0]), -1 - number) for number, w in enumerate(self.weights)}

    def _choose(self, weight: PrunableWeight, parts: list[Part]) -> None:
        choice = self.chooser.choose(weight, parts, self._counts.get(weight.name))
        self.changes.add(weight, choice, called=any(part.statistics.tokens for part in parts))
        if choice.error is not None:
            self.errors[weight.name] = choice.error

    def _chosen_before(self) -> list[PrunableWeight]:
        """The weights that are pruned already where later statistics are taken."""
        return [] if self.update == "none" else [weight for weight in self.weights if weight in self.changes]

    def _step(self) -> None:
        self._steps_done = min(self._steps_done + 1, self._steps_in_all - 1)
        self.progress(self._steps_done, self._steps_in_all)


def _same_inputs(before: list[tuple[MicroBatch, Seen]], now: list[tuple[MicroBatch, Seen]]) -> bool:
    return len(before) == len(now) and all(
        a is b and seen.same_input(earlier) for (a, earlier), (b, seen) in zip(before, now, strict=True)
    )
