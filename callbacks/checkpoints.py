"""`SparseCheckpoints`: checkpoints that hold only what changes, and from which a run goes on to the bit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from sparsefit.callbacks.checkpoint_io import AtomicCheckpointIO, CompletingCheckpointIO
from sparsefit.callbacks.hooks import PrunedRunCallback
from sparsefit.callbacks.lightning_loops import at_the_start, batches_of, close_epoch, move
from sparsefit.callbacks.pruning import WandaPruning
from sparsefit.callbacks.quantization import QuantizedBase
from sparsefit.callbacks.random_states import RandomStates
from sparsefit.callbacks.resuming import (
    FORMAT,
    ChangedRates,
    check_format,
    check_same_optimizers,
    check_same_run,
    data_name,
    optimizer_kinds,
)
from sparsefit.pruning import MaskSet
from sparsefit.recovery.run_files import CHECKPOINTS_FOLDER, holds_run
from sparsefit.recovery.same_recipe import check_same_recipe
from sparsefit.recovery.sparse_base import InBase, compare, complete, leave_out
from sparsefit.settings import named_settings

KEY = "sparsefit"
"""Under which a checkpoint has what this callback adds."""

STAGE_FILE = "stage.ckpt"
"""The checkpoint of a run's own: of the moment when training began, and then of the one when it ended."""


_POSITION = ("random", "between_epochs", "whole_step")


@dataclass(frozen=True)
class _Step:
    """The start of an optimizer step: where its first batch stands, and how random numbers stood then."""

    number: int
    batch: int  # of its epoch
    random: RandomStates


