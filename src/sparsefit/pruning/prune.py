"""Pruning a model: Algorithm 1 of Wanda (Sun et al. 2023, arXiv 2306.11695), block by block or in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsefit.calibration.batches import Forward
from sparsefit.calibration.padding import watching_padding
from sparsefit.pruning.block_sweep import BlockSweep
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.groups import InputGroup, Parts, input_groups
from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.pruning.mapped import MappedWeights
from sparsefit.pruning.results import DenseStatistics, PruningResult, checksums
from sparsefit.pruning.run import PruningRun
from sparsefit.pruning.sharing import solutions
from sparsefit.pruning.steps import ByWeight, Solution, Steps
from sparsefit.pruning.watch import evaluating

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

    Whatever goes wrong, an error or an interrupt, the model is dense again afterwards, to the bit.

    Args:
        model: Any module; transformers decoders and PEFT-wrapped models among them (their base is pruned).
        batches: Calibration data: each a mapping (keyword arguments of the model), a tuple (its positional
            arguments) or one tensor. The first dimension of each tensor counts the samples, or lists hold a mapping
            for each; other batches go through whole. What a padding mask leaves out, whichever the model is called
            with, counts for nothing. Read once. Not needed for magnitude pruning, which then cannot tell what data
            reaches.
        config: What to prune and how; by default Wanda at 50% per output, block by block.
        forward: How a batch goes through the model; by default the model is called with it, on its device.
        progress: Called with (steps done, steps in all) as calibration goes on, and with both equal once all
            weights are pruned; what it raises ends the pruning with the model dense.
        mapped: The files that the weights are, where the model is larger than the memory: what is not in use is let
            go, and nothing is kept to undo the pruning. After an error the files are of no use.

    Returns:
        The masks and an account of the pruning.

    Raises:
        ConfigError: if the configuration does not fit the model.
        CalibrationError: if there is no calibration data, it does not fit the model, or gives NaN.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> prune(model, [torch.randn(16, 4)], PruningConfig(sparsity=0.5)).masks.sparsity
    0.5
    """
    run = PruningRun(model, config or PruningConfig(), progress, mapped)
    with run.undone_by_errors(), torch.no_grad(), evaluating(model), watching_padding(model) as watch:
        run.read(batches, forward, watch)
        run.find_targets(run.trace())
        if run.takes_one_pass:
            _in_one_pass(run)
        else:
            _block_by_block(run)
    return run.result


def _in_one_pass(run: PruningRun) -> None:
    """All weights, from statistics of the dense network (the paper's order for image classifiers)."""
    parts = run.collect(run.weights, run.config.statistics) if run.config.needs_inputs else {}
    run.allocate(parts)
    _prune_weights(run, run.weights, parts)


def _block_by_block(run: PruningRun) -> None:
    """One block after the other, each from what the pruned blocks before it give (the paper's order for language
    models); what is in no block comes last.

    With update "none" a block sees what the dense ones before it give. Blocks are taken one by one then, too, where
    Gram matrices are needed: those of all layers at once are many times the model.
    """
    dense, kinds = run.config.update == "none", run.config.statistics
    if run.config.allocation == "owl":
        run.allocate(run.collect(run.weights, ()))
    sweeps: Iterable[BlockSweep] = run.sweeps()  # a decoder's inputs come from the pruned encoder,
    if dense:  # or all of them from the dense model
        sweeps = list(sweeps)
        rest = run.collect(run.outside(sweeps), kinds)
    for sweep in sweeps:
        for weights in sweep.turns():
            parts = run.collect(weights, kinds, sweep.run, sweep.to_the_end, sweep.block)
            _prune_weights(run, weights, parts)
            sweep.advance()
    if not dense:
        rest = run.collect(run.outside(), kinds)
    _prune_weights(run, run.outside(), rest)


def _prune_weights(run: PruningRun, weights: Sequence[PrunableWeight], parts: Parts) -> None:
    """Solve and apply, for those together that see the same inputs; ranks share the groups out."""
    for group, solution in solutions(input_groups(weights, parts), partial(_solve, run)):
        run.apply(group, solution)


def _solve(run: PruningRun, group: InputGroup, dense: ByWeight) -> Solution:
    """Score, mask, (refine,) (update)."""
    config = run.config
    steps = Steps(group, dense, config, run.counts)
    if config.existing_zeros == "adopt":
        return steps.solution(steps.adopt())
    if config.statistics and not group.says_something:
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
    """Take, in one pass of the data through a dense model, the statistics that several prunings of it need.

    Each of them is then `prune_from_statistics(model, statistics, config)`, which reads no data and runs nothing. Gram
    matrices, where a configuration needs them, are held for all layers at once. The model is not changed; arguments
    and errors are those of `prune`. Of the configurations to come those of update "none" count.

    >>> model, config = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), PruningConfig(update="none")
    >>> statistics = collect_statistics(model, [torch.randn(16, 4)], [config])
    >>> prune_from_statistics(model, statistics, config).masks.sparsity
    0.5
    """
    configs = [config for config in configs if config.update == "none"] or [PruningConfig(update="none")]
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
    """Prune a model in place by what `collect_statistics` has found on it: reads no data and runs nothing.

    The configuration is one of update "none", or one that needs no inputs. A `ConfigError` if the statistics do not
    fit it, or are of another model.

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
