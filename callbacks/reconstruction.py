"""`BlockwiseReconstruction`: tunes each pruned block to match the dense block before any other training."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from sparsefit.callbacks.calibration import calibration_batches, calibration_forward, checked_batches, predicting
from sparsefit.callbacks.hooks import SPLITTING, PrunedRunCallback
from sparsefit.callbacks.trainer_lookup import budget_of, ledger_of
from sparsefit.errors import ConfigError
from sparsefit.pruning import MaskSet
from sparsefit.pruning.blocks import find_block_lists
from sparsefit.recovery.block_reconstruction import ReconstructSettings, dense_weights, reconstruct
from sparsefit.reporting.console import stage_progress
from sparsefit.settings import named_settings


@named_settings
class BlockwiseReconstruction(PrunedRunCallback):
    """Runs between the pruning and the training of a fit; does nothing in a fit that does not prune.

    The time is charged to the stage "reconstruction" of the run's ledger. A `GPUHourBudget` with a `split` limits it to
    its share of the hours; without a split it runs all passes.

    Args:
        passes: Passes over the calibration samples for each block; 0 turns the reconstruction off.
        learning_rate: Initial learning rate of Adam for each block; it falls linearly to zero.
        batch_size: Samples in a step, over all ranks together.
        calibration: Batches to tune on, in the form of the training batches. By default the datamodule's
            `calibration_dataloader()`, else the first batches of the training data.
        calibration_samples: How many samples to take; by default all of a source made for calibration, and
            128 from training data.

    Raises:
        ConfigError: if a setting cannot work.
    """

    def __init__(
        self,
        passes: int = 10,
        learning_rate: float = 1e-3,
        batch_size: int = 8,
        *,
        calibration: Iterable[Any] | None = None,
        calibration_samples: int | None = None,
    ) -> None:
        self.settings = ReconstructSettings(passes, learning_rate, batch_size)
        self.calibration = calibration
        self.calibration_samples = calibration_samples
        self.account: dict[str, Any] = {}
        self._dense: dict[str, Tensor] = {}
        self._data: tuple[list[Any], str] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the strategy does not shard weights."""
        if stage == "fit" and self.settings.passes and isinstance(trainer.strategy, SPLITTING):
            raise ConfigError(
                f"{type(trainer.strategy).__name__} splits weights over devices, and a block is tuned as a whole on "
                "each device: prune and reconstruct first (fit with max_steps=0 on one device or with strategy ddp, "
                "and train the model that it writes), or leave BlockwiseReconstruction out"
            )

    def on_pruning_check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the calibration data, and send a sample through the model.

        Raises:
            CalibrationError: if that cannot be done.
        """
        if self.settings.passes:
            with ledger_of(trainer).stage("calibration and pruning"), predicting(trainer):
                forward = calibration_forward(trainer, pl_module)
                self._data = checked_batches(trainer, forward, self.calibration, self.calibration_samples)

    def on_pruning_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the dense weights.

        Raises:
            ConfigError: if the model has no blocks.
        """
        if self.settings.passes:
            if not find_block_lists(pl_module):
                raise ConfigError("the model has no repeated blocks to reconstruct one by one: leave this callback out")
            self._dense = dense_weights(pl_module)

    def on_reconstruction(self, trainer: Trainer, pl_module: LightningModule, masks: MaskSet) -> None:
        """Tune the blocks."""
        if not self.settings.passes:
            return
        ledger, budget = ledger_of(trainer), budget_of(trainer)
        before = ledger.seconds.get("reconstruction", 0.0)
        with ledger.stage("reconstruction"), predicting(trainer):
            seconds = None if budget is None else budget.share_of(trainer, "reconstruction")
            start = time.monotonic()
            batches, source = self._data or calibration_batches(trainer, self.calibration, self.calibration_samples)
            self._data = None
            seconds = None if seconds is None else max(0.0, seconds - (time.monotonic() - start))
            shown = stage_progress("reconstructing block by block", None, visible=trainer.is_global_zero)
            with shown as advance, trainer.precision_plugin.predict_step_context():
                forward = calibration_forward(trainer, pl_module)
                errors = reconstruct(
                    pl_module,
                    batches,
                    self._dense,
                    masks,
                    self.settings,
                    forward=forward,
                    seconds=seconds,
                    progress=lambda done, total: advance(total=total),
                )
        self._dense = {}
        self.account = {
            **asdict(self.settings),
            "source": source,
            "seconds": ledger.seconds["reconstruction"] - before,
            "blocks": [asdict(error) for error in errors],
        }
