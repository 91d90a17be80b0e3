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

from sparsefit.errors import CalibrationError, ConfigError
from sparsefit.pruning import MaskSet
from sparsefit.pruning.blocks import BlockCall, NotSweepable, capture_calls, find_block_lists, hidden_of
from sparsefit.pruning.calibration import MicroBatch, call_model, regroup, to_device, with_names
from sparsefit.pruning.evaluating import evaluating
from sparsefit.pruning.naming import base_modules, canonical_name
from sparsefit.pruning.ranks import of_first_rank
from sparsefit.pruning.weights import device_of
from sparsefit.recovery.guard import MaskGuard


@dataclass
class ReconstructSettings:
    """How long and how fast each block is tuned.

    Args:
        passes: times that each block sees the calibration samples; 0 leaves the blocks as pruning left them.
        learning_rate: of Adam at the first step; it falls linearly to zero.
        batch_size: samples in a step.
    """

    passes: int = 10
    learning_rate: float = 1e-3
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.passes, int) or self.passes < 0:
            raise ConfigError(f"passes of the reconstruction is {self.passes!r}: it must be a whole number from 0 on")
        if not self.learning_rate > 0:
            raise ConfigError(f"the learning_rate of the reconstruction is {self.learning_rate!r}: it must be above 0")
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ConfigError(f"batch_size of the reconstruction is {self.batch_size!r}: it must be at least 1")


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
        ConfigError: if the model cannot be run block by block, or its weights are quantized.
        CalibrationError: if there is no calibration data.
    """
    settings = settings or ReconstructSettings()
    device = device_of(model)
    pass_on = forward or (lambda batch: call_model(model, to_device(batch, device)))
    if forward is None:
        batches = (with_names(model, batch) for batch in batches)
    data = list(regroup(batches, settings.batch_size))
    if not data:
        raise CalibrationError("the reconstruction needs calibration data and there is none: give `batches`")
    lists = find_block_lists(model)
    if not lists:
        raise ConfigError("the model has no repeated blocks to reconstruct one by one; leave out the reconstruction")
    names = {id(module): canonical_name(name) for name, module in base_modules(model).items()}
    tuner = _Tuner(model, dense, masks, settings, seconds, sum(map(len, lists)))
    errors: list[BlockError] = []
    with evaluating(model), _adapters_off(model), tuner.model_frozen():
        for blocks in lists:
            for index, run in _sweep(blocks, data, pass_on):
                errors.append(tuner.tune(names.get(id(blocks[index]), str(index)), blocks[index], run))
                if progress is not None:
                    progress(len(errors), tuner.blocks)
    return errors


@dataclass
class _Run:
    """A block's calls, and the hidden states before it in the sparse and in the dense network; then those after it."""

    calls: list[BlockCall]
    sparse: list[Tensor]
    dense: list[Tensor]


def _sweep(
    blocks: list[nn.Module], data: list[MicroBatch], forward: Callable[[Any], Any]
) -> Iterator[tuple[int, _Run]]:
    """Each block of a list in calling order, with what goes into it: whoever takes it puts what comes out in place."""
    try:
        with torch.no_grad():
            probe = data[0].first_sample()
            simple = capture_calls(blocks, lambda: forward(probe), to_the_end=True).simple
            captured = [capture_calls(blocks, lambda b=batch: forward(b.data), simple=simple).calls for batch in data]
        order = [index for index, _ in captured[0]]
        if not order or any([index for index, _ in calls] != order for calls in captured):
            raise NotSweepable("batches take different ways through the blocks")
    except NotSweepable as reason:
        raise ConfigError(
            f"the model cannot be reconstructed block by block: {reason}. Leave out the reconstruction"
        ) from reason
    run = _Run([], [calls[0][1].hidden for calls in captured], [calls[0][1].hidden for calls in captured])
    for position, index in enumerate(order):
        run.calls = [calls[position][1].without_hidden() for calls in captured]
        yield index, run


@contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    adapted = next((part for part in model.modules() if callable(getattr(part, "disable_adapter", None))), None)
    if adapted is None:
        yield
        return
    with adapted.disable_adapter():
        yield


