"""Stopping a fit that went to NaN or infinity, before it is written anywhere."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from sparsefit.errors import DivergenceError
from sparsefit.recovery.finite import FiniteWatch, check_scaler, gradients_of, nonfinite_weights, told
from sparsefit.recovery.schedule import first_rate

_STEPS_BETWEEN_LOOKS = 50
"""At a gradient scaler, for which a GPU is waited for."""


class DivergenceGuard:
    """Looks at each step of a fit, and at the weights before they are saved. What it raises names the last checkpoint.

    Losses and gradients are seen before the step that they would spoil; on a GPU, which is not waited for, one step
    later. A gradient scaler (precision "16-mixed") leaves steps with infinite gradients out by itself, which is how it
    finds its scale: then losses are looked at, and now and then whether it leaves out all.
    """

    def __init__(self) -> None:
        self._watch = FiniteWatch()
        self._began: tuple[int, float] | None = None  # optimizer steps and the scale of a gradient scaler

    def see_loss(self, loss: Tensor) -> None:
        """Take in the loss of a batch."""
        self._watch.add_loss(loss)

    def before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Stop if this step (on a GPU, the one before) is not finite."""
        scaler = _scaler_of(trainer)
        try:
            self._watch.check(trainer.global_step + 1, gradients_of(optimizer) if scaler is None else [])
        except DivergenceError as error:
            raise _with_way_out(str(error), trainer) from None
        if scaler is not None and self._began is None:
            self._began = trainer.global_step, scaler.get_scale()
        elif trainer.global_step % _STEPS_BETWEEN_LOOKS == 0:
            self.check_scaler(trainer)

    def check_scaler(self, trainer: Trainer, ended: bool = False) -> None:
        """Stop if a gradient scaler leaves out every step, or has done so in a run that has ended."""
        scaler = _scaler_of(trainer)
        if scaler is None or self._began is None:
            return
        try:
            check_scaler(scaler, self._began, trainer.global_step, ended)
        except DivergenceError as error:
            self._began = None  # what is saved because of this error holds whole weights
            raise _with_way_out(str(error), trainer, "Train with bf16-mixed or 32-true precision") from None

    def check_weights(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop if what is trained is not finite, in the last step or in the weights, or is not trained at all."""
        self.check_scaler(trainer)
        try:
            self._watch.settle()
        except DivergenceError as error:
            raise _with_way_out(str(error), trainer) from None
        if broken := nonfinite_weights(module, trained_only=True):
            steps = f"after {trainer.global_step} optimizer steps the model has diverged"
            raise _with_way_out(f"{steps}: {told(broken)}", trainer)

    def keep_checkpoints(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Have no checkpoint written of weights that are not finite, where callbacks save one on an exception."""
        if isinstance(exception, DivergenceError) and nonfinite_weights(module, trained_only=True):
            for callback in trainer.checkpoint_callbacks:
                if hasattr(callback, "save_on_exception"):
                    callback.save_on_exception = False


def saves_weights_only(trainer: Trainer) -> bool:
    """Whether there are checkpoints that Lightning writes without asking callbacks."""
    return any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks)


def _scaler_of(trainer: Trainer) -> torch.amp.GradScaler | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _with_way_out(what: str, trainer: Trainer, way_out: str = "Lower the learning rate") -> DivergenceError:
    kinds = ("last_model_path", "best_model_path")
    named = [getattr(callback, kind, "") for callback in trainer.checkpoint_callbacks for kind in kinds]
    files = [path for path in map(Path, filter(None, named)) if path.is_file()]
    rate = first_rate(trainer.optimizers)
    at_rate = "" if rate is None else f" at a learning rate of {rate:.3g}"
    last = max(files, key=lambda file: file.stat().st_mtime, default=None)
    kept = "no checkpoint had been written" if last is None else f"the last checkpoint with finite weights is {last}"
    return DivergenceError(
        f"{what}. Training was stopped{at_rate}; {kept}. {way_out}, or look at the data and the precision"
    )
