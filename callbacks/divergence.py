"""Stopping a fit that went to NaN or infinity, before it is written anywhere."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from sparsefit.errors import DivergenceError
from sparsefit.recovery.finite import FiniteWatch, gradients_of, nonfinite_weights, told
from sparsefit.recovery.schedule import first_rate


class DivergenceGuard:
    """Looks at each step of a fit, and at the weights before they are saved. What it raises names the last checkpoint.

    Losses and gradients are seen before the step that they would spoil; on a GPU, which is not waited for, one step
    later. A gradient scaler (precision "16-mixed") leaves steps with infinite gradients out by itself, which is how it
    finds its scale: then only losses are looked at.
    """

    def __init__(self) -> None:
        self._watch = FiniteWatch()

    def see_loss(self, loss: Tensor) -> None:
        """Take in the loss of a batch."""
        self._watch.add_loss(loss)

    def before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Stop if this step (on a GPU, the one before) is not finite."""
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        try:
            self._watch.check(trainer.global_step + 1, [] if scaled else gradients_of(optimizer))
        except DivergenceError as error:
            raise _with_way_out(str(error), trainer) from None

    def check_weights(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop if what is trained is not finite, in the last step or in the weights."""
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


def _with_way_out(what: str, trainer: Trainer) -> DivergenceError:
    kinds = ("last_model_path", "best_model_path")
    named = [getattr(callback, kind, "") for callback in trainer.checkpoint_callbacks for kind in kinds]
    files = [path for path in map(Path, filter(None, named)) if path.is_file()]
    rate = first_rate(trainer.optimizers)
    at_rate = "" if rate is None else f" at a learning rate of {rate:.3g}"
    last = max(files, key=lambda file: file.stat().st_mtime, default=None)
    kept = "no checkpoint had been written" if last is None else f"the last checkpoint with finite weights is {last}"
    return DivergenceError(
        f"{what}. Training was stopped{at_rate}; {kept}. Lower the learning rate, or look at the data and the precision"
    )
