"""A mixin that recovers a pruned model in any LightningModule: distillation from the dense model, masked adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from sparsefit.errors import ConfigError
from sparsefit.pruning import MaskSet
from sparsefit.recovery.adapters import bind_masks
from sparsefit.recovery.base_deduplication import complete
from sparsefit.recovery.distill import DenseTeacher, DistillSettings, divergence

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    _Base = LightningModule
else:
    _Base = object

_Answer = TypeVar("_Answer")


class RecoveryMixin(_Base):
    """Distillation and adapters for a LightningModule; list it before `LightningModule` among the bases.

    ```python
    class MyModule(RecoveryMixin, LightningModule):
        def __init__(self):
            super().__init__()
            self.net = attach_adapter(MyNet(), AdapterSettings(target_modules="all-linear"))
            self.distill = DistillSettings(weight=0.5)

        def training_step(self, batch, batch_idx):
            x, y = batch
            taught = self.taught(self.net, x)  # before the student's forward pass
            logits = self.net(x)
            return self.distilled(cross_entropy(logits, y), logits, taught)
    ```

    The teacher is the module at the time when a fit is set up, so the network must exist by then (create it in
    `__init__`) and be dense. A module that overrides `setup`, `on_train_start` or `on_load_checkpoint` must call
    `super()`.

    Attributes:
        distill: How the dense model teaches; None without distillation.
        dense_teacher: The dense model, once a fit has been set up.
    """

    distill: DistillSettings | None = None
    dense_teacher: DenseTeacher | None = None

    def setup(self, stage: str) -> None:
        """Make the module as it is now, before it is pruned or a checkpoint is loaded, the teacher.

        Raises:
            ConfigError: if it has no parameters yet.
        """
        super().setup(stage)
        if stage != "fit" or self.distill is None:
            return
        if not any(True for _ in self.parameters()):
            raise ConfigError(
                f"{type(self).__name__} has no parameters when the fit is set up, so there is no dense model to learn "
                "from: make the network in __init__, not in configure_model, or leave out `distill`"
            )
        with (
            self.dense_teacher.in_place(self) if self.dense_teacher is not None else nullcontext()
        ):  # of an earlier fit
            self.dense_teacher = DenseTeacher(self)

    def on_train_start(self) -> None:
        """Reduce the teacher's copy to the dense values that the module no longer has, now that it is pruned."""
        super().on_train_start()
        if self.dense_teacher is not None:
            self.dense_teacher.settle(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Complete a checkpoint that lacks the weights of the base, and give masked adapters their masks: for
        `load_from_checkpoint`, which runs no callbacks."""
        super().on_load_checkpoint(checkpoint)
        left_out = (checkpoint.get("sparsefit") or {}).get("base")
        if left_out is not None and not left_out["entries"].keys() <= checkpoint["state_dict"].keys():
            complete(checkpoint, left_out, Path("that is loaded"), [])
        states = (checkpoint.get("callbacks") or {}).values()
        if masks := next((s["masks"] for s in states if isinstance(s, Mapping) and "masks" in s), None):
            bind_masks(self, MaskSet.from_state_dict(masks))

    def taught(self, call: Callable[..., _Answer], *args: Any, **kwargs: Any) -> _Answer | None:
        """The result of `call(*args, **kwargs)` with the dense weights, without gradients; None without a teacher.

        Call this before the student's forward pass, as autograd then keeps the student's weights for the backward pass.

        Raises:
            ConfigError: if the teacher still shares its weights with the student.
        """
        if self.dense_teacher is None:
            return None
        if not self.dense_teacher.settled:
            raise ConfigError(
                f"the dense teacher of {type(self).__name__} is the student itself: where on_train_start is "
                "overridden, it must call super().on_train_start()"
            )
        with self.dense_teacher.in_place(self):
            return call(*args, **kwargs)

    def taught_alone(self, taught: Any) -> bool:
        """Whether the loss depends on the teacher alone, so that no labels are needed (a weight of 1)."""
        return taught is not None and self.distill is not None and self.distill.weight == 1

    def distilled(
        self, loss: Tensor | None, student: Tensor, taught: Tensor | None, counted: Tensor | None = None
    ) -> Tensor:
        """The loss, mixed with the distance from the teacher, which is logged as train_divergence.

        Args:
            loss: The loss on the labels; may be None if `taught_alone`.
            student: The student's output: logits (..., classes), unless `distance` is overridden.
            taught: The teacher's output, of the same shape; None returns the loss unchanged.
            counted: (...) bool; positions that are False are left out. None counts all.
        """
        if taught is None or self.distill is None:
            if loss is None:
                raise ConfigError(
                    f"{type(self).__name__} computed no loss on the labels, and there is no dense teacher"
                )
            return loss
        away = self.distance(student, taught, counted)
        self.log("train_divergence", away, prog_bar=True, batch_size=len(student))
        return away if loss is None else (1 - self.distill.weight) * loss + self.distill.weight * away

    def distance(self, student: Tensor, taught: Tensor, counted: Tensor | None = None) -> Tensor:
        """The distance between student and teacher: the divergence of logits. Override it for other outputs."""
        return divergence(student, taught, counted, self.distill.temperature if self.distill is not None else 1.0)
