"""Blockwise reconstruction: each pruned block is tuned, masks fixed, until its output is like the dense block's.

Guo et al. 2024, "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs" (arXiv 2402.12419). The loss of a block is
the squared distance between its output, on inputs from the tuned blocks before it, and the output of the dense network
at the same place. One block is tuned at a time, in float32, so gradients and optimizer state of one block are all that
is held beside the model and two hidden states for each calibration sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefit.bare_model import base_modules, canonical_name
from sparsefit.calibration.batches import calibration_data, forward_of
from sparsefit.calibration.padding import watching_padding
from sparsefit.errors import ConfigError
from sparsefit.pruning import MaskSet
from sparsefit.pruning.blocks import find_block_lists, hidden_of
from sparsefit.pruning.input_watch import evaluating
from sparsefit.ranks import errors_on_all_ranks, from_all, number_of_ranks, of_rank
from sparsefit.recovery.block_descent import descend
from sparsefit.recovery.block_runs import BlockRun, adapters_off, in_float32, run_blocks, runnable_lists
from sparsefit.recovery.guard import MaskGuard
from sparsefit.settings import number


@dataclass
class ReconstructSettings:
    """How long and how fast each block is tuned.

    Args:
        passes: times that each block sees the calibration samples; 0 leaves the blocks as pruning left them.
        learning_rate: of Adam at the first step; it falls linearly to zero.
        batch_size: samples in a step, those of all ranks together.
    """

    passes: int = 10
    learning_rate: float = 1e-3
    batch_size: int = 8

    def __post_init__(self) -> None:
        self.passes = number("passes of the reconstruction", self.passes, least=0, whole=True)
        self.learning_rate = number("the learning_rate of the reconstruction", self.learning_rate, above=0)
        self.batch_size = number("batch_size of the reconstruction", self.batch_size, least=1, whole=True)


@dataclass(frozen=True)
class BlockError:
    """What tuning one block did.

    Attributes:
        block: Its name.
        before: Squared distance of its outputs from the dense network's, as a share of the squared outputs.
        after: The same once it was tuned.
        steps: Optimizer steps taken.
        seconds: Wall time.
    """

    block: str
    before: float
    after: float
    steps: int
    seconds: float


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies in CPU memory of the matrices in a model's blocks, by canonical name; taken before it is pruned."""
    inside = {id(p) for blocks in find_block_lists(model) for block in blocks for p in block.parameters()}
    return {
        canonical_name(name): parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if id(parameter) in inside and parameter.ndim >= 2
    }


