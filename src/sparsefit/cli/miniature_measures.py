"""What a miniature run takes, looked at from within."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from sparsefit.callbacks.hooks import PrunedRunCallback
from sparsefit.pruning import MaskSet
from sparsefit.pruning.blocks import find_block_lists
from sparsefit.reporting.machine import peak_memory, reset_peak_memory


class Watch(PrunedRunCallback):
    """Takes the times of the batches and updates of a fit, and the most memory of its stages.

    Args:
        held: Bytes that the process held before.
    """

    def __init__(self, held: float) -> None:
        self._held = held
        self.peaks: dict[str, float] = {}
        self.tensors: dict[str, float] = {}
        self._saved: SavedActivations | None = None
        self._batches: list[float] = []
        self._updates: list[float] = []
        self._validations: list[float] = []
        self._mark = 0.0

    def seconds(self) -> dict[str, float]:
        """Of a training batch, of an update, and of a batch of a validation: the shortest, which nothing disturbed."""
        taken = {"batch": self._batches, "update": self._updates, "validation": self._validations}
        return {name: min(seconds) for name, seconds in taken.items() if seconds}

    def on_pruning_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here."""
        reset_peak_memory()

    def on_base_ready(self, trainer: Trainer, pl_module: LightningModule, masks: MaskSet) -> None:
        """Pruning and reconstruction are over."""
        blocks = [sum(map(_bytes, block.parameters())) for blocks in find_block_lists(pl_module) for block in blocks]
        self.tensors["weights"] = sum(map(_bytes, pl_module.parameters()))
        self.tensors["block"] = max(blocks, default=0.0)
        self.tensors["pruning"] = self.tensors["weights"] + bits_of(masks) / 8
        self._take_peak("pruning")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A batch begins; of the first one the activations are counted."""
        if batch_idx == 0:
            self._saved = SavedActivations(pl_module)
            self._saved.__enter__()
        self._mark = _now(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """What a backward pass needs is there."""
        if self._saved is not None and self._saved.counting:
            self._saved.__exit__(None, None, None)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Its gradients are there."""
        self._batches.append(_now(trainer) - self._mark)
        self._mark = _now(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Its step is taken."""
        self._updates.append(_now(trainer) - self._mark)

    def on_validation_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """A batch of a validation begins."""
        self._mark = _now(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """It is measured."""
        self._validations.append(_now(trainer) - self._mark)

    def on_closing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training is over."""
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        moments = [tensor for state in states for tensor in state.values() if isinstance(tensor, Tensor)]
        self.tensors["gradients"] = sum(_bytes(p) for p in pl_module.parameters() if p.requires_grad)
        self.tensors["moments"] = sum(map(_bytes, moments))
        activations = 0.0 if self._saved is None else self._saved.bytes
        known = sum(self.tensors[key] for key in ("pruning", "gradients", "moments"))
        self.tensors["training"] = known + activations
        self._take_peak("training")

    def _take_peak(self, stage: str) -> None:
        self.peaks[stage] = float(peak_memory()[0] or 0) - self._held
        reset_peak_memory()


class SavedActivations(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of what autograd keeps for a backward pass, each memory once, the model's own left out."""

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

    def __exit__(self, *error: Any) -> None:
        """The forward pass is over."""
        self.counting = False
        super().__exit__(*error)


def bits_of(masks: MaskSet) -> int:
    """How many weights masks speak of."""
    return sum(weights for weights, _ in masks.counts().values())


def _bytes(tensor: Tensor) -> float:
    return float(tensor.numel() * tensor.element_size())


def _now(trainer: Trainer) -> float:
    """Seconds, when all that the device was given is done."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
    return time.monotonic()
