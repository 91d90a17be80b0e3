"""Blockwise reconstruction: tunes each pruned block, with fixed masks, to match the output of the dense block.

Guo et al. 2024, "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs" (arXiv 2402.12419). The loss of a block is
the squared distance between its output, on inputs from the tuned blocks before it, and the output of the same block in
the dense network. Blocks are tuned one at a time, in float32. In addition to the model, memory is needed for gradients
and optimizer state of one block, and two hidden states for each calibration sample.
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
from sparsefit.recovery.mask_guard import MaskGuard
from sparsefit.settings import number


@dataclass
class ReconstructSettings:
    """Settings for tuning each block.

    Args:
        passes: Passes over the calibration samples for each block; 0 turns the reconstruction off.
        learning_rate: Initial learning rate of Adam; it falls linearly to zero.
        batch_size: Samples in a step, over all ranks together.
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
    """The result of tuning one block.

    Attributes:
        block: The name of the block.
        before: Squared distance of its outputs from those of the dense network, divided by the squared dense outputs.
        after: This relative error after tuning.
        steps: Optimizer steps taken.
        seconds: Wall seconds.
    """

    block: str
    before: float
    after: float
    steps: int
    seconds: float


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy the matrices in a model's blocks to CPU memory, by canonical name; call this before the model is pruned."""
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
    """Tune the kept weights of each block in place. A block whose error does not fall keeps its weights.

    Args:
        model: A pruned model; its adapters are disabled.
        batches: Calibration data, as for `prune`.
        dense: The dense weights, as `dense_weights` returns them.
        masks: The masks of the model.
        settings: Passes, learning rate, batch size.
        forward: How a batch goes through the model, as for `prune`.
        seconds: Wall seconds after which no further step is taken; each block gets an equal share of what is left.
        progress: Called with (blocks done, total blocks).

    Returns:
        The error of each block before and after tuning, in execution order.

    Raises:
        ConfigError: if the model cannot run block by block, or its weights are quantized; nothing has changed then.
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
        with errors_on_all_ranks():
            lists = runnable_lists(find_block_lists(model), lambda: pass_on(data[0].first_sample()))
            if not lists:
                raise ConfigError(
                    "the model has no repeated blocks to reconstruct one by one; leave out the reconstruction"
                )
        tuner.expect([block for found in lists for block in found.blocks])
        for number, found in enumerate(lists):
            # Blocks before a later list are tuned already, but the targets must come from the dense network.
            before = [block for earlier in lists[:number] for block in earlier.blocks]
            for index, run in run_blocks(found, data, pass_on, tuner.dense_again(before) if before else None):
                errors.append(tuner.tune(names.get(id(found.blocks[index]), str(index)), found.blocks[index], run))
                if progress is not None:
                    progress(len(errors), tuner.blocks)
    return errors


class _Tuner:
    """Tunes one block after the other within a time limit.

    Attributes:
        blocks: Total number of blocks.
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
        """Freeze all parameters; `requires_grad` is restored at the end."""
        trained = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        try:
            self._model.requires_grad_(False)
            yield
        finally:
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)

    def expect(self, blocks: list[nn.Module]) -> None:
        """Set the blocks to tune, after a check that all of them can be tuned."""
        self.blocks = len(blocks)
        for block in blocks:
            self._weights_of(block)

    @contextmanager
    def dense_again(self, blocks: list[nn.Module]) -> Iterator[None]:
        """Swap the dense weights into blocks temporarily."""
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
        """Tune one block, and replace both hidden states in `run` by the outputs of the block."""
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
            for weight in tuned:  # rank 0 decides, as rounding may differ between the hardware of ranks
                weight.data.copy_(of_rank(weight.data))
        with torch.no_grad(), errors_on_all_ranks():
            run.sparse = [
                hidden_of(call.run(block, hidden.clone())) for call, hidden in zip(run.calls, run.sparse, strict=True)
            ]
        return BlockError(name, before, after, steps, time.monotonic() - start)

    @contextmanager
    def _guarded(self, block: nn.Module, tuned: list[nn.Parameter]) -> Iterator[torch.optim.Optimizer]:
        """Make some weights of a block trainable with their pruned weights guarded; yields their optimizer."""
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