@named_settings
class SparseCheckpoints(PrunedRunCallback):
    """Leaves out of checkpoints what lies in the run folder already, and resumes from them exactly.

    `RunReport` writes the sparse base and its masks to the run folder once. A checkpoint then holds the weights that
    train, the optimizer, the state of the other callbacks, the masks' digest, the position in the data and all random
    states. Whatever is not equal, bit by bit, to what lies in the base stays in the checkpoint; without a base, it is
    whole. As it is read, it is filled up from the base, which is looked for in this run's folder, where the checkpoint
    lies and where it was.

    It saves one of its own, `checkpoints/stage.ckpt`, as training begins and again as it ends, so that no pruning and
    no training is lost with a process that is killed before the first checkpoint, or in the end of its run.

    `trainer.fit(ckpt_path=...)` then ends with the same weights, bit by bit, as a run that was never interrupted, on
    the same machine and number of devices, if the data can be resumed (`TextDataModule` can) and its learning rate does
    not depend on the clock: where `GPUHourBudget` ends a run before `max_steps` does, the seconds decide. A checkpoint
    stands at the end of an optimizer step: one that is saved amid the batches of a step, or by an interrupt within it,
    goes back to the end of the step before. Validation leaves the random numbers of the training as they were.

    With a strategy that splits weights over devices (FSDP, DeepSpeed, ModelParallel) it leaves checkpoints alone.

    Args:
        folder: The run folder, the same as that of `RunReport`.

    A resumed run may have more steps or GPU-hours, another learning rate, weight decay or dropout: these count from
    there on. Model, adapter, distillation, optimizer and training data must be those of the checkpoint.

    Raises:
        ConfigError: on resuming, if the checkpoint is from another recipe, number of devices or version.
        RunFolderError: on resuming, if the sparse base is nowhere to be found; says where it was looked for.
    """

    def __init__(self, folder: str = "runs/sparsefit") -> None:
        self.folder = Path(folder)
        self._base: InBase | None = None
        self._origins: dict[str, int] = {}  # of quantized weights, when the base was compared
        self._step: _Step | None = None
        self._updating = False
        self._after_batch: RandomStates | None = None
        self._resumed: tuple[RandomStates, bool] | None = None  # and whether an epoch's data come first
        self._position: dict[str, Any] | None = None  # of a checkpoint, as long as no batch has been done
        self._before_data: RandomStates | None = None
        self._starting = False
        self._optimizers: list[str] | None = None  # of a checkpoint
        self._changed: ChangedRates | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have checkpoints filled up as they are read, before anything is restored."""
        self._step = self._after_batch = self._resumed = self._optimizers = self._changed = self._position = None
        self._updating = self._starting = False
        if _splits_weights(trainer):
            return
        io = trainer.strategy.checkpoint_io
        inner = io.inner if isinstance(io, CompletingCheckpointIO) else io
        inner = AtomicCheckpointIO() if type(inner) is TorchCheckpointIO else inner
        trainer.strategy.checkpoint_io = CompletingCheckpointIO(
            inner, lambda checkpoint, path: self._complete(trainer, pl_module, checkpoint, path)
        )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over the random states."""
        saved = checkpoint.get(KEY)
        if saved is None or trainer.state.fn != TrainerFn.FITTING:
            return
        self._resumed = RandomStates.from_plain(saved["random"][trainer.global_rank]), saved["between_epochs"]
        held = {key: checkpoint[key] for key in ("loops", data_name(trainer, checkpoint)) if key in checkpoint}
        self._position = {"held": held, "saved": {key: saved[key] for key in _POSITION}}
        self._optimizers, self._changed = saved.get("optimizers"), ChangedRates(checkpoint, pl_module)
        if not saved["whole_step"]:
            rank_zero_warn(
                "The checkpoint was saved by an interrupt while the optimizer changed the weights: the run goes on, "
                "but not exactly as it would have. An earlier checkpoint is exact"
            )
        self._restore(before_data=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the optimizers before their states are restored. And between two epochs, the next one's loader draws
        first: its shuffling, the seeds of its workers."""
        if self._optimizers is not None:
            check_same_optimizers(self._optimizers, trainer)
        self._restore(before_data=True)
        self._before_data = RandomStates.now()

    def on_base_ready(self, trainer: Trainer, pl_module: LightningModule, masks: MaskSet) -> None:
        """Note how random numbers stand before the loader of the training data draws."""
        self._before_data = RandomStates.now()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same where Lightning, after the rest of an epoch that had none, asks the loader once more."""
        loop = trainer.fit_loop
        if trainer.current_epoch > 0 and not loop.is_resuming and not loop.epoch_loop.restarting:
            self._restore(before_data=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how random numbers stand, and have the rates be those that were asked for."""
        self._after_batch = RandomStates.now()
        if self._changed is not None:
            self._changed.apply(trainer)
            self._changed = None
        if trainer.global_step == 0 and self._position is None and not _splits_weights(trainer):
            self._starting = True
            trainer.save_checkpoint(self.folder / CHECKPOINTS_FOLDER / STAGE_FILE)
            self._starting = False

    def on_closing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the training has come to, before anything is made of it."""
        if not _splits_weights(trainer):
            trainer.save_checkpoint(self.folder / CHECKPOINTS_FOLDER / STAGE_FILE)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Within an epoch, its loader had drawn already when the run was interrupted."""
        self._restore(before_data=False)
        self._resumed = self._position = None
        if self._step is None or batch_idx % trainer.accumulate_grad_batches == 0:
            self._step = _Step(trainer.global_step, batches_of(trainer).current.ready - 1, RandomStates.now())
        self._updating = False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """From here on to the end of the step, weights are neither old nor new."""
        self._updating = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Note how random numbers stand: what validates or evaluates may draw, too."""
        self._after_batch = RandomStates.now()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the random numbers of the training: a resumed run may validate once less."""
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING and self._after_batch is not None:
            self._after_batch.set()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how random numbers stand."""
        self._after_batch = RandomStates.now()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add position and random states, and leave out what the base has."""
        if _splits_weights(trainer):
            return
        checkpoint[KEY] = {
            "format": FORMAT,
            "world_size": trainer.world_size,
            **self._where(trainer, pl_module, checkpoint),
            "optimizers": optimizer_kinds(trainer),
            "data": data_name(trainer, checkpoint),
            "base": None,
        }
        if trainer.is_global_zero:
            checkpoint[KEY]["base"] = self._leave_out(trainer, pl_module, checkpoint)

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

    def _where(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Have a checkpoint stand at a point from which Lightning resumes; the random states there, and what it is."""
        if self._position is not None:  # no batch has been done since it was read
            checkpoint |= self._position["held"]
            return self._position["saved"]
        if self._starting:
            at_the_start(checkpoint)
            random = (self._before_data or RandomStates.now()).plain()
            return {"random": _of_all_ranks(trainer, random), "between_epochs": True, "whole_step": True}
        random, whole_step = self._at_step_end(trainer, module, checkpoint)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done, total = progress["current"]["processed"], trainer.num_training_batches
        ended = done == batches_of(trainer).current.ready and (progress["is_last_batch"] or done == total)
        close_epoch(checkpoint, ended, endless=total == math.inf)
        everywhere = _of_all_ranks(trainer, random.plain())
        return {"random": everywhere, "between_epochs": ended, "whole_step": whole_step}

    def _at_step_end(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> tuple[RandomStates, bool]:
        """Move the position in the checkpoint to the end of an optimizer step; the random states there, and whether
        the weights are those of that moment."""
        now, step = batches_of(trainer).current, self._step
        within = now.ready > now.processed
        if step is None or not (within or now.processed > now.completed or now.processed > step.batch):
            return self._after_batch or RandomStates.now(), True
        stepped = trainer.global_step > step.number
        if not stepped and (within or module.automatic_optimization):
            movable = move(trainer, checkpoint, step.batch)
            return step.random, movable and not (within and self._updating)
        if within:
            return RandomStates.now(), move(trainer, checkpoint, now.ready)
        in_hook = now.processed > now.completed  # of this batch's end: this callback's own may be yet to come
        return RandomStates.now() if in_hook or self._after_batch is None else self._after_batch, True

    def _restore(self, before_data: bool) -> None:
        if self._resumed is not None and self._resumed[1] == before_data:
            self._resumed[0].set()

    def _complete(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any], path: str | Path
    ) -> None:
        saved = checkpoint.get(KEY)
        if saved is None:
            return
        check_format(saved, path)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            check_same_run(checkpoint, saved, trainer, path)
        check_same_recipe(checkpoint, module, path, training=fitting)
        if saved["base"] is None:
            return
        path = Path(path).absolute()
        # A copy of a run folder goes by what is in it, and never by what is in the one that it was copied from.
        home = next((folder for folder in (path.parent.parent, path.parent) if holds_run(folder)), None)
        places = [self.folder, Path(saved["base"]["folder"])] if home is None else [home]
        found = complete(checkpoint, saved["base"], path, places)
        if fitting and found != self.folder.absolute():
            rank_zero_info(
                f"The checkpoint {path} is of the run in {found}, which is left as it is: from here on the run is "
                f"written to {self.folder.absolute()}, with a base of its own."
            )


def _splits_weights(trainer: Trainer) -> bool:
    return isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy)


def _of_all_ranks(trainer: Trainer, mine: dict[str, Any]) -> list[dict[str, Any]]:
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return [mine]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, mine)
    return states
