"""Pruning a model: Algorithm 1 of Wanda (Sun et al. 2023, arXiv 2306.11695), block by block or in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
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
from sparsefit.pruning.scores import SCORES
from sparsefit.pruning.sweep import Sweep
from sparsefit.pruning.weights import device_of, find_weights

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


def prune(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    config: PruningConfig | None = None,
    *,
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
    result = PruningResult(MaskSet(), config, config.update, left_dense=left_dense)
    device = device_of(model)
    pass_on = forward or (lambda batch: call_model(model, to_device(batch, device)))
    with torch.no_grad(), evaluating(model):
        if batches is not None and forward is None:
            batches = (with_names(model, batch) for batch in _source(batches))
        with errors_on_all_ranks():
            data = _calibration_data(batches, config, _is_encoder_decoder(model))
        result.samples = sum(len(batch.origin) for batch in data)
        progress = progress or (lambda done, total: None)
        sweep = Sweep(weights, block_lists, data, config, pass_on, progress, result.note)
        changes = sweep.run()
        changes.make_all(weights)
    result.masks, result.update, result.tokens = changes.masks, sweep.update, sweep.tokens
    result.layer_errors = sweep.errors
    result.seconds = time.perf_counter() - start
    return result


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
