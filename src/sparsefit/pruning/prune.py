"""Pruning a model: Algorithm 1 of Wanda (Sun et al. 2023, arXiv 2306.11695), block by block or in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsefit.errors import CalibrationError
from sparsefit.pruning.blocks import BlockCall, NotSweepable, capture_calls, find_block_lists, hidden_of
from sparsefit.pruning.calibration import InputRecorder, MicroBatch, call_model, regroup, to_device, with_names
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.masks import MaskSet
from sparsefit.pruning.removal import remove_for_good, removed_for_a_while
from sparsefit.pruning.scores import SCORES, magnitude_score
from sparsefit.pruning.selection import GRANULARITIES, select_n_of_m
from sparsefit.pruning.statistics import InputStatistics
from sparsefit.pruning.weights import PrunableWeight, device_of, find_weights

Forward = Callable[[Any], Any]
Progress = Callable[[int, int], None]


@dataclass
class PruningResult:
    """What a pruning decided.

    Attributes:
        masks: By parameter name; True = kept.
        config: As it was asked for.
        update: The order that was used: "block" or "none".
        samples: Calibration samples seen on this rank.
        tokens: Tokens that the statistics of a layer rest on, over all ranks (of the layer that saw most).
        seconds: Wall time of the whole pruning.
        notes: What did not go as asked, and why.
        left_dense: The model's other matrices and why they were not pruned.
    """

    masks: MaskSet
    config: PruningConfig
    update: str
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)


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
    block_lists = find_block_lists(model)
    weights, left_dense = find_weights(model, [b for blocks in block_lists for b in blocks], config)
    result = PruningResult(MaskSet(), config, config.update, left_dense=left_dense)
    device = device_of(model)
    pass_on = forward or (lambda batch: call_model(model, to_device(batch, device)))
    with torch.no_grad(), _evaluating(model):
        if batches is not None and forward is None:
            batches = (with_names(model, batch) for batch in _source(batches))
        data = _calibration_data(batches, config)
        result.samples = sum(len(batch.origin) for batch in data)
        sweep = _Sweep(weights, data, config, pass_on, progress or (lambda done, total: None), result)
        sweep.run(block_lists)
        remove_for_good(weights, result.masks)
    result.seconds = time.perf_counter() - start
    return result


def _source(batches: Iterable[Any]) -> Iterable[Any]:
    if isinstance(batches, Mapping | Tensor | str) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"`batches` is {type(batches).__name__}; it must be an iterable of batches: for a single one, give [batch]"
        )
    return batches


def _calibration_data(batches: Iterable[Any] | None, config: PruningConfig) -> list[MicroBatch]:
    if not SCORES[config.score].needs_inputs:
        return []
    data = list(regroup(batches, config.micro_batch_size)) if batches is not None else []
    if not data:
        raise CalibrationError(
            f"score '{config.score}' needs calibration data and there is none: "
            + ("give `batches`" if batches is None else "the source yielded no batch (was an iterator used up before?)")
        )
    return data


class _Sweep:
    """One pruning under way: the masks found so far and the progress made."""

    def __init__(
        self,
        weights: list[PrunableWeight],
        data: list[MicroBatch],
        config: PruningConfig,
        forward: Forward,
        progress: Progress,
        result: PruningResult,
    ) -> None:
        self.weights, self.data, self.config = weights, data, config
        self.forward, self.progress, self.result = forward, progress, result
        self.masks = result.masks
        self.steps_done, self.steps_in_all = 0, len(data) + 1  # the last step is the choice made

    def run(self, block_lists: list[list[nn.Module]]) -> None:
        """Find the masks of all weights. The weights themselves are dense again when this returns."""
        if self.data and self.config.update == "block":
            try:
                self._prune_block_by_block(block_lists)
            except NotSweepable as reason:
                self._note(f"{reason}; pruned with update='none': statistics of the dense network in one pass")
                self.result.update = "none"
                self.masks = self.result.masks = MaskSet()
        else:
            self.result.update = "none"
        rest = [weight for weight in self.weights if weight.name not in self.masks]
        with removed_for_a_while(self._chosen(), self.masks):
            statistics = self._statistics_of(rest, self._whole_passes) if rest and self.data else {}
        self._select(rest, statistics)
        self.progress(self.steps_in_all, self.steps_in_all)

    def _chosen(self) -> list[PrunableWeight]:
        return [weight for weight in self.weights if weight.name in self.masks]

    def _prune_block_by_block(self, block_lists: list[list[nn.Module]]) -> None:
        if not block_lists:
            raise NotSweepable("no repeated blocks were found in the model")
        owners = {id(layer): block for blocks in block_lists for block in blocks for layer in block.modules()}
        by_block: dict[int, list[PrunableWeight]] = {}
        for weight in self.weights:
            homes = {id(owners.get(id(layer))) for layer in weight.layers if id(layer) in owners}
            if len(homes) > 1:
                raise NotSweepable(f"blocks share the weight {weight.name}")
            if homes:
                by_block.setdefault(homes.pop(), []).append(weight)
        passes = sum(2 * len(blocks) for blocks in block_lists) + len(block_lists)
        self.steps_in_all = passes * len(self.data) + 1
        for blocks in block_lists:
            self._sweep_list(blocks, by_block)

    def _sweep_list(self, blocks: list[nn.Module], by_block: dict[int, list[PrunableWeight]]) -> None:
        """Algorithm 1: statistics of a block, its masks, and its pruned outputs as the next one's inputs."""
        with removed_for_a_while(
            self._chosen(), self.masks
        ):  # an encoder is pruned before its decoder's inputs are computed
            probe = self.data[0].first_sample()
            capture_calls(blocks, lambda: self.forward(probe), to_the_end=True)
            captured = [self._captured(blocks, batch) for batch in self.data]
        order = [index for index, _ in captured[0]]
        if not order or any([index for index, _ in calls] != order for calls in captured):
            raise NotSweepable("batches take different ways through the blocks" if order else "a batch calls no block")
        hidden = [calls[0][1].hidden for calls in captured]
        for position, index in enumerate(order):
            # Popped: a block's masks and embeddings are not needed again.
            calls = [batch_calls.pop(0)[1] for batch_calls in captured]
            weights = by_block.get(id(blocks[index]), [])
            is_last = position + 1 == len(order)
            hidden = self._prune_block(blocks[index], weights, calls, hidden, needs_outputs=not is_last)

    def _prune_block(
        self,
        block: nn.Module,
        weights: list[PrunableWeight],
        calls: list[BlockCall],
        hidden: list[Tensor],
        needs_outputs: bool,
    ) -> list[Tensor]:
        """Choose the masks of a block from a pass with its dense weights; returns the outputs of the pruned block."""
        self._select(weights, self._statistics_of(weights, lambda recorder: self._run(block, calls, hidden, recorder)))
        if not needs_outputs:
            return []
        with removed_for_a_while(weights, self.masks):
            return self._run(block, calls, hidden)

    def _captured(self, blocks: list[nn.Module], batch: MicroBatch) -> list[tuple[int, BlockCall]]:
        calls = capture_calls(blocks, lambda: self.forward(batch.data))
        self._step()
        return calls

    def _run(
        self, block: nn.Module, calls: list[BlockCall], hidden: list[Tensor], recorder: InputRecorder | None = None
    ) -> list[Tensor]:
        outputs = []
        for batch, call, inputs in zip(self.data, calls, hidden, strict=True):
            if recorder is not None:
                recorder.next_batch(batch)
            output = hidden_of(call.run(block, inputs))
            if recorder is None:
                outputs.append(output)
            self._step()
        return outputs

    def _whole_passes(self, recorder: InputRecorder) -> None:
        for batch in self.data:
            recorder.next_batch(batch)
            self.forward(batch.data)
            self._step()

    def _statistics_of(
        self, weights: list[PrunableWeight], run: Callable[[InputRecorder], Any]
    ) -> dict[str, InputStatistics]:
        recorder = InputRecorder(weights)
        with recorder.watching():
            run(recorder)
        for statistics in recorder.statistics.values():
            statistics.reduce_over_ranks()
            self.result.tokens = max(self.result.tokens, statistics.tokens)
        for note in sorted(recorder.notes):
            self._note(note)
        return recorder.statistics

    def _select(self, weights: list[PrunableWeight], statistics: dict[str, InputStatistics]) -> None:
        for weight in weights:
            mask = self._mask_of(weight, statistics.get(weight.name))
            self.masks.add(weight.name, mask, weight.transposed)

    def _mask_of(self, weight: PrunableWeight, statistics: InputStatistics | None) -> Tensor:
        score = SCORES[self.config.score]
        matrix = weight.matrix()
        if score.needs_inputs and (statistics is None or statistics.tokens == 0):
            self._note(f"{weight.name} saw no calibration token; pruned by magnitude")
            scores = magnitude_score(matrix)
        else:
            scores = score.function(matrix, statistics.squared_norm if statistics is not None else None)
        if not bool(scores.isfinite().all()):
            raise CalibrationError(
                f"the scores of {weight.name} are not finite: its weights or their inputs are too large for float32. "
                "The model was left as it was; look at the calibration data, or exclude the layer"
            )
        structure = self.config.structure
        if structure is not None:
            return select_n_of_m(scores, structure.n, structure.m)
        return GRANULARITIES[self.config.granularity](scores, self.config.exact_sparsity)

    def _step(self) -> None:
        self.steps_done = min(self.steps_done + 1, self.steps_in_all - 1)
        self.progress(self.steps_done, self.steps_in_all)

    def _note(self, note: str) -> None:
        if note not in self.result.notes:
            self.result.notes.append(note)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no key-value caches, no fused attention (it would bypass the hooks on the layers in it);
    all as they were afterwards, module by module."""
    training = [module for module in model.modules() if module.training]
    caching = {
        id(c): c for m in model.modules() if getattr(c := getattr(m, "config", None), "use_cache", False) is True
    }
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        for config in caching.values():
            config.use_cache = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for config in caching.values():
            config.use_cache = True
        for module in training:
            module.training = True
