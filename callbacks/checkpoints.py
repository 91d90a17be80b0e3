"""`SparseCheckpoints`: checkpoints that hold only what changes, and from which a run goes on to the bit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from sparsefit.callbacks.checkpoint_io import CompletingCheckpointIO
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
from sparsefit.recovery.same_recipe import check_same_recipe
from sparsefit.recovery.sparse_base import InBase, compare, complete, leave_out
from sparsefit.settings import named_settings

KEY = "sparsefit"
"""Under which a checkpoint has what this callback adds."""


@dataclass(frozen=True)
class _Step:
    """The start of an optimizer step: where its first batch stands, and how random numbers stood then."""

    number: int
    batch: int  # of its epoch
    random: RandomStates


@named_settings
class SparseCheckpoints(Callback):
    """Leaves out of checkpoints what lies in the run folder already, and resumes from them exactly.

    `RunReport` writes the sparse base and its masks to the run folder once. A checkpoint then holds the weights that
    train, the optimizer, the state of the other callbacks, the masks' digest, the position in the data and all random
    states. Whatever is not equal, bit by bit, to what lies in the base stays in the checkpoint; without a base, it is
    whole. As it is read, it is filled up from the base, which is looked for in this run's folder, where the checkpoint
    lies and where it was.

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
        self._optimizers: list[str] | None = None  # of a checkpoint
        self._changed: ChangedRates | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have checkpoints filled up as they are read, before anything is restored."""
        self._step = self._after_batch = self._resumed = self._optimizers = self._changed = None
        self._updating = False
        if _splits_weights(trainer):
            return
        io = trainer.strategy.checkpoint_io
        inner = io.inner if isinstance(io, CompletingCheckpointIO) else io
        trainer.strategy.checkpoint_io = CompletingCheckpointIO(
            inner, lambda checkpoint, path: self._complete(trainer, pl_module, checkpoint, path)
        )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over the random states."""
        saved = checkpoint.get(KEY)
        if saved is None or trainer.state.fn != TrainerFn.FITTING:
            return
        self._resumed = RandomStates.from_plain(saved["random"][trainer.global_rank]), saved["between_epochs"]
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

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Within an epoch, its loader had drawn already when the run was interrupted."""
        self._restore(before_data=False)
        self._resumed = None
        if self._step is None or batch_idx % trainer.accumulate_grad_batches == 0:
            self._step = _Step(trainer.global_step, _batches(trainer).current.ready - 1, RandomStates.now())
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
        random, whole_step = self._position(trainer, pl_module, checkpoint)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done, total = progress["current"]["processed"], trainer.num_training_batches
        ended = done == _batches(trainer).current.ready and (progress["is_last_batch"] or done == total)
        _close_epoch(checkpoint, ended, endless=total == math.inf)
        checkpoint[KEY] = {
            "format": FORMAT,
            "world_size": trainer.world_size,
            "random": _of_all_ranks(trainer, random.plain()),
            "between_epochs": ended,
            "whole_step": whole_step,
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

    def _position(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> tuple[RandomStates, bool]:
        """Move the position in the checkpoint to the end of an optimizer step; the random states there, and whether
        the weights are those of that moment."""
        now, step = _batches(trainer).current, self._step
        within = now.ready > now.processed
        if step is None or not (within or now.processed > now.completed or now.processed > step.batch):
            return self._after_batch or RandomStates.now(), True
        stepped = trainer.global_step > step.number
        if not stepped and (within or module.automatic_optimization):
            movable = _move(trainer, checkpoint, step.batch)
            return step.random, movable and not (within and self._updating)
        if within:
            return RandomStates.now(), _move(trainer, checkpoint, now.ready)
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
        found = complete(checkpoint, saved["base"], path, [self.folder, path.parent.parent, path.parent])
        if fitting and found != self.folder.absolute():
            rank_zero_info(
                f"The checkpoint {path} is of the run in {found}, which is left as it is: from here on the run is "
                f"written to {self.folder.absolute()}, with a base of its own."
            )


def _splits_weights(trainer: Trainer) -> bool:
    return isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy)


def _batches(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_loop.batch_progress


def _move(trainer: Trainer, checkpoint: dict[str, Any], batches: int) -> bool:
    """Have a checkpoint stand where so many batches of the epoch are done; whether its data can be moved, too."""
    data, loops = trainer.datamodule, checkpoint["loops"]["fit_loop"]
    data_state = type(data).__qualname__
    if "combined_loader" in loops["state_dict"] or (data_state in checkpoint and not hasattr(data, "state_after")):
        return False
    if data_state in checkpoint:
        checkpoint[data_state] = data.state_after(batches)
    progress = loops["epoch_loop.batch_progress"]
    before = progress["total"]["processed"] - progress["current"]["processed"]
    for part, done in (("current", batches), ("total", before + batches)):
        progress[part] = {name: done for name in progress[part]}
    progress["is_last_batch"] &= batches >= _batches(trainer).current.ready
    return True


def _close_epoch(checkpoint: dict[str, Any], ended: bool, endless: bool) -> None:
    """Have a checkpoint between two epochs stand at the end of the first one, wherever it was saved. Lightning would
    take the second for done where that was about to begin, and count its batches on from those of the first one where
    that had just trained on its last batch (it knows the end of data that have a length). And have one that was saved
    after training had stopped within an epoch stand within it: Lightning counts it as completed."""
    loops = checkpoint["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    begun = epochs["current"]["started"]
    if epochs["current"]["ready"] > begun > 0:
        for part in ("current", "total"):
            done = epochs[part]["processed"]
            epochs[part] |= {"ready": done, "started": done, "completed": done - 1}
    elif ended and endless and epochs["current"]["processed"] < begun:
        for part in ("current", "total"):
            epochs[part] |= {"processed": epochs[part]["started"]}
            batches[part] |= {"completed": batches[part]["processed"]}
    elif not ended and batches["current"]["processed"] and epochs["current"]["completed"] == begun:
        for part in ("current", "total"):
            epochs[part]["completed"] -= 1


def _of_all_ranks(trainer: Trainer, mine: dict[str, Any]) -> list[dict[str, Any]]:
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return [mine]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, mine)
    return states
