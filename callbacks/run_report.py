"""`RunReport`: evaluates the dense, pruned and recovered model, exports it, and reports its quality and cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from sparsefit.callbacks.hooks import call_hook
from sparsefit.callbacks.lightning_loops import Limits, end_now, limits_of, limits_reached, reopen
from sparsefit.callbacks.loggers import LoggerName, logger_names
from sparsefit.callbacks.report_entries import beginning, named_model, standing
from sparsefit.callbacks.run_folder import RunFolder
from sparsefit.callbacks.run_outputs import RunOutputs
from sparsefit.callbacks.trainer_lookup import ledger_of, masks_of
from sparsefit.callbacks.training_record import TrainingRecord
from sparsefit.callbacks.zero_shot_tasks import ZeroShotTasks
from sparsefit.pruning import MaskSet, PruningResult
from sparsefit.recovery.export import exported_masks, trains_base
from sparsefit.recovery.gather_shards import has_shards
from sparsefit.recovery.run_files import CLAIMED, CLOSING, FAILED, FINISHED, PRUNED, TRAINING
from sparsefit.reporting.console import console, summary
from sparsefit.reporting.report import read_json
from sparsefit.settings import named_settings


@dataclass
class _Fit:
    """The progress of a run in this fit."""

    claimed: bool = False  # the folder is checked and locked
    begun: bool = False  # the run writes to the folder from now on
    closing: bool = False  # training has ended; the final results are being written
    has_results: bool = False  # the run has finished before and left its results
    limits: Limits | None = None  # the limits at which training ended
    at_end: bool = False  # the run is resumed and has no step left
    left: str | None = None  # why the results of such a run must be made again
    lifted: Limits | None = None  # the limits of such a run, lifted until training begins


@named_settings
class RunReport(RunOutputs):
    """Fills a run folder: sparse base, adapter, merged model, masks, report (JSON and HTML) and model card (README.md).

    The module is evaluated dense, pruned, reconstructed, recovered and merged, if there are test data and it has a
    method `evaluate(batches, progress)` that returns metrics by name and calls `progress` after each batch. Its
    attribute `metrics` says whether a "lower" or a "higher" value of each metric is better. A module without `evaluate`
    is evaluated by the Trainer's own validation: all metrics logged as `val_...`, or those in `metrics`. The sparse
    base is written once, as soon as it is ready. If a run is interrupted, the base and the weights trained so far are
    saved. The folder `model` holds the recovered, exactly sparse model if adapters merge without loss or there are
    none.

    To judge recovery, compare it with a control, the dense model trained by the same recipe: see `DenseControl`.

    `state.json` in the folder holds the state of the run. A killed run can be resumed at any point, including its end
    (export, evaluation, report). Only one process at a time can use the folder.

    ```python
    report = RunReport("runs/mine", resume=True)
    trainer = Trainer(callbacks=[WandaPruning(0.5), report, SparseCheckpoints("runs/mine")])
    trainer.fit(MyModule(), MyData(), ckpt_path=report.checkpoint)
    ```

    Args:
        folder: The run folder: new or empty, unless a run is resumed.
        name: The title of the report; by default the folder's name.
        tasks: Zero-shot tasks of lm-eval to evaluate a language model on.
        tasks_folder: A folder with files of their items, for use without the hub.
        tasks_limit: Number of items per task, from its first; None takes all.
        tasks_batch_size: Requests of the tasks that are sent through the model at once.
        resume: Continue the run in the folder, if there is one; pass `checkpoint` to the fit.
        logger: Loggers to add to the Trainer's own, each with a folder in `logs`: csv, tensorboard, wandb.

    Raises:
        RunFolderError: at the start of the fit, if the folder cannot be used.
    """

    def __init__(
        self,
        folder: str = "runs/sparsefit",
        name: str | None = None,
        tasks: list[str] | None = None,
        tasks_folder: str | None = None,
        tasks_limit: int | None = None,
        tasks_batch_size: int = 8,
        resume: bool = False,
        logger: LoggerName | list[LoggerName] | None = None,
    ) -> None:
        figures = ZeroShotTasks(tasks, tasks_folder, tasks_limit, tasks_batch_size)
        super().__init__(RunFolder(folder), figures, name, logger_names(logger))
        self.training_record = TrainingRecord()  # what `DenseControl` needs to repeat the training
        self.resume = resume
        self._configuration: str | None = None
        self._fit = _Fit()

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint in the run folder to resume from; None if there is none, so that the run starts."""
        return self.folder.newest_checkpoint()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin the report."""
        if stage != "fit":
            return
        ledger_of(trainer)
        self._add_loggers(trainer)
        self._fit, self.training_record = _Fit(), TrainingRecord()
        self.folder.image_processor = getattr(trainer.datamodule, "image_processor", None)
        self.report = beginning(self.name, self.folder.path, pl_module)
        self.tasks.load(pl_module)

    def take_configuration(self, text: str) -> None:
        """Keep the YAML of the run, for the report and for a file from which a new run can start."""
        self._configuration = text

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check and lock the folder before the run spends time."""
        self.training_record.note_random("fit")
        # If a strategy restores late, only on_train_start shows whether the run is resumed.
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._claim(trainer, pl_module)
        if self._fit.left is not None:
            rank_zero_info(
                f"The run in {self.folder.path} had taken all of its steps, but its results are incomplete "
                f"({self._fit.left}): it is exported, evaluated and reported now."
            )
            self._fit.lifted = reopen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the folder with strategies that restore late, and write a base if a run resumes in another folder."""
        self._begin(trainer, pl_module)
        if self._fit.at_end:
            end_now(trainer, self._fit.lifted)
        else:
            self._mark(trainer, TRAINING)
            if trainer.ckpt_path is not None and not self._fit.has_results:
                self._write(trainer, pl_module, "running")
        self.training_record.note_random("training")
        masks = masks_of(trainer)
        there = trainer.strategy.broadcast(self.folder.masks.exists())  # rank 0 decides, as it writes them
        if masks is not None and not there and not trains_base(pl_module):
            self._export_base(trainer, pl_module, masks)

    def on_pruning_check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check and lock the folder, if `WandaPruning` comes first in the list of callbacks."""
        self._begin(trainer, pl_module)

    def on_pruning_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the dense model."""
        self._evaluate(trainer, pl_module, "dense")
        self._reserve(trainer, pl_module, ahead=1 + self._reconstructs(trainer))

    def on_pruning_end(self, trainer: Trainer, pl_module: LightningModule, result: PruningResult) -> None:
        """Evaluate the pruned model."""
        self._evaluate(trainer, pl_module, "pruned")
        self._reserve(trainer, pl_module, ahead=self._reconstructs(trainer))

    def on_base_ready(self, trainer: Trainer, pl_module: LightningModule, masks: MaskSet) -> None:
        """Write the sparse base and its masks, and evaluate it if it was reconstructed."""
        self._export_base(trainer, pl_module, masks)
        if self._reconstructs(trainer):
            self._evaluate(trainer, pl_module, "reconstructed")
        self._reserve(trainer, pl_module)
        self._write(trainer, pl_module, "running")
        self._mark(trainer, PRUNED)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Record the learning rates of the step."""
        self.training_record.note_rates(trainer.global_step, optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the trained weights, evaluate the model with its adapter and merged, and write the report."""
        if self._fit.at_end and self._fit.left is None:
            return
        if trainer.global_step > 0:
            self._fit.limits = limits_of(trainer)
            call_hook(trainer, "on_closing", pl_module)
            self._fit.closing = True
            self._mark(trainer, CLOSING)
            self._export_trained(trainer, pl_module)
            self._evaluate(trainer, pl_module, "recovered")
            self._merge(trainer, pl_module)
        self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the report's summary."""
        if self.report.get("status") == "running":  # nothing was trained
            self._finish(trainer, pl_module)
        elif not self.report.get("status") and self.folder.json.exists():  # resumed with nothing left to do
            self.report = read_json(self.folder.json)
            if self._fit.at_end and self._fit.left is None:
                rank_zero_info(f"The run in {self.folder.path} is finished: nothing was left to do.")
        self.training_record.steps, self.training_record.masks = trainer.global_step, masks_of(trainer)
        if trainer.is_global_zero and self.report.get("status"):
            console.print(summary(self.report))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the lock on the folder."""
        self.folder.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the weights trained so far and write the report. Results of an earlier end of the run are kept."""
        try:
            if self._fit.begun:  # otherwise the folder is not locked, or its state is not restored yet
                self._break_off(trainer, pl_module, exception)
        finally:
            self.folder.release()

    def _break_off(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        status = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
        self.report["error"] = f"{type(exception).__name__}: {exception}"
        # Shards cannot be gathered here, as other ranks may still be training.
        whole = not has_shards(module)
        if whole and trainer.global_step > 0 and not self._fit.closing and not self._fit.has_results:
            with _errors_as_warnings():
                self._export_trained(trainer, module, merged=False)
        with _errors_as_warnings():
            self._write(trainer, module, status)
        with _errors_as_warnings():
            self._mark(trainer, FAILED, self.report["error"])

    def write(self) -> None:
        """Write the current report to the run folder."""
        self.folder.write_report(self.report)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find out whether the run has a step left."""
        if trainer.state.fn == TrainerFn.FITTING:
            saved = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("limits")
            ended = saved is not None and saved == limits_of(trainer)
            self._fit.at_end = ended or limits_reached(trainer, checkpoint)
            if self._fit.at_end and trainer.strategy.restore_checkpoint_after_setup:  # `on_fit_start` ran before
                self._fit.lifted = reopen(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The metrics so far, for a resumed run."""
        figures = {metric: self.report.get(metric) for metric in self.report.get("metrics", {})}
        lasting = ("timeline", "reconstruction", "metrics", "tasks")
        kept = {key: self.report[key] for key in lasting if key in self.report}
        state = {"figures": figures, "history": self.history, "kept": kept, "id": self.report.get("id")}
        return state | {"limits": self._fit.limits, "course": self.training_record.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics of the run."""
        self.report.update({metric: values for metric, values in state_dict["figures"].items() if values})
        self.report.update(state_dict.get("kept", {}))
        self.report["id"] = state_dict.get("id")
        self.history = list(state_dict["history"])
        if "course" in state_dict:
            self.training_record.load_state_dict(state_dict["course"])

    def _claim(self, trainer: Trainer, module: LightningModule) -> None:
        if self._fit.claimed:
            return
        resuming = trainer.ckpt_path is not None
        if trainer.is_global_zero:
            masks = masks_of(trainer) if resuming else None
            there = None if masks is None else exported_masks(module, masks)
            self.report["id"] = self.folder.claim(module, self.report["id"], there, resuming, self.resume)
            self._fit.has_results = self.folder.has_results()
        self._fit.claimed = True
        if resuming and self._fit.at_end:
            self._fit.left = trainer.strategy.broadcast(self.folder.left_to_do() if trainer.is_global_zero else None)
        if not resuming:
            self._begin(trainer, module)
            self._mark(trainer, CLAIMED)

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Claim the folder and write the recipe to it; a resumed run has restored its state before this is called."""
        self._claim(trainer, module)
        if self._fit.begun:
            return
        if trainer.is_global_zero and self._configuration is not None:
            self.folder.write_configuration(self._configuration)
        self.report |= {"configuration": self._configuration, "model": named_model(self._configuration)}
        self._fit.begun = True

    def _mark(self, trainer: Trainer, state: str, error: str | None = None) -> None:
        if trainer.is_global_zero:
            self.folder.write_state(state, self.report.get("id"), trainer.global_step, error)

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        self._write(trainer, module, "finished")
        self._mark(trainer, FINISHED)

    def _write(self, trainer: Trainer, module: LightningModule, status: str) -> None:
        self.report |= {"status": status} | standing(trainer, module, self.report, self.history)
        if trainer.is_global_zero:
            self.write()


@contextmanager
def _errors_as_warnings() -> Iterator[None]:
    """Turn errors into warnings, as a checkpoint must still be written afterwards."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"What was trained could not be exported or reported: {error!r}")
