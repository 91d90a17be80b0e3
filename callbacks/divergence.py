"""Stops a fit whose loss, gradients or weights are NaN or infinite, before anything of it is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from sparsefit.callbacks.hooks import PrunedRunCallback
from sparsefit.errors import DivergenceError
from sparsefit.recovery.finite_checks import (
    FiniteWatch,
    check_scaler,
    gradients_of,
    nonfinite_message,
    nonfinite_weights,
)
from sparsefit.recovery.schedule import first_rate

_STEPS_BETWEEN_CHECKS = 50
"""Optimizer steps between two checks of the gradient scaler, each of which waits for the GPU."""


class DivergenceGuard(PrunedRunCallback):
    """Checks each step of a fit, and the weights before they are saved. Its errors name the last checkpoint.

    Losses and gradients are checked before the optimizer step; on a GPU one step later, as the check does not wait for
    the GPU. A gradient scaler (precision "16-mixed") skips steps with infinite gradients by itself to find its scale.
    With a scaler, losses are checked at each step, and whether it skips all steps every 50 steps.
    """

    def __init__(self) -> None:
        self._watch = FiniteWatch()
        self._began: tuple[int, float] | None = None  # optimizer steps and gradient scale at the first check

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the state of an earlier fit."""
        self._watch, self._began = FiniteWatch(), None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the loss of a batch to the check of its step."""
        self._watch.add_loss(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Stop if the losses or gradients of this step (on a GPU, of the step before) are not finite."""
        scaler = _scaler_of(trainer)
        with _way_out(trainer):
            self._watch.check(trainer.global_step + 1, gradients_of(optimizer) if scaler is None else [])
        if scaler is not None and self._began is None:
            self._began = trainer.global_step, scaler.get_scale()
        elif trainer.global_step % _STEPS_BETWEEN_CHECKS == 0:
            self._check_scaler(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Check the weights if Lightning may save them without calling `on_save_checkpoint` (`save_weights_only`)."""
        if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
            self._check_weights(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if the gradient scaler skips all steps."""
        self._check_scaler(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the weights before they can be saved, also at the end of training."""
        self._check_weights(trainer, pl_module)

    def on_closing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the gradient scaler did not skip every step of the training."""
        self._check_scaler(trainer, ended=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the gradient scaler as in `on_closing`, which is not called without a `RunReport`."""
        self._check_scaler(trainer, ended=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check that trained weights are finite before a checkpoint is written."""
        self._check_weights(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """If weights are not finite, keep callbacks with `save_on_exception` from saving them."""
        if isinstance(exception, DivergenceError) and nonfinite_weights(pl_module, trained_only=True):
            for callback in trainer.checkpoint_callbacks:
                if hasattr(callback, "save_on_exception"):
                    callback.save_on_exception = False

    def _check_weights(self, trainer: Trainer, module: LightningModule) -> None:
        self._check_scaler(trainer)
        with _way_out(trainer):
            self._watch.settle()
            if broken := nonfinite_weights(module, trained_only=True):
                steps = f"after {trainer.global_step} optimizer steps the model has diverged"
                raise DivergenceError(f"{steps}: {nonfinite_message(broken)}")

    def _check_scaler(self, trainer: Trainer, ended: bool = False) -> None:
        began, scaler = self._began, _scaler_of(trainer)
        if scaler is None or began is None:
            return
        self._began = None  # if the check raises, the weights are finite and may still be saved
        with _way_out(trainer, "Train with bf16-mixed or 32-true precision"):
            check_scaler(scaler, began, trainer.global_step, ended)
        self._began = began


def _scaler_of(trainer: Trainer) -> torch.amp.GradScaler | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


@contextmanager
def _way_out(trainer: Trainer, way_out: str = "Lower the learning rate") -> Iterator[None]:
    """Add the last checkpoint and what to change to the message of a `DivergenceError`."""
    try:
        yield
    except DivergenceError as error:
        kinds = ("last_model_path", "best_model_path")
        named = [getattr(callback, kind, "") for callback in trainer.checkpoint_callbacks for kind in kinds]
        files = [path for path in map(Path, filter(None, named)) if path.is_file()]
        last = max(files, key=lambda file: file.stat().st_mtime, default=None)
        none = "no checkpoint had been written"
        kept = none if last is None else f"the last checkpoint with finite weights is {last}"
        rate = first_rate(trainer.optimizers)
        at_rate = "" if rate is None else f" at a learning rate of {rate:.3g}"
        raise DivergenceError(
            f"{error}. Training was stopped{at_rate}; {kept}. {way_out}, or look at the data and the precision"
        ) from None
