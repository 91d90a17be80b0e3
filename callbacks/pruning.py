"""`WandaPruning`: prunes a model when `trainer.fit` starts and keeps it pruned while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from sparsefit.callbacks.budgeted_progress import paid_progress
from sparsefit.callbacks.calibration import calibration_forward, checked_batches, predicting
from sparsefit.callbacks.divergence import DivergenceGuard
from sparsefit.callbacks.hooks import call_hook, check_split
from sparsefit.callbacks.plan_line import log_plan_line
from sparsefit.callbacks.report_entries import log_pruned, plain_config, pruned
from sparsefit.callbacks.slow_precision import warn_of_slow_precision
from sparsefit.callbacks.trainer_lookup import ledger_of
from sparsefit.callbacks.weight_averages import restart_averages
from sparsefit.errors import CalibrationError, ConfigError, DataError, MaskError
from sparsefit.pruning import MaskSet, PruningConfig, PruningResult, prune
from sparsefit.pruning.fisher_checks import check_whole_weights
from sparsefit.recovery.adapters import bind_masks
from sparsefit.recovery.dora_magnitudes import magnitudes_follow
from sparsefit.recovery.mask_guard import MaskGuard
from sparsefit.recovery.tuners import check_tuners
from sparsefit.settings import named_settings, number
from sparsefit.sharded import units_of


@named_settings
class WandaPruning(DivergenceGuard):
    """Prunes once, at fit start, and keeps the masks fixed through training.

    The module needs no changes. Its model may be a plain torch module, a transformers model or a PEFT-wrapped one,
    whose base is pruned. A run that resumes from a checkpoint takes the masks from it and does not prune again. If the
    pruned weights are frozen, as under LoRA, training steps have no overhead; if they train, neither gradient nor
    optimizer can change a pruned weight from zero. Masks are verified before each checkpoint and at the end of
    training. A loss, gradient or trained weight that is NaN or infinite ends the fit with a `DivergenceError` and is
    never saved to a checkpoint.

    Other callbacks take part through the hooks of `PrunedRunCallback`, in any order in the list of callbacks.

    Args:
        sparsity: Share of weights to remove, in [0, 1); by default 0.5, or what the pattern implies.
        calibration: Batches to calibrate on, in the form of the training batches. By default the datamodule's
            `calibration_dataloader()`, else the first batches of the training data.
        calibration_samples: How many samples to take; by default all of a source made for calibration, and
            128 from training data.
        pattern: None (unstructured) or "N:M", such as "2:4".
        score: "wanda", "magnitude", "ria", "sparsegpt", ...: see `PruningConfig` for this and all following settings.
        granularity: Which weights compete: "output", "layer", "input", "(output, 128)", "variant"; None uses the
            default of the score.
        update: "block" (one block after the other) or "none" (one pass of the dense network).
        allocation: How sparsity is distributed over layers: None, "uniform", "owl", "fisher", or sparsities by
            layer name.
        owl_threshold: A score above this multiple of the mean score is an outlier, for OWL.
        owl_spread: Largest distance of a block's density from the mean, for OWL.
        fisher_spread: Largest distance of a matrix's sparsity from the mean, for "fisher".
        swaps: Maximum number of swaps that refine the mask of a row (SparseSwaps).
        reconstruction: New values for the kept weights: None, "sequential", "iterative" (SparseGPT), "least_squares".
        damping: Added to the Gram matrix's diagonal, as a share of its mean.
        targets: What to prune, by names of layers or modules, globs or "re:..."; None is the model's blocks.
        exclude: What stays dense, named in the same ways.
        existing_zeros: How zeros in an already sparse model are treated: "keep", "adopt" or "ignore".
        micro_batch_size: Calibration samples that go through the model at once.
        device: Where blocks are computed, one at a time, if not on the model's own device.
        states_on_cpu: Keep the hidden states between blocks in CPU memory.

    Raises:
        ConfigError: if a setting cannot work.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        calibration: Iterable[Any] | None = None,
        calibration_samples: int | None = None,
        pattern: str | int | None = None,
        score: str = "wanda",
        granularity: str | tuple[str, int] | None = None,
        update: str = "block",
        allocation: str | dict[str, float] | None = None,
        owl_threshold: float = 5.0,
        owl_spread: float = 0.08,
        fisher_spread: float = 0.2,
        swaps: int = 0,
        reconstruction: str | None = None,
        damping: float = 0.01,
        targets: Sequence[str] | Set[str] | str | None = None,
        exclude: Sequence[str] | Set[str] | str = (),
        existing_zeros: str | None = None,
        micro_batch_size: int = 8,
        device: str | None = None,
        states_on_cpu: bool = False,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in PruningConfig.__dataclass_fields__}
        super().__init__()
        self.config = PruningConfig(**given)
        self.calibration = calibration
        self.calibration_samples = calibration_samples
        if calibration_samples is not None:
            self.calibration_samples = number("calibration_samples", calibration_samples, least=1, whole=True)
        self.masks: MaskSet | None = None
        self.result: PruningResult | None = None
        self.summary: dict[str, Any] = {}
        self._guard: MaskGuard | None = None
        self._batches_seen = False
        self._bound: MaskSet | None = None  # the masks that masked adapters use now

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, unless a checkpoint provided the masks or this model is pruned already."""
        self._batches_seen = False
        if trainer.limit_train_batches == 0 and 0 not in (trainer.max_steps, trainer.max_epochs):
            raise ConfigError("limit_train_batches is 0, so nothing would be trained: to prune alone, set max_steps=0")
        # Strategies such as FSDP restore later: only on_train_start shows whether a checkpoint holds masks.
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._prune_if_dense(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify the masks on the restored weights, and guard the pruned weights that train."""
        super().on_train_start(trainer, pl_module)
        if trainer.strategy.restore_checkpoint_after_setup:
            self._prune_if_dense(trainer, pl_module)
        self.masks.verify(pl_module)
        self._bind(pl_module)
        self._guard = MaskGuard(self.masks)
        self._guard.watch(pl_module, trainer.optimizers)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give masked adapters the masks of a checkpoint, for a validation without training."""
        super().on_validation_start(trainer, pl_module)
        self._bind(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give masked adapters the masks of a checkpoint."""
        self._bind(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give masked adapters the masks of a checkpoint."""
        self._bind(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """At the start of each epoch, guard the current parameters, as a callback may have replaced some."""
        if batch_idx == 0:  # not in on_train_epoch_start, which callbacks further down the list have yet to run
            self._guard.watch(pl_module, trainer.optimizers)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Record that there was a training batch."""
        self._batches_seen = True
        super().on_train_batch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there was a batch: without a limit of epochs, Lightning reads an empty stream forever."""
        self._check_trained(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify every mask at the end of training."""
        super().on_train_end(trainer, pl_module)
        self._verify(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that something was trained: Lightning begins no epoch if the data are known to be empty."""
        if self.masks is None:
            raise ConfigError(
                f"nothing was pruned: {type(trainer.strategy).__name__} restores checkpoints when a fit has started, "
                "and with nothing to train no hook comes after that. Train for a step (max_steps=1), or prune on one "
                "device (`sparsefit prune`)"
            )
        self._check_trained(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Verify every mask before a checkpoint is written."""
        self._verify(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks from weights and optimizers."""
        self._unguard()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks, as Lightning calls no `teardown` after an exception."""
        self._unguard()
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """The masks (one bit per weight), their digest, and the summary of the pruning with its configuration."""
        if self.masks is None:
            return {}
        return {"masks": self.masks.state_dict(), "digest": self.masks.digest(), "summary": self.summary}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Discard the masks of an earlier fit; those of the checkpoint, if any, replace them."""
        self.masks = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the masks of a checkpoint.

        Raises:
            MaskError: if they are damaged, or were left in the run folder and nothing has loaded them from there.
        """
        if not state_dict:
            return
        if "masks" not in state_dict:
            raise MaskError(
                "the checkpoint leaves its masks to the folder of its run: resume with the callback "
                "SparseCheckpoints(folder=...), which reads them there"
            )
        masks = MaskSet.from_state_dict(state_dict["masks"])
        if masks.digest() != state_dict["digest"]:
            raise MaskError("the checkpoint is damaged: its masks do not give the digest saved with them")
        self.masks, self.summary = masks, dict(state_dict["summary"])
        # A checkpoint of an earlier version has fewer settings.
        now, saved = plain_config(self.config), self.summary.get("config") or {}
        others = [f"{name}={value!r}" for name, value in now.items() if name in saved and saved[name] != value]
        if others:
            rank_zero_warn(
                f"The model stays pruned as in the checkpoint ({saved}); these settings of the current run differ and "
                f"have no effect: {', '.join(others)}"
            )

    def _prune_if_dense(self, trainer: Trainer, module: LightningModule) -> None:
        warn_of_slow_precision(trainer, module.parameters())
        if self.masks is None or (trainer.ckpt_path is None and not self._holds(module)):
            self._prune(trainer, module)
        else:
            log_plan_line(trainer, module, self.config)

    def _prune(self, trainer: Trainer, module: LightningModule) -> None:
        check_split(trainer, module)
        if trainer.ckpt_path is not None:
            rank_zero_info("The checkpoint holds no masks: it was saved before any pruning. The model is pruned now.")
        check_whole_weights(self.config, sharded=bool(units_of(module)))
        check_tuners(module, self.config)
        bind_masks(module, None)  # remove the masks of an earlier fit
        self._bound = None
        call_hook(trainer, "on_pruning_check", module)
        log_plan_line(trainer, module, self.config)
        forward = calibration_forward(trainer, module)
        with ledger_of(trainer).stage("calibration and pruning"), predicting(trainer):
            batches, source = self._batches(trainer, forward)
        call_hook(trainer, "on_pruning_start", module)
        with ledger_of(trainer).stage("calibration and pruning"), predicting(trainer):
            if self.config.needs_inputs:
                rank_zero_info(f"Calibrating on {source}.")
            # Blocks also run on their own, so the precision is set around the whole pruning, not each forward.
            precision = trainer.precision_plugin.predict_step_context()
            shown = paid_progress(trainer, "calibrating and pruning", "calibration")
            with shown as progress, precision, magnitudes_follow(module):
                self.result = prune(module, batches, self.config, forward=forward, progress=progress)
        asked = self.calibration_samples  # in total if ranks share a source, else per rank
        if self.config.needs_inputs and asked and self.result.samples not in (asked, asked * trainer.world_size):
            self.result.note(
                f"{self.result.samples} calibration samples were used where {asked} were asked for: "
                "a batch whose samples cannot be separated counts as a whole, and samples of only padding do not count"
            )
        self.masks = self.result.masks
        self.summary = pruned(self.result, source)
        rank_zero_info(
            f"Pruned {self.result.coverage:.1%} of the weights in the model's matrices to "
            f"{self.masks.sparsity:.2%} zeros, which makes {self.result.overall_sparsity:.2%} over all matrices."
        )
        for note in self.result.notes:
            rank_zero_warn(note)
        log_pruned(trainer.loggers, self.summary, self.masks, trainer.global_step)
        self._bind(module)
        restart_averages(trainer, module)
        call_hook(trainer, "on_pruning_end", module, self.result)
        call_hook(trainer, "on_reconstruction", module, self.masks)
        restart_averages(trainer, module)
        call_hook(trainer, "on_base_ready", module, self.masks)

    def _batches(self, trainer: Trainer, forward: Callable[[Any], Any]) -> tuple[list[Any] | None, str]:
        """The calibration batches and a description of their source. If the method needs no data, one sample for
        tracing the model, or None if no sample can be used."""
        needed = self.config.needs_inputs
        samples = self.calibration_samples if needed else 1
        try:
            batches, source = checked_batches(trainer, forward, self.calibration, samples, self.config)
        except CalibrationError:
            if needed:
                raise
            batches = None
        return batches, source if needed else "nothing: this method needs no data"

    def _bind(self, module: LightningModule) -> None:
        if self.masks is not None and self._bound is not self.masks:
            bind_masks(module, self.masks)
            self._bound = self.masks

    def _unguard(self) -> None:
        if self._guard is not None:
            self._guard.remove()
            self._guard = None

    def _holds(self, module: LightningModule) -> bool:
        try:
            self.masks.verify(module)
        except MaskError:
            return False
        return True

    def _check_trained(self, trainer: Trainer) -> None:
        trained = self._batches_seen or trainer.global_step > 0
        if not (trained or trainer.should_stop or 0 in (trainer.max_steps, trainer.max_epochs)):
            raise DataError(
                "the training data gave no batch, so the model is pruned and nothing was trained: there may be less "
                "text than one window, or calibration drew all of it. To prune alone, set max_steps=0"
            )

    def _verify(self, module: LightningModule) -> None:
        if self.masks is not None:
            self.masks.verify(module)