def reconstruct(
    model: nn.Module,
    batches: Iterable[Any],
    dense: Mapping[str, Tensor],
    masks: MaskSet,
    settings: ReconstructSettings | None = None,
    *,
    forward: Callable[[Any], Any] | None = None,
    seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[BlockError]:
    """Tune the kept weights of each block in place; one that tuning does not bring nearer stays as it was.

    Args:
        model: A pruned model; adapters on it are left out of account.
        batches: Calibration data, as `prune` takes it.
        dense: The weights from before, as `dense_weights` gives them.
        masks: The masks of the model.
        settings: Passes, learning rate, batch size.
        forward: How a batch goes through the model, as for `prune`.
        seconds: Wall time after which no further step is taken; each block gets an equal share of what is left.
        progress: Called with (blocks done, blocks in all).

    Returns:
        The error of each block before and after, in the order in which they run.

    Raises:
        ConfigError: if the model cannot be run block by block, or its weights are quantized; nothing has changed then.
        CalibrationError: if there is no calibration data.
    """
    settings = settings or ReconstructSettings()
    pass_on = forward_of(model, forward)
    with torch.no_grad(), evaluating(model), watching_padding(model) as watch:
        size = max(1, settings.batch_size // number_of_ranks())
        data = calibration_data(model, batches, size, forward, "the reconstruction", watch)
    names = {id(module): canonical_name(name) for name, module in base_modules(model).items()}
    tuner = _Tuner(model, dense, masks, settings, seconds)
    errors: list[BlockError] = []
    with evaluating(model), tuner.model_frozen(), adapters_off(model):
        lists = runnable_lists(find_block_lists(model), lambda: pass_on(data[0].first_sample()))
        if not lists:
            raise ConfigError(
                "the model has no repeated blocks to reconstruct one by one; leave out the reconstruction"
            )
        tuner.expect([block for found in lists for block in found.blocks])
        for number, found in enumerate(lists):
            # What comes before a later list is tuned by now: its own targets are those of the dense network.
            before = [block for earlier in lists[:number] for block in earlier.blocks]
            for index, run in run_blocks(found, data, pass_on, tuner.dense_again(before) if before else None):
                errors.append(tuner.tune(names.get(id(found.blocks[index]), str(index)), found.blocks[index], run))
                if progress is not None:
                    progress(len(errors), tuner.blocks)
    return errors


class _Tuner:
    """Tunes block after block inside a time.

    Attributes:
        blocks: How many there are in all.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: Mapping[str, Tensor],
        masks: MaskSet,
        settings: ReconstructSettings,
        seconds: float | None,
    ) -> None:
        self._model, self._dense, self._masks, self._settings = model, dense, masks, settings
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self.blocks = self._done = 0

    @contextmanager
    def model_frozen(self) -> Iterator[None]:
        """No parameter requires a gradient; as it was afterwards."""
        trained = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        try:
            self._model.requires_grad_(False)
            yield
        finally:
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)

    def expect(self, blocks: list[nn.Module]) -> None:
        """Check that all the blocks can be tuned."""
        self.blocks = len(blocks)
        for block in blocks:
            self._weights_of(block)

    @contextmanager
    def dense_again(self, blocks: list[nn.Module]) -> Iterator[None]:
        """Blocks with their dense weights, for a while."""
        weights = {name: weight for block in blocks for name, weight in self._weights_of(block).items()}
        sparse = {name: weight.data for name, weight in weights.items()}
        try:
            for name, weight in weights.items():
                weight.data = self._dense[name].to(weight.device)
            yield
        finally:
            for name, weight in weights.items():
                weight.data = sparse[name]

    def tune(self, name: str, block: nn.Module, run: BlockRun) -> BlockError:
        """Tune one block, and take both hidden states through it."""
        start = time.monotonic()
        limit = None if self._deadline is None else max(0.0, self._deadline - start) / (self.blocks - self._done)
        self._done += 1
        weights = self._weights_of(block)
        with torch.no_grad(), errors_on_all_ranks():
            run.dense = self._dense_outputs(block, run)
        tuned = [weight for weight in weights.values() if weight.is_floating_point()]
        before = after = self._error(block, run)
        steps = 0
        if tuned and self._settings.passes:
            kept = [weight.detach().clone() for weight in tuned]
            with in_float32(block), self._guarded(block, tuned) as optimizer:
                steps = descend(block, tuned, run, optimizer, self._settings.passes, limit)
            after = self._error(block, run)
            if not after < before:
                after = before
                for weight, old in zip(tuned, kept, strict=True):
                    weight.data.copy_(old)
            for weight in tuned:  # rounding on other hardware must not make the ranks' models differ
                weight.data.copy_(of_rank(weight.data))
        with torch.no_grad(), errors_on_all_ranks():
            run.sparse = [
                hidden_of(call.run(block, hidden.clone())) for call, hidden in zip(run.calls, run.sparse, strict=True)
            ]
        return BlockError(name, before, after, steps, time.monotonic() - start)

    @contextmanager
    def _guarded(self, block: nn.Module, tuned: list[nn.Parameter]) -> Iterator[torch.optim.Optimizer]:
        """An optimizer of some weights of a block, which train while this lasts and keep to their masks."""
        block.requires_grad_(False)
        for weight in tuned:
            weight.requires_grad_(True)
        optimizer = torch.optim.Adam(tuned, lr=self._settings.learning_rate)
        guard = MaskGuard(self._masks)
        guard.watch(self._model, [optimizer])
        try:
            yield optimizer
        finally:
            guard.remove()
            for weight in tuned:
                weight.requires_grad_(False)
                weight.grad = None

    def _weights_of(self, block: nn.Module) -> dict[str, nn.Parameter]:
        inside = {id(parameter) for parameter in block.parameters()}
        found = {
            canonical_name(name): parameter
            for name, parameter in self._model.named_parameters()
            if id(parameter) in inside and canonical_name(name) in self._masks.parameters
        }
        missing = [
            name
            for name, parameter in found.items()
            if name not in self._dense
            or self._dense[name].shape != parameter.shape
            or not parameter.is_floating_point()
        ]
        if missing:
            raise ConfigError(
                f"{missing[0]} has no dense counterpart in floats: reconstruct the model first and quantize it then"
            )
        return found

    def _dense_outputs(self, block: nn.Module, run: BlockRun) -> list[Tensor]:
        with self.dense_again([block]):
            return [
                hidden_of(call.run(block, hidden.clone()))
                for call, hidden in zip(run.dense_calls, run.dense, strict=True)
            ]

    @torch.no_grad()
    def _error(self, block: nn.Module, run: BlockRun) -> float:
        sums = torch.zeros(2, dtype=torch.float64)
        with errors_on_all_ranks():
            for call, hidden, target in zip(run.calls, run.sparse, run.dense, strict=True):
                output = hidden_of(call.run(block, hidden.clone())).float()
                lost, whole = (output - target.float()).square().sum(), target.float().square().sum()
                sums += torch.tensor([float(lost), float(whole)], dtype=torch.float64)
        lost, whole = (sum(own) for own in zip(*from_all(sums.tolist()), strict=True))
        return lost / whole if whole else 0.0