@contextmanager
def _in_float32(block: nn.Module) -> Iterator[None]:
    """A block of half precision in float32, as small steps would be lost; in its own dtypes afterwards."""
    halves = [t for t in (*block.parameters(), *block.buffers()) if t.dtype in (torch.float16, torch.bfloat16)]
    dtypes = [tensor.dtype for tensor in halves]
    try:
        for tensor in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in zip(halves, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


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
        blocks: int,
    ) -> None:
        self._model, self._dense, self._masks, self._settings = model, dense, masks, settings
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self.blocks, self._done = blocks, 0

    @contextmanager
    def model_frozen(self) -> Iterator[None]:
        """No parameter requires a gradient; as it was afterwards."""
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        try:
            self._model.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def tune(self, name: str, block: nn.Module, run: _Run) -> BlockError:
        """Tune one block, and take both hidden states through it."""
        start = time.monotonic()
        limit = None if self._deadline is None else max(0.0, self._deadline - start) / (self.blocks - self._done)
        self._done += 1
        weights = self._weights_of(block)
        with torch.no_grad():
            run.dense = self._dense_outputs(block, weights, run)
        tuned = [weight for weight in weights.values() if weight.is_floating_point()]
        before = after = self._error(block, run)
        steps = 0
        if tuned and self._settings.passes:
            kept = [weight.detach().clone() for weight in tuned]
            with _in_float32(block):
                steps = self._descend(block, tuned, run, limit)
            after = self._error(block, run)
            if not after < before:
                after = before
                for weight, old in zip(tuned, kept, strict=True):
                    weight.data.copy_(old)
            for weight in tuned:  # rounding on other hardware must not make the ranks' models differ
                weight.data.copy_(of_first_rank(weight.data))
        with torch.no_grad():
            run.sparse = [
                hidden_of(call.run(block, hidden.clone())) for call, hidden in zip(run.calls, run.sparse, strict=True)
            ]
        return BlockError(name, before, after, steps, time.monotonic() - start)

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

    def _dense_outputs(self, block: nn.Module, weights: dict[str, nn.Parameter], run: _Run) -> list[Tensor]:
        sparse = {name: weight.data for name, weight in weights.items()}
        try:
            for name, weight in weights.items():
                weight.data = self._dense[name].to(weight.device)
            return [
                hidden_of(call.run(block, hidden.clone())) for call, hidden in zip(run.calls, run.dense, strict=True)
            ]
        finally:
            for name, weight in weights.items():
                weight.data = sparse[name]

    @torch.no_grad()
    def _error(self, block: nn.Module, run: _Run) -> float:
        lost = whole = 0.0
        for call, hidden, target in zip(run.calls, run.sparse, run.dense, strict=True):
            output = hidden_of(call.run(block, hidden.clone())).float()
            lost += float((output - target.float()).square().sum())
            whole += float(target.float().square().sum())
        return lost / whole if whole else 0.0

    def _descend(self, block: nn.Module, tuned: list[nn.Parameter], run: _Run, limit: float | None) -> int:
        """Adam on the block's distance from its targets, its rate falling to zero with the steps or the time."""
        whole = sum(float(target.float().square().mean()) for target in run.dense) / len(run.dense)
        block.requires_grad_(False)
        for weight in tuned:
            weight.requires_grad_(True)
        optimizer = torch.optim.Adam(tuned, lr=self._settings.learning_rate)
        guard = MaskGuard(self._masks)
        guard.watch(self._model, [optimizer])
        generator = torch.Generator().manual_seed(0)
        start, step, total = time.monotonic(), 0, self._settings.passes * len(run.calls)
        try:
            with torch.enable_grad():
                while step < total:
                    for number in torch.randperm(len(run.calls), generator=generator).tolist():
                        spent = 0.0 if limit is None else (time.monotonic() - start) / max(limit, 1e-9)
                        if spent >= 1:
                            return step
                        optimizer.param_groups[0]["lr"] = self._settings.learning_rate * (1 - max(step / total, spent))
                        call = run.calls[number].cast(torch.float32)
                        output = hidden_of(call.run(block, run.sparse[number].float()))
                        loss = nn.functional.mse_loss(output, run.dense[number].float()) / max(whole, 1e-12)
                        loss.backward()
                        optimizer.step()
                        optimizer.zero_grad()
                        step += 1
            return step
        finally:
            guard.remove()
            for weight in tuned:
                weight.requires_grad_(False)
