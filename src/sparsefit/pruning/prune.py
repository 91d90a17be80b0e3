"""Pruning a model: Algorithm 1 of Wanda (Sun et al. 2023, arXiv 2306.11695), block by block or in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsefit.calibration.batches import Forward
from sparsefit.calibration.padding import watching_padding
from sparsefit.pruning.block_runner import BlockRunner
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.input_groups import InputGroup, Parts, input_groups
from sparsefit.pruning.input_watch import evaluating
from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.pruning.mapped_weights import MappedWeights
from sparsefit.pruning.results import DenseStatistics, PruningResult, checksums
from sparsefit.pruning.run import PruningRun
from sparsefit.pruning.steps import ByWeight, Solution, Steps
from sparsefit.pruning.work_sharing import solutions
from sparsefit.ranks import errors_on_all_ranks

Progress = Callable[[int, int], None]


def prune(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    config: PruningConfig | None = None,
    *,
    forward: Forward | None = None,
    progress: Progress | None = None,
    mapped: MappedWeights | None = None,
) -> PruningResult:
    """Prune a model in place.

    After an error or an interrupt the model is dense again, bit for bit.

    Args:
        model: Any module, including transformers models and PEFT-wrapped models (whose base is pruned).
        batches: Calibration data: each batch is a mapping (keyword arguments of the model), a tuple (its positional
            arguments) or one tensor. The first dimension of each tensor is the sample, or lists hold one mapping per
            sample; other batches are not regrouped. Positions that a padding mask of the model excludes do not count.
            The data is read once. Magnitude pruning does not need it, but without it cannot tell which layers are used.
        config: What to prune and how; by default Wanda at 50% per output, block by block.
        forward: Runs the model on a batch; by default the model is called with the batch, on its device.
        progress: Called with (steps done, total steps) during calibration, and with both equal once all weights are
            pruned. An exception that it raises ends the pruning and restores the dense model.
        mapped: The memory-mapped files of the weights of a model that is larger than memory. Weights that are not in
            use are released, and nothing is kept to undo the pruning: after an error the files are not usable.

    Returns:
        The masks and a record of the pruning.

    Raises:
        ConfigError: if the configuration does not fit the model.
        CalibrationError: if there is no calibration data, or it does not fit the model or gives NaN.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> prune(model, [torch.randn(16, 4)], PruningConfig(sparsity=0.5)).masks.sparsity
    0.5
    """
    run = PruningRun(model, config or PruningConfig(), progress, mapped)
    with run.undone_by_errors(), torch.no_grad(), evaluating(model), watching_padding(model) as watch:
        run.read(batches, forward, watch)
        run.find_targets(run.trace())
        if run.config.takes_one_pass:
            _in_one_pass(run)
        else:
            _block_by_block(run)
    return run.result


def _in_one_pass(run: PruningRun) -> None:
    """Prune all weights from statistics of the dense network (the paper's order for image classifiers)."""
    parts = run.collect(run.weights, run.config.statistics) if run.config.needs_inputs else {}
    run.allocate(parts)
    _prune_weights(run, run.weights, parts)


def _block_by_block(run: PruningRun) -> None:
    """Prune one block after another, each from the outputs of the pruned blocks before it (the paper's order for
    language models); weights outside the blocks come last.

    With update "none" a block's inputs are the outputs of the dense blocks before it. Blocks still run one by one then
    if Gram matrices are needed, as those of all layers together are many times the size of the model.
    """
    dense, kinds = run.config.update == "none", run.config.statistics
    if run.config.passes_to_allocate:
        run.allocate(run.collect(run.weights, ()))
    runners: Iterable[BlockRunner] = run.block_runners()  # lazily: a decoder's inputs come from the pruned encoder
    if dense:  # at once: all inputs come from the dense model
        runners = list(runners)
        rest = run.collect(run.outside(runners), kinds)
    for runner in runners:
        for weights in runner.each_block():
            parts = run.collect(weights, kinds, runner.run_block, runner.to_the_end, runner.block)
            _prune_weights(run, weights, parts)
            runner.advance()
    if not dense:
        rest = run.collect(run.outside(), kinds)
    _prune_weights(run, run.outside(), rest)


def _prune_weights(run: PruningRun, weights: Sequence[PrunableWeight], parts: Parts) -> None:
    """Prune weights, in groups that have the same inputs; the groups are divided among ranks."""
    failure: Exception | None = None
    for group, solution in solutions(input_groups(weights, parts), partial(_solve, run)):
        try:
            if failure is None:
                run.apply(group, solution)
        except Exception as error:  # raised when this rank has sent the others what they wait for
            failure = error
    with errors_on_all_ranks():
        if failure is not None:
            raise failure


def _solve(run: PruningRun, group: InputGroup, dense: ByWeight) -> Solution:
    """Score the weights of a group and choose masks; if configured, refine the masks and update the kept weights."""
    config = run.config
    steps = Steps(group, dense, config, run.counts, run.scales)
    if config.existing_zeros == "adopt":
        return steps.solution(steps.adopt())
    if config.statistics and not group.has_nonzero_inputs:
        return steps.solution(steps.select_by_magnitude())
    if config.reconstruction == "iterative":
        return steps.solution(*steps.iterate())
    masks = steps.select()
    if config.swaps:
        masks = steps.refine(masks)
    return steps.solution(masks, steps.update(masks) if config.reconstruction else None)


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    configs: Iterable[PruningConfig],
    *,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> DenseStatistics:
    """Collect, in one pass of the data through a dense model, the statistics that several pruning runs of it need.

    Each run is then `prune_from_statistics(model, statistics, config)`, which reads no data and does not run the model.
    If a configuration needs Gram matrices, those of all layers are held at once. The model is not changed; arguments
    and errors are those of `prune`. Only configurations that `prune_from_statistics` takes are considered.

    >>> model, config = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), PruningConfig(update="none")
    >>> statistics = collect_statistics(model, [torch.randn(16, 4)], [config])
    >>> prune_from_statistics(model, statistics, config).masks.sparsity
    0.5
    """
    configs = [config for config in configs if config.takes_statistics] or [PruningConfig(update="none")]
    runs = [PruningRun(model, config, progress) for config in configs]
    kinds = frozenset({"squared_norm"}).union(*(config.statistics for config in configs))
    run = runs[0]
    with torch.no_grad(), evaluating(model), watching_padding(model) as watch:
        run.read(batches, forward, watch)
        found = run.trace()
        for one in runs:
            one.find_targets(found)
        weights = list({weight.name: weight for one in runs for weight in one.weights}.values())
        parts = run.collect(weights, kinds)
    run.finish()
    result = run.result
    return DenseStatistics(parts, kinds, found, checksums(weights), result.samples, result.seconds, tuple(result.notes))


def prune_from_statistics(
    model: nn.Module, statistics: DenseStatistics, config: PruningConfig, *, progress: Progress | None = None
) -> PruningResult:
    """Prune a model in place with the statistics of `collect_statistics`, without reading data or running the model.

    The configuration must have update "none", or need no inputs, and no allocation "fisher". Raises a `ConfigError` if
    the statistics do not fit it, or are of another model.

    >>> model, config = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), PruningConfig(update="none", pattern="2:4")
    >>> statistics = collect_statistics(model, [torch.randn(16, 4)], [config])
    >>> prune_from_statistics(model, statistics, config).masks["0.weight"].sum(dim=1).tolist()
    [2, 2, 2, 2, 2, 2, 2, 2]
    """
    run = PruningRun(model, config, progress)
    run.find_targets(statistics.trace)
    statistics.check(run.weights, config)
    with run.undone_by_errors(), torch.no_grad():
        parts = {weight.name: statistics.parts.get(weight.name, []) for weight in run.weights}
        run.allocate(parts)
        _prune_weights(run, run.weights, parts)
    run.result.samples = statistics.samples if config.needs_inputs else 0
    return run.result
