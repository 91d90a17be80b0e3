"""The hooks of a pruned run, beside Lightning's own: what callbacks tell one another, in whatever order they stand."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from sparsefit.errors import ConfigError
from sparsefit.pruning import MaskSet, PruningResult
from sparsefit.sharded import check_layout, reshard

SPLITTING = FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy
"""The strategies that split weights over devices."""


class PrunedRunCallback(Callback):
    """A callback that takes part in the pruning and in the end of a run: overrides what it needs.

    The hooks come in the order in which they stand here. All but the last come from `WandaPruning`, in `on_fit_start`;
    a run that is resumed has been pruned, and has the last alone.
    """

    def on_pruning_check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """May refuse, before anything is spent."""

    def on_pruning_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sees the dense model."""

    def on_pruning_end(self, trainer: Trainer, pl_module: LightningModule, result: PruningResult) -> None:
        """Sees the pruned model."""

    def on_reconstruction(self, trainer: Trainer, pl_module: LightningModule, masks: MaskSet) -> None:
        """May tune the kept weights, before anything else is trained."""

    def on_base_ready(self, trainer: Trainer, pl_module: LightningModule, masks: MaskSet) -> None:
        """Finds the sparse base as it will stay, to write it."""

    def on_closing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Comes when training has ended, on all ranks, before `RunReport` exports, evaluates and reports."""


HOOKS = tuple(name for name in vars(PrunedRunCallback) if name.startswith("on_"))


def tell(trainer: Trainer, hook: str, *args: Any) -> None:
    """Call a hook of all callbacks of a trainer that take part.

    Raises:
        ConfigError: if a callback has such a hook and is no `PrunedRunCallback`: it would wait for its call in vain.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, PrunedRunCallback):
            getattr(callback, hook)(trainer, *args)
        elif own := [name for name in HOOKS if hasattr(callback, name)]:
            raise ConfigError(
                f"{type(callback).__name__} has {own[0]}, which is a hook of sparsefit and not of Lightning: derive it "
                "from sparsefit.callbacks.PrunedRunCallback"
            )


def check_split(trainer: Trainer, module: LightningModule) -> None:
    """See that a model which the trainer's strategy has split over devices can be pruned as it is.

    Raises:
        ConfigError: if it was flattened, or split otherwise than by rows; says what to take.
    """
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ConfigError(
            f"{type(trainer.strategy).__name__} flattens the weights that it splits over devices, so that they are "
            "no matrices any more: split the model by ModelParallelStrategy (FSDP2: `fully_shard` in the module's "
            "configure_model), which is pruned in place; or prune first (`sparsefit prune`, or fit with "
            "max_steps=0 on one device) and train the pruned model"
        )
    reshard(module)
    check_layout(module)
