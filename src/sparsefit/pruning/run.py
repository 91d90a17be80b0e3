"""The state of one pruning run: the weights to prune, the result so far, and how to undo it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from sparsefit.calibration.batches import Forward, MicroBatch, calibration_data, checked_batches, forward_of, passing
from sparsefit.calibration.padding import PaddingWatch
from sparsefit.errors import ConfigError
from sparsefit.pruning.allocation import allocate, by_change
from sparsefit.pruning.block_runner import BlockRunner
from sparsefit.pruning.blocks import BlocksNotSequential, find_block_lists
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.fisher import check_gradients, sensitivities
from sparsefit.pruning.fisher_checks import check_whole_weights
from sparsefit.pruning.input_groups import InputGroup, Parts, input_groups
from sparsefit.pruning.layers.base import PrunableWeight, is_dense
from sparsefit.pruning.layers.sharded import counted
from sparsefit.pruning.mapped_weights import MappedWeights
from sparsefit.pruning.results import PruningResult
from sparsefit.pruning.scores import SCORES
from sparsefit.pruning.statistics_collector import collect
from sparsefit.pruning.steps import Solution
from sparsefit.pruning.targets import CHECKS, find_candidates, find_weights
from sparsefit.pruning.tracing import Trace, trace
from sparsefit.pruning.undo import Undo
from sparsefit.ranks import errors_on_all_ranks, from_all
from sparsefit.sharded import check_layout, reshard, units_of


class PruningRun:
    """Finds the weights of a model, collects their statistics and applies the masks.

    Raises a `ConfigError` if the configuration does not fit the model.

    Attributes:
        weights: All weights to prune, in the order of the model.
        counts: How many weights each matrix loses, unless every comparison group loses the same share.
        scales: Factors of the scores of the rows, (out,), with allocation "fisher".
        result: The result so far.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruningConfig,
        progress: Callable[[int, int], None] | None,
        mapped: MappedWeights | None = None,
    ) -> None:
        self._start = time.perf_counter()
        _check_device_is_here(config.device)
        self.config, self._model, self._progress = config, model, progress or (lambda done, total: None)
        reshard(model)
        check_layout(model)
        self._sharded = bool(units_of(model))
        if self._sharded and config.device is not None:
            raise ConfigError(
                f"the model is sharded over ranks, whose devices compute: leave out device='{config.device}'"
            )
        check_whole_weights(config, self._sharded, mapped is not None)
        self._block_lists = find_block_lists(model)
        self._blocks = [block for blocks in self._block_lists for block in blocks]
        find_candidates(model, config)  # raises errors in the names of targets before any data is read
        for check in CHECKS:
            check(model, config)
        self.weights: list[PrunableWeight] = []
        self.counts: dict[str, int] = {}
        self.scales: dict[str, Tensor] = {}
        self.result = PruningResult(config, "none" if config.takes_one_pass else config.update)
        self._mapped = mapped
        self._undo = Undo()
        self._unseen: list[str] = []
        self._dead: list[str] = []
        self._steps_done, self._steps_in_all, self._steps_of_model = 0, 1, 1

    @contextmanager
    def undone_by_errors(self) -> Iterator[None]:
        """Restore the dense model if anything in the context raises; otherwise finish the result at its end."""
        try:
            with self._mapped.following(self._blocks) if self._mapped else nullcontext():
                yield
            with errors_on_all_ranks():
                self.finish()
        except BaseException:
            with torch.no_grad():
                self._undo.restore()
            raise

    def read(self, batches: Iterable[Any] | None, forward: Forward | None, watch: PaddingWatch) -> None:
        """Read the calibration data; if none is needed, one batch of what was given, to trace the model."""
        config = self.config
        if not config.needs_inputs:
            with errors_on_all_ranks():
                batches = list(itertools.islice([] if batches is None else checked_batches(batches), 1))
            if not all(from_all(bool(batches))):  # the model is traced on all ranks or on none
                batches = []
        self._data: list[MicroBatch] = []
        if config.needs_inputs or batches:
            needed_by = _what_needs_inputs(config)
            self._data = calibration_data(self._model, batches, config.micro_batch_size, forward, needed_by, watch)
        self._forward = passing(self._data, watch, forward_of(self._model, forward))
        if config.needs_inputs:
            self.result.samples = sum(from_all(sum(len(batch.origin) for batch in self._data)))
            of_blocks = len(self._blocks) * (1 if config.update == "none" else 2) + len(self._block_lists)
            self._steps_of_model = 1 if config.takes_one_pass else max(1, len(self._blocks))
            of_model = self._steps_of_model * (min(1, config.passes_to_allocate) + 3 * (config.allocation == "fisher"))
            # A single pass is the first one of an allocation, too.
            steps = max(1, of_model) if config.takes_one_pass else (of_blocks or 1) + of_model
            self._steps_in_all = steps * len(self._data) + 1  # one more step at the end

    def _step(self, steps: int = 1) -> None:
        """A micro-batch went through a block. A pass of the whole model is a step for each block, a backward pass two
        of them, so that the time that is left can be told from the steps."""
        self._steps_done = min(self._steps_done + steps, self._steps_in_all - 1)
        self._progress(self._steps_done, self._steps_in_all)

    def trace(self) -> Trace | None:
        """Trace the model with the calibration samples (see `tracing.trace`)."""
        return trace(self._model, self._data, self._forward)

    def find_targets(self, trace: Trace | None) -> None:
        """Decide which weights are pruned, with the trace of the model if there is one."""
        self._shares = trace.shares if trace else {}
        targets = find_weights(self._model, self._blocks, self.config, trace, self._one_by_one)
        self.weights, self.result.left_dense = targets.weights, targets.left_dense
        self.result.dense_sizes, self.result.dense_zeros = targets.sizes, targets.zeros
        self._look_at_existing_zeros()
        if self.config.allocation == "fisher":
            check_gradients(self._model, self.weights)
        if not self.config.passes_to_allocate:
            self.counts = allocate(self.weights, self.config)

    def _look_at_existing_zeros(self) -> None:
        if self.config.existing_zeros not in (None, "adopt"):
            return
        dense = [weight for weight in self.weights if is_dense(weight.parameter)]
        filled = counted(self._one_by_one(dense), lambda weight: weight.held().count_nonzero())
        shares = {weight.name: 1 - filled[weight.name] / prod(weight.shape) for weight in dense}
        most = max(shares, key=shares.get, default=None)
        if self.config.existing_zeros == "adopt" and (most is None or not shares[most]):
            raise ConfigError("the model has no zeros to adopt: leave out existing_zeros, and it is pruned")
        many = [name for name, share in shares.items() if share > 0.05]
        if self.config.existing_zeros is None and many:
            self.result.note(
                f"{len(many)} matrices are more than 5% zeros already ({most}: {shares[most]:.1%}), which count as "
                "weights like any other and may get values again. Set existing_zeros to 'keep' (they stay zero, and "
                "pruning goes on from them), to 'adopt' (they are the masks), or to 'ignore'"
            )

    def finish(self) -> None:
        """Complete the result: its notes and the time; report the last step of progress."""
        for which in _by_parameter(self._unseen):
            self.result.note(f"{which} saw no calibration token; pruned by magnitude")
        for which in _by_parameter(self._dead):
            self.result.note(f"the inputs of {which} were zero in all calibration data; pruned by magnitude")
        if self.config.existing_zeros == "keep" and self.result.masks.sparsity > self.config.sparsity + 0.001:
            self.result.note(
                "the model had more zeros than were asked for, and they were kept: "
                f"{self.result.masks.sparsity:.2%} of what was pruned is zero"
            )
        if self.result.masks:
            self.result.note_coverage()
        self.result.seconds = time.perf_counter() - self._start
        self._progress(self._steps_in_all, self._steps_in_all)

    def collect(
        self,
        weights: Sequence[PrunableWeight],
        kinds: Iterable[str],
        run: Callable[[int], object] | None = None,
        to_the_end: bool = False,
        part: nn.Module | None = None,
    ) -> Parts:
        """Collect statistics of the inputs of some weights (see `statistics_collector.collect`). By default the whole
        model runs, or nothing if there are no weights. A pass may stop at the last of them unless `to_the_end`."""
        if run is None and not weights:
            return {}
        step = self._step if run is not None else partial(self._step, self._steps_of_model)
        run = run or (lambda number: self._forward(self._data[number].data))
        shares = {} if to_the_end or self._sharded else self._shares  # all ranks go through all of a sharded model
        parts = collect(weights, kinds, self._data, run, self.result.note, shares, step, self._model, part)
        tokens = [part.statistics.tokens for found in parts.values() for part in found]
        self.result.tokens = max([self.result.tokens, *tokens])
        return parts

    def allocate(self, parts: Parts) -> None:
        """With allocation "owl" or "fisher", decide from statistics of the dense network, and its gradients, how many
        weights each matrix loses."""
        if self.config.allocation == "owl":
            owners = {module: number for number, block in enumerate(self._blocks) for module in block.modules()}
            # A weight outside the blocks is a group of its own.
            groups = {w.name: owners.get(w.layers[0], -1 - number) for number, w in enumerate(self.weights)}
            self.counts = allocate(self.weights, self.config, groups, parts, self._one_by_one)
        elif self.config.allocation == "fisher":
            step = partial(self._step, 3 * self._steps_of_model)  # forward and backward
            recurrent = any(isinstance(module, nn.RNNBase) for module in self._model.modules())
            # cuDNN's recurrent layers have no backward pass in evaluation mode.
            with torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext():
                found = sensitivities(self.weights, parts, self.config, self._data, self._forward, step)
            groups = [group for group in input_groups(self.weights, parts) if group.has_nonzero_inputs]
            unknown = [weight.name for group in groups for weight in group.weights if weight.name not in found]
            if unknown:
                self.result.note(
                    f"allocation 'fisher': no gradient of the predictions reaches {len(unknown)} of "
                    f"{len(self.weights)} matrices, such as {unknown[0]} (the model may run them under "
                    "torch.no_grad()); they lose the sparsity that was asked for"
                )
            curves = {name: own.curve for name, own in found.items()}
            sizes = {weight.name: prod(weight.shape) for weight in self.weights}
            self.counts = by_change(sizes, curves, self.config.exact_sparsity, self.config.fisher_spread)
            self.scales = {name: own.scales for name, own in found.items()}

    def block_runners(self) -> Iterator[BlockRunner]:
        """A runner for each list of blocks. The inputs of its first block are computed with the model as it is when the
        runner is yielded.

        A list whose blocks cannot be run one by one is left out, with a note.
        """
        reasons, found = [] if self._block_lists else ["no repeated blocks were found in the model"], False
        for blocks in self._block_lists:
            try:
                with errors_on_all_ranks():
                    runner = BlockRunner(
                        self._model, blocks, self.weights, self._data, self._forward, self.config, self._step
                    )
            except BlocksNotSequential as reason:
                reasons.append(str(reason))
                continue
            if runner.weights:
                yield runner
                found = True
        if reasons and self.config.device is not None:
            raise ConfigError(
                f"the model cannot be pruned block by block on '{self.config.device}': {reasons[0]}. Put the whole "
                "model on one device and leave out `device`"
            )
        then = "these blocks are pruned after the others, from one pass of the data"
        if reasons and not found:
            self.result.update = "none"
            then = "pruned with update='none': statistics of the dense network in one pass"
        for reason in reasons if self.config.update != "none" else ():
            self.result.note(f"{reason}; {then}")

    def outside(self, runners: Iterable[BlockRunner] = ()) -> list[PrunableWeight]:
        """The weights that are not pruned yet and not in the blocks of these runners."""
        inside = {weight.name for runner in runners for weight in runner.weights}.union(self.result.masks)
        return [weight for weight in self.weights if weight.name not in inside]

    def apply(self, group: InputGroup, solution: Solution) -> None:
        """Prune the weights of a group in place, and add the solution to the result."""
        if self.config.statistics and not group.has_nonzero_inputs:
            seen = any(statistics.tokens for statistics in group.by_statistics())
            (self._dead if seen else self._unseen).extend(solution.masks)
        self.result.layer_errors |= solution.errors
        for note in solution.notes:
            self.result.note(note)
        for weight in group.weights:
            mask = solution.masks[weight.name]
            bits = self.result.masks.add(weight.name, mask, weight.transposed)
            if self._mapped is None:  # mapped files are copies of the dense ones
                self._undo.keep(weight, mask if solution.values is None else None, bits)
            if solution.values is None:
                weight.apply_mask(mask)
            else:
                weight.set_values(solution.values[weight.name])
        self._let_go(group.weights)

    def _one_by_one(self, weights: Iterable[PrunableWeight]) -> Iterator[PrunableWeight]:
        """Iterate over weights, releasing each after use: of memory-mapped ones only one is in memory at a time."""
        for weight in weights:
            yield weight
            self._let_go([weight])

    def _let_go(self, weights: Iterable[PrunableWeight]) -> None:
        if self._mapped is not None:
            self._mapped.let_go(weight.parameter for weight in weights)


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


def _by_parameter(names: Iterable[str]) -> list[str]:
    """Names of weights; those of one stack of experts are joined: "experts.down_proj of the experts 1, 3"."""
    experts: dict[str, list[str]] = {}
    for name in names:
        parameter, _, number = name.removesuffix("]").partition("[")
        experts.setdefault(parameter, []).extend([number] if number else [])
    return [f"{name} of the experts {', '.join(numbers)}" if numbers else name for name, numbers in experts.items()]
