"""Hooks for pruning and for the end of a run, in addition to Lightning's; independent of the order of callbacks."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from sparsefit.errors import ConfigError
from sparsefit.pruning import MaskSet, PruningResult
from sparsefit.sharded import check_layout, reshard

SPLITTING = FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy
"""The strategies that shard weights over devices."""


class PrunedRunCallback(Callback):
    """Base class of callbacks that take part in the pruning or in the end of a run; override the hooks you need.

    The hooks are called in the order in which they are defined here. `WandaPruning` calls all but the last, in
    `on_fit_start`. A resumed run is pruned already, so only the last hook is called.
    """

    def on_pruning_check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called first: raise here to refuse the run before any time is spent."""

    def on_pruning_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with the dense model, just before it is pruned."""

    def on_pruning_end(self, trainer: Trainer, pl_module: LightningModule, result: PruningResult) -> None:
        """Called with the model just after it is pruned."""

    def on_reconstruction(self, trainer: Trainer, pl_module: LightningModule, masks: MaskSet) -> None:
        """Called to tune the kept weights, before any other training."""

    def on_base_ready(self, trainer: Trainer, pl_module: LightningModule, masks: MaskSet) -> None:
        """Called when the sparse base has its final values, to write it to disk."""

    def on_closing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called on all ranks when training has ended, before `RunReport` exports, evaluates and reports."""


HOOKS = tuple(name for name in vars(PrunedRunCallback) if name.startswith("on_"))


def call_hook(trainer: Trainer, hook: str, *args: Any) -> None:
    """Call a hook on every `PrunedRunCallback` of a trainer.

    Raises:
        ConfigError: if a callback has one of these hooks but is not a `PrunedRunCallback`: it would never be called.
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
    """Check that a model which the trainer's strategy has sharded over devices can be pruned in place.

    Raises:
        ConfigError: if its weights are flattened or not sharded by rows; names the strategy to use instead.
    """
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ConfigError(
            f"{type(trainer.strategy).__name__} flattens the weights that it splits over devices, so that they are "
            "no longer matrices: split the model by ModelParallelStrategy (FSDP2: `fully_shard` in the module's "
            "configure_model), which is pruned in place; or prune first (`sparsefit prune`, or fit with "
            "max_steps=0 on one device) and train the pruned model"
        )
    reshard(module)
    check_layout(module)
