"""`SparseCheckpoints`: checkpoints that hold only what changes, and from which a run resumes bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from sparsefit.callbacks.changed_devices import carry_over
from sparsefit.callbacks.checkpoint_io import AtomicCheckpointIO, CompletingCheckpointIO
from sparsefit.callbacks.hooks import SPLITTING, PrunedRunCallback
from sparsefit.callbacks.lightning_loops import Position, at_batch_end, epoch_has_ended
from sparsefit.callbacks.pruning import WandaPruning
from sparsefit.callbacks.quantization import QuantizedBase
from sparsefit.callbacks.random_states import RandomStates, random_states, set_random_states
from sparsefit.callbacks.resume_checks import (
    FORMAT,
    ChangedRates,
    check_same_optimizers,
    check_same_run,
    data_name,
    optimizer_kinds,
)
from sparsefit.callbacks.sharded_checkpoints import check_read, save_aside, splits_weights
from sparsefit.pruning import MaskSet
from sparsefit.ranks import from_all
from sparsefit.recovery.base_deduplication import InBase, compare, complete, leave_out
from sparsefit.recovery.recipe_checks import check_same_recipe
from sparsefit.recovery.run_files import CHECKPOINTS_FOLDER, holds_run
from sparsefit.settings import named_settings

KEY = "sparsefit"
"""Key in a checkpoint of what this callback adds."""

STAGE_FILE = "stage.ckpt"
"""The checkpoint that this callback writes itself: when training begins, and again when it ends."""


@named_settings
class SparseCheckpoints(PrunedRunCallback):
    """Leaves out of checkpoints what the run folder already holds, and resumes from them exactly.

    `RunReport` writes the sparse base to the run folder once. A checkpoint then holds only the weights that are not
    bitwise equal to it, which are those that train, with the optimizer, the state of the other callbacks, the masks'
    digest, the position in the data and all random states. Without a base a checkpoint holds all weights. When a
    checkpoint is read, the missing weights are loaded from the base, which is looked up in the folder of this run, in
    the folder around the checkpoint and in the folder recorded in it.

    The callback saves a checkpoint of its own, `checkpoints/stage.ckpt`, when training begins and again when it ends.
    So neither pruning nor training is lost if the process is killed before the first checkpoint or after training.

    `trainer.fit(ckpt_path=...)` ends with bitwise the same weights as a run that was never interrupted, on the same
    machine and number of devices, if the datamodule can resume (`TextDataModule` can) and the learning rate does not
    depend on the clock, as it does when `GPUHourBudget` ends the run before `max_steps`. For this the position of the
    run is recorded after each optimizer step, and every checkpoint is saved at the last recorded position (the cases
    are listed in `lightning_loops`). Validation does not change the random states of training.

    A run can also resume on another number of devices. It then cannot be bitwise the same, and one warning says what
    differs (`changed_devices`).

    With `ModelParallelStrategy` (FSDP2) checkpoints hold all weights, as files or folders (`sharded_checkpoints`).
    Checkpoints of other strategies that shard weights (FSDP, DeepSpeed) are left unchanged.

    Args:
        folder: The run folder, the same as that of `RunReport`.

    A resumed run may have more steps or GPU-hours, or another learning rate, weight decay or dropout; these apply from
    then on. Model, adapter, distillation, optimizer and training data must be those of the checkpoint.

    Raises:
        ConfigError: on resuming, if the checkpoint is from another recipe or version.
        RunFolderError: on resuming, if the sparse base is not found; lists the folders searched.
    """

    def __init__(self, folder: str = "runs/sparsefit") -> None:
        self.folder = Path(folder)
        self._base: InBase | None = None
        self._origins: dict[str, int] = {}  # checksums of quantized weights when the base was compared
        self._position: Position | None = None  # the last recorded position, which checkpoints are saved at
        self._random: RandomStates | None = None  # after the last batch; restored after a validation
        self._steps: float = math.inf  # optimizer steps before this batch; infinite before the first batch
        self._updating = False  # whether weights may have changed since the position was recorded
        self._resumed = False  # from a checkpoint, and no batch has started since
        self._optimizers: list[str] | None = None  # class names in the checkpoint
        self._changed: ChangedRates | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the CheckpointIO that completes checkpoints when they are read."""
        if stage == "fit":
            self._position = self._random = self._optimizers = self._changed = None
            self._steps, self._updating, self._resumed = math.inf, False, False
        if _cannot_handle(trainer):
            return
        io = trainer.strategy.checkpoint_io
        inner = io.inner if isinstance(io, CompletingCheckpointIO) else io
        inner = AtomicCheckpointIO() if type(inner) is TorchCheckpointIO else inner
        completing = CompletingCheckpointIO(
            inner, lambda checkpoint, path: self._complete(trainer, pl_module, checkpoint, path)
        )
        trainer.strategy.checkpoint_io = inner if splits_weights(trainer) else completing

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the position of the run."""
        if trainer.state.fn != TrainerFn.FITTING or _cannot_handle(trainer):
            return
        saved, name = checkpoint.get(KEY), data_name(trainer, checkpoint)
        late = trainer.strategy.restore_checkpoint_after_setup  # then this hook runs after `on_fit_start`
        if late:
            check_read(trainer, pl_module, checkpoint, trainer.ckpt_path)
        other = late and saved is not None and carry_over(checkpoint, saved, trainer, trainer.ckpt_path)
        if other and name is not None:
            trainer.datamodule.load_state_dict(checkpoint[name])  # Lightning loaded the unconverted state before
        self._restore(trainer, pl_module, checkpoint, saved)
        if late:
            self._optimizers = None  # `check_read` has checked them
            self._before_data(trainer)

    def _restore(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any], saved: dict[str, Any] | None
    ) -> None:
        loops, data = checkpoint.get("loops", {}).get("fit_loop"), checkpoint.get(data_name(trainer, checkpoint))
        self._resumed = True
        if saved is None:  # saved without this callback
            self._position = Position(loops, data, random_states(), between_epochs=False)
            return
        random, training = (saved[key][trainer.global_rank] if key in saved else None for key in ("random", "training"))
        self._position = Position(loops, data, random, saved["between_epochs"], saved["whole_step"], training)
        self._optimizers, self._changed = saved.get("optimizers"), ChangedRates(checkpoint, module)
        if not saved["whole_step"]:
            rank_zero_warn(
                "The checkpoint was saved by an interrupt while the optimizer changed the weights: the run goes on, "
                "but not exactly as it would have. An earlier checkpoint is exact"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizers before their states are restored."""
        if self._optimizers is not None:
            check_same_optimizers(self._optimizers, trainer)
        self._before_data(trainer)

    def on_base_ready(self, trainer: Trainer, pl_module: LightningModule, masks: MaskSet) -> None:
        """Record the random states again: the training loader draws after pruning, which has drawn numbers itself."""
        self._before_data(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply changed learning rates and weight decay, and save the start of training."""
        if self._resumed and self._position.training is not None:
            set_random_states(self._position.training)
        self._random = random_states()
        if self._changed is not None:
            self._changed.apply(trainer)
            self._changed = None
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._save_start(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the start of training with strategies that prune in `on_train_start`."""
        if trainer.strategy.restore_checkpoint_after_setup and trainer.current_epoch == 0:
            self._random = random_states()
            self._save_start(trainer)

    def on_closing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the trained state before it is exported."""
        self._save(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """When resuming within an epoch, restore the random states here, after the new loader has drawn its seeds."""
        if self._resumed and not self._position.between_epochs:
            set_random_states(self._position.random)
        self._resumed = False
        # With manual optimization it is unknown whether more batches belong to this step, so each batch counts as one.
        self._steps = trainer.global_step if pl_module.automatic_optimization else -1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Mark that from here to the end of the batch the weights match neither the last position nor the next."""
        self._updating = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Record the position after a step."""
        self._random = random_states()
        self._note(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the random states of training, as a resumed run may run one validation fewer."""
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING and self._random is not None:
            set_random_states(self._random)
            self._note(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the position between two epochs. Also called when training stops within an epoch."""
        self._random = random_states()
        if epoch_has_ended(trainer):
            self._note(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the last recorded position into the checkpoint, and leave out what the base holds."""
        if _cannot_handle(trainer):
            return
        if at_batch_end(trainer):  # if another callback saves, this hook may not have been called for this batch yet
            self.on_train_batch_end(trainer, pl_module)
        name, position = data_name(trainer, checkpoint), self._position
        position = position or Position.at_start(trainer, random_states())
        position.write(checkpoint, name)
        checkpoint[KEY] = {
            "format": FORMAT,
            "world_size": trainer.world_size,
            "accumulated": trainer.accumulate_grad_batches,
            "random": from_all(position.random),
            "training": from_all(position.training),
            "between_epochs": position.between_epochs,
            "whole_step": position.whole_step and not self._updating,
            "optimizers": optimizer_kinds(trainer),
            "data": name,
            "base": None,
        }
        if trainer.is_global_zero and not splits_weights(trainer):
            checkpoint[KEY]["base"] = self._leave_out(trainer, pl_module, checkpoint)

    def _save_start(self, trainer: Trainer) -> None:
        if trainer.global_step == 0 and not self._resumed and not _cannot_handle(trainer):
            self._position = Position.at_start(trainer, self._position.random, self._random)
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        path = self.folder / CHECKPOINTS_FOLDER / STAGE_FILE
        if splits_weights(trainer):
            save_aside(trainer, path)
        elif not _cannot_handle(trainer):
            trainer.save_checkpoint(path)

    def _before_data(self, trainer: Trainer) -> None:
        """Record the random states before the training loader draws its shuffling and the seeds of its workers; after a
        resume, restore them."""
        if self._resumed:
            set_random_states(self._position.random)
        elif self._position is None or trainer.train_dataloader is None:  # calibration may have created it already
            self._position = Position.at_start(trainer, random_states())

    def _note(self, trainer: Trainer) -> None:
        """Record the position, unless more batches of the current step follow."""
        if trainer.global_step > self._steps:
            self._position = Position.now(trainer, self._random)
            self._updating = False

    def _leave_out(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> dict[str, Any] | None:
        pruning = next((callback for callback in trainer.callbacks if isinstance(callback, WandaPruning)), None)
        if pruning is None or pruning.masks is None:
            return None
        quantized = next((callback for callback in trainer.callbacks if isinstance(callback, QuantizedBase)), None)
        origins = {} if quantized is None else dict(quantized.origins)
        if self._base is None or self._origins != origins or not self._base.holds(pruning.masks):
            self._base = compare(self.folder, module, pruning.masks, checkpoint["state_dict"], origins)
            self._origins = origins
        return None if self._base is None else leave_out(self._base, checkpoint, pruning.state_key, origins)

    def _complete(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any], path: str | Path
    ) -> None:
        saved = checkpoint.get(KEY)
        if saved is None:
            return
        check_same_run(checkpoint, saved, trainer, path)
        fitting = trainer.state.fn == TrainerFn.FITTING
        check_same_recipe(checkpoint, module, path, training=fitting)
        if fitting:
            carry_over(checkpoint, saved, trainer, path)
        if saved["base"] is None:
            return
        path = Path(path).absolute()
        # A copied run folder uses its own files and never those of the folder it was copied from.
        home = next((folder for folder in (path.parent.parent, path.parent) if holds_run(folder)), None)
        places = [self.folder, Path(saved["base"]["folder"])] if home is None else [home]
        found = complete(checkpoint, saved["base"], path, places)
        if fitting and found != self.folder.absolute():
            rank_zero_info(
                f"The checkpoint {path} is of the run in {found}, which is left as it is: from here on the run is "
                f"written to {self.folder.absolute()}, with a base of its own."
            )


def _cannot_handle(trainer: Trainer) -> bool:
    """Whether the strategy shards weights in a way whose checkpoints are left unchanged (FSDP1, DeepSpeed)."""
    return isinstance(trainer.strategy, SPLITTING) and not splits_weights(trainer)
