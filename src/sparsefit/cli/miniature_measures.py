"""Measures the time and memory of a miniature run."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from sparsefit.bare_model import canonical_name
from sparsefit.callbacks.calibration import calibration_forward, predicting
from sparsefit.callbacks.hooks import PrunedRunCallback
from sparsefit.machine import peak_memory, reset_peak_memory
from sparsefit.pruning import MaskSet
from sparsefit.pruning.blocks import find_block_lists
from sparsefit.pruning.fisher import requiring_gradients
from sparsefit.pruning.input_watch import evaluating


class MiniatureMeasures(PrunedRunCallback):
    """Measures the time of a fit's batches and updates, and the peak memory of its stages.

    Args:
        held: Bytes that the process held before, which are subtracted.
        sample: A batch of one calibration sample, if the pruning takes gradients; else None.
    """

    def __init__(self, held: float, sample: Any = None) -> None:
        self._held, self._sample = held, sample
        self.peaks: dict[str, float] = {}
        self.tensors: dict[str, float] = {}
        self._saved: SavedActivations | None = None
        self._batches: list[float] = []
        self._updates: list[float] = []
        self._validations: list[float] = []
        self._mark = 0.0

    def seconds(self) -> dict[str, float]:
        """Shortest seconds of a training batch, an update and a validation batch; longer ones were disturbed."""
        taken = {"batch": self._batches, "update": self._updates, "validation": self._validations}
        return {name: min(seconds) for name, seconds in taken.items() if seconds}

    def on_pruning_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the peak memory."""
        reset_peak_memory()

    def on_base_ready(self, trainer: Trainer, pl_module: LightningModule, masks: MaskSet) -> None:
        """Record the peak of pruning and reconstruction."""
        blocks = [sum(map(_bytes, block.parameters())) for blocks in find_block_lists(pl_module) for block in blocks]
        self.tensors["weights"] = sum(map(_bytes, pl_module.parameters()))
        self.tensors["block"] = max(blocks, default=0.0)
        self.tensors["pruning"] = self.tensors["weights"] + masked_weights(masks) / 8  # a mask takes one bit per weight
        self._record_peak("pruning")
        if self._sample is not None:
            self.tensors["backward"] = self._backward_bytes(trainer, pl_module, masks)
            reset_peak_memory()

    def _backward_bytes(self, trainer: Trainer, module: LightningModule, masks: MaskSet) -> float:
        """Bytes that the gradients of the calibration sample take in addition to the weights: what autograd keeps for
        them, and one for each weight that may be removed."""
        forward, precision = calibration_forward(trainer, module), trainer.precision_plugin.predict_step_context()
        named = module.named_parameters(remove_duplicate=False)
        pruned = [parameter for name, parameter in named if canonical_name(name) in masks.parameters]
        as_pruned = torch.enable_grad(), precision, evaluating(module), predicting(trainer), requiring_gradients(pruned)
        with ExitStack() as stack:
            for context in as_pruned:
                stack.enter_context(context)
            saved = stack.enter_context(SavedActivations(module))
            forward(self._sample)
        return saved.bytes + masked_weights(masks)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start timing; count activations in the first batch."""
        if batch_idx == 0:
            self._saved = SavedActivations(pl_module)
            self._saved.__enter__()
        self._mark = _now(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop counting activations."""
        if self._saved is not None and self._saved.counting:
            self._saved.__exit__(None, None, None)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Record the time of the forward and backward pass."""
        self._batches.append(_now(trainer) - self._mark)
        self._mark = _now(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Record the time of the update."""
        self._updates.append(_now(trainer) - self._mark)

    def on_validation_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Start timing a validation batch."""
        self._mark = _now(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Record the time of the validation batch."""
        self._validations.append(_now(trainer) - self._mark)

    def on_closing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the peak of training."""
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        moments = [tensor for state in states for tensor in state.values() if isinstance(tensor, Tensor)]
        self.tensors["gradients"] = sum(_bytes(p) for p in pl_module.parameters() if p.requires_grad)
        self.tensors["moments"] = sum(map(_bytes, moments))
        activations = 0.0 if self._saved is None else self._saved.bytes
        known = sum(self.tensors[key] for key in ("pruning", "gradients", "moments"))
        self.tensors["training"] = known + activations
        self._record_peak("training")

    def _record_peak(self, stage: str) -> None:
        self.peaks[stage] = float(peak_memory()[0] or 0) - self._held
        reset_peak_memory()


class SavedActivations(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for a backward pass: each storage once, and without the parameters."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__(self._count, lambda tensor: tensor)
        self._seen = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.bytes, self.counting = 0.0, True

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> SavedActivations:
        """The forward pass begins."""
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        self.counting = False
        super().__exit__(*error)


def masked_weights(masks: MaskSet) -> int:
    """Number of weights with a mask."""
    return sum(weights for weights, _ in masks.counts().values())


def _bytes(tensor: Tensor) -> float:
    return float(tensor.numel() * tensor.element_size())


def _now(trainer: Trainer) -> float:
    """The time in seconds, after queued device work is done."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
    return time.monotonic()
