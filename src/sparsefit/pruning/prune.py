"""Pruning a model: Algorithm 1 of Wanda (Sun et al. 2023, arXiv 2306.11695), block by block or in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsefit.errors import CalibrationError, ConfigError
from sparsefit.pruning.blocks import find_block_lists
from sparsefit.pruning.calibration import MicroBatch, call_model, regroup, to_device, with_names
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.evaluating import evaluating
from sparsefit.pruning.masks import MaskSet
from sparsefit.pruning.ranks import errors_on_all_ranks
from sparsefit.pruning.recording import Part
from sparsefit.pruning.scores import SCORES
from sparsefit.pruning.sweep import Sweep
from sparsefit.pruning.weights import PrunableWeight, device_of, find_weights

Forward = Callable[[Any], Any]
Progress = Callable[[int, int], None]


@dataclass
class PruningResult:
    """What a pruning decided.

    Attributes:
        masks: By parameter name; True = kept.
        config: As it was asked for.
        update: The order that was used: "block", "layer" or "none".
        samples: Calibration samples seen on this rank.
        tokens: Tokens that the statistics of a layer rest on, over all ranks (of the layer that saw most).
        seconds: Wall time of the whole pruning.
        notes: What did not go as asked, and why.
        left_dense: The model's other matrices and why they were not pruned.
        layer_errors: For each pruned matrix the squared error of its outputs on the calibration inputs as a share of
            the squared outputs; only where the method takes Gram matrices (swaps, reconstruction).
    """

    masks: MaskSet
    config: PruningConfig
    update: str
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)
    layer_errors: dict[str, float] = field(default_factory=dict)

    def note(self, note: str) -> None:
        """Add a sentence to the notes, once."""
        if note not in self.notes:
            self.notes.append(note)


@dataclass(frozen=True)
class DenseStatistics:
    """Statistics of the inputs of a dense model's weights: taken once, good for any number of prunings of it.

    Attributes:
        parts: By the weight's name, the statistics of what its rows see.
        kinds: What they are: names from `statistics.KINDS`.
        samples: Calibration samples seen on this rank.
        seconds: Wall time of the pass.
        notes: What did not go as expected.
    """

    parts: dict[str, list[Part]]
    kinds: frozenset[str]
    samples: int
    seconds: float
    notes: tuple[str, ...] = ()


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    configs: Iterable[PruningConfig],
    *,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> DenseStatistics:
    """Take, in one pass of the data through a dense model, the statistics that several prunings of it need.

    Each of them is then `prune(model, config=config, statistics=...)`, which reads no data and runs nothing. Gram
    matrices, where a configuration needs them, are held for all layers at once.

    Args:
        model: As in `prune`; it is not changed.
        batches: As in `prune`.
        configs: The configurations to come; those of update "none" count.
        forward: As in `prune`.
        progress: As in `prune`.

    Raises:
        ConfigError: if a configuration does not fit the model.
        CalibrationError: as in `prune`.
    """
    start = time.perf_counter()
    configs = [config for config in configs if config.update == "none"] or [PruningConfig(update="none")]
    block_lists = find_block_lists(model)
    blocks = [block for blocks in block_lists for block in blocks]
    weights = list({w.name: w for config in configs for w in find_weights(model, blocks, config)[0]}.values())
    kinds = frozenset({"squared_norm"}).union(*(config.statistics for config in configs))
    common = PruningConfig(update="none", micro_batch_size=configs[0].micro_batch_size)
    notes: list[str] = []
    with _observed(model, batches, common, forward) as (data, pass_on):
        sweep = Sweep(weights, block_lists, data, common, pass_on, progress or _unheard, notes.append)
        parts = sweep.statistics_of_dense(kinds)
    samples = sum(len(batch.origin) for batch in data)
    return DenseStatistics(parts, kinds, samples, time.perf_counter() - start, tuple(dict.fromkeys(notes)))


def prune(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    config: PruningConfig | None = None,
    *,
    statistics: DenseStatistics | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> PruningResult:
    """Prune a model in place.

    The weights change at the very end, all at once: an error or an interrupt before leaves the model dense,
    one that comes while the masks are applied leaves it whole pruned.

    Args:
        model: Any module; transformers decoders and PEFT-wrapped models among them (their base is pruned).
        batches: Calibration data: each a mapping (keyword arguments of the model), a tuple (its positional
            arguments) or one tensor. The first dimension of each tensor counts the samples; positions at which
            `attention_mask` is 0 are padding. Read once. Not needed for magnitude pruning.
        config: What to prune and how; by default Wanda at 50% per output, block by block.
        statistics: What `calibrate` found on this model, dense; then no data is read. For update "none".
        forward: How a batch goes through the model; by default the model is called with it, on its device.
        progress: Called with (steps done, steps in all) as calibration goes on, and with both equal once all
            masks are chosen; what it raises ends the pruning with the model still dense.

    Returns:
        The masks and an account of the pruning.

    Raises:
        ConfigError: if the configuration does not fit the model.
        CalibrationError: if there is no calibration data, it does not fit the model, or gives NaN.
    """
    config = config or PruningConfig()
    start = time.perf_counter()
    _check_device_is_here(config.device)
    block_lists = find_block_lists(model)
    weights, left_dense = find_weights(model, [b for blocks in block_lists for b in blocks], config)
    given = _statistics_for(weights, config, statistics)
    result = PruningResult(MaskSet(), config, config.update, left_dense=left_dense)
    with _observed(model, batches if given is None else None, config, forward, given is None) as (data, pass_on):
        result.samples = sum(len(batch.origin) for batch in data)
        if given is not None and config.needs_inputs:
            result.samples = statistics.samples
        sweep = Sweep(weights, block_lists, data, config, pass_on, progress or _unheard, result.note, given)
        changes = sweep.run()
        changes.make_all(weights)
    result.masks, result.update, result.tokens = changes.masks, sweep.update, sweep.tokens
    result.layer_errors = sweep.errors
    result.seconds = time.perf_counter() - start
    return result


@contextmanager
def _observed(
    model: nn.Module, batches: Iterable[Any] | None, config: PruningConfig, forward: Forward | None, reads: bool = True
) -> Iterator[tuple[list[MicroBatch], Forward]]:
    """A model as it can be watched, the calibration data (none unless it `reads` any), and how they go through it."""
    device = device_of(model)
    pass_on = forward or (lambda batch: call_model(model, to_device(batch, device)))
    with torch.no_grad(), evaluating(model):
        if batches is not None and forward is None:
            batches = (with_names(model, batch) for batch in _source(batches))
        with errors_on_all_ranks():
            data = _calibration_data(batches, config, _is_encoder_decoder(model)) if reads else []
        yield data, pass_on


def _unheard(done: int, total: int) -> None:
    pass


def _statistics_for(
    weights: list[PrunableWeight], config: PruningConfig, statistics: DenseStatistics | None
) -> dict[str, list[Part]] | None:
    """The statistics of the weights; None if there are none and data must be read."""
    if statistics is None:
        return None
    if config.needs_inputs and config.update != "none":
        raise ConfigError(
            f"statistics of the dense model do for update 'none' alone, and not for '{config.update}': give the "
            "configuration update='none', or leave out the statistics and give `batches`"
        )
    lacking = sorted(config.statistics - statistics.kinds)
    unknown = [weight.name for weight in weights if weight.name not in statistics.parts]
    if lacking or (unknown and config.needs_inputs):
        what = f"{', '.join(lacking)} was not taken" if lacking else f"nothing is known of {unknown[0]}"
        raise ConfigError(f"the statistics do not fit the configuration: {what}. Name it when you `calibrate`")
    return {weight.name: statistics.parts.get(weight.name, []) for weight in weights}


def _check_device_is_here(device: str | None) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{device}' cannot be used here: {error}") from error


def _source(batches: Iterable[Any]) -> Iterable[Any]:
    if isinstance(batches, Mapping | Tensor | str) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"`batches` is {type(batches).__name__}; it must be an iterable of batches: for a single one, give [batch]"
        )
    return batches


def _is_encoder_decoder(model: nn.Module) -> bool:
    return any(getattr(getattr(m, "config", None), "is_encoder_decoder", False) is True for m in model.modules())


def _calibration_data(batches: Iterable[Any] | None, config: PruningConfig, encoder_decoder: bool) -> list[MicroBatch]:
    if not config.needs_inputs:
        return []
    data = list(regroup(batches, config.micro_batch_size, encoder_decoder)) if batches is not None else []
    if not data:
        raise CalibrationError(
            f"{_what_needs_inputs(config)} needs calibration data and there is none: "
            + ("give `batches`" if batches is None else "the source yielded no batch (was an iterator used up before?)")
        )
    return data


def _what_needs_inputs(config: PruningConfig) -> str:
    if SCORES[config.score].needs:
        return f"score '{config.score}'"
    if config.reconstruction:
        return f"reconstruction '{config.reconstruction}'"
    return f"swaps={config.swaps}" if config.swaps else f"allocation '{config.allocation}'"
