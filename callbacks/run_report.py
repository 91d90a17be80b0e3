"""`RunReport`: evaluates the dense, pruned and recovered model, exports it, and reports what it all cost."""

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

from sparsefit.callbacks.hooks import tell
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
    """How far a run is in this fit."""

    claimed: bool = False  # the folder
    begun: bool = False  # from here on the run writes to the folder
    closing: bool = False  # training has ended, and what is written is its end
    has_results: bool = False  # which an earlier end of the run has made
    limits: Limits | None = None  # by which training ended
    at_end: bool = False  # of a run that is resumed: no step is left to take
    left: str | None = None  # why the end of such a run is to be made up for
    lifted: Limits | None = None  # of such a run, until training begins


@named_settings
class RunReport(RunOutputs):
    """Fills a run folder: sparse base, adapter, merged model, masks, report (JSON and HTML) and model card (README.md).

    The module is evaluated dense, pruned, reconstructed, recovered and merged if there are test data and it has a
    method `evaluate(batches, progress)` that returns figures by name and calls `progress` after each batch; its
    attribute `metrics` says which way each figure is better ("lower" or "higher"). A module without `evaluate` is
    measured by the Trainer's own validation: by what it logs as `val_...`, all of it or what `metrics` names. The
    sparse base is written once, as soon as it is ready, so a run that breaks off later leaves it; what was trained
    until then is written too. The folder `model` holds the recovered model, exactly sparse, where the adapters merge
    without a loss or there are none.

    What recovery is worth shows beside a control, the dense model trained by the same recipe: see `DenseControl`.

    The folder says in `state.json` how far its run is. A run goes on from wherever its process was ended, and makes up
    for what its end is to make (export, figures, report). One process at a time has the folder.

    ```python
    report = RunReport("runs/mine", resume=True)
    trainer = Trainer(callbacks=[WandaPruning(0.5), report, SparseCheckpoints("runs/mine")])
    trainer.fit(MyModule(), MyData(), ckpt_path=report.checkpoint)
    ```

    Args:
        folder: The run folder: new or empty, unless a run is resumed.
        name: What the report is titled with; by default the folder's name.
        tasks: Zero-shot tasks of lm-eval that a language model is measured by, too.
        tasks_folder: A folder with files of their items, for use without the hub.
        tasks_limit: The first so many items of each task; None takes all.
        tasks_batch_size: Requests of the tasks that are sent through the model at once.
        resume: Go on with the run that lies in the folder, if one does; give the fit its `checkpoint`.
        logger: Loggers that the Trainer gets beside its own, each with a folder in `logs`: csv, tensorboard, wandb.

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
        self.training_record = TrainingRecord()  # what the training is repeated by
        self.resume = resume
        self._configuration: str | None = None
        self._fit = _Fit()

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint in the run folder from which its run goes on; None where it has none, and begins."""
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
        """Keep the YAML of the run in the report, and beside it as a file that a new run can start from."""
        self._configuration = text

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the folder before anything is spent."""
        self.training_record.note_random("fit")
        # Where a strategy restores late, it shows only when training starts whether a run is resumed.
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._claim(trainer, pl_module)
        if self._fit.left is not None:
            rank_zero_info(
                f"The run in {self.folder.path} had taken all of its steps, and its end is to be made up for "
                f"({self._fit.left}): it is exported, evaluated and reported now."
            )
            self._fit.lifted = reopen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, with a strategy that restores late; and a base for a run that goes on in another folder."""
        self._begin(trainer, pl_module)
        if self._fit.at_end:
            end_now(trainer, self._fit.lifted)
        else:
            self._mark(trainer, TRAINING)
            if trainer.ckpt_path is not None and not self._fit.has_results:
                self._write(trainer, pl_module, "running")
        self.training_record.note_random("training")
        masks = masks_of(trainer)
        there = trainer.strategy.broadcast(self.folder.masks.exists())  # as the first rank, which writes them, sees it
        if masks is not None and not there and not trains_base(pl_module):
            self._export_base(trainer, pl_module, masks)

    def on_pruning_check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, where `WandaPruning` has its turn before."""
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
        """Note the learning rates of the step."""
        self.training_record.note_rates(trainer.global_step, optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export what was trained, evaluate it apart and merged, and write the report."""
        if self._fit.at_end and self._fit.left is None:
            return
        if trainer.global_step > 0:
            self._fit.limits = limits_of(trainer)
            tell(trainer, "on_closing", pl_module)
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
        """Let others have the folder."""
        self.folder.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what was trained so far, and report how far the run came. What an earlier end of it has made stays."""
        try:
            if self._fit.begun:  # else the folder is not ours to write to, or what is in it is not yet restored
                self._break_off(trainer, pl_module, exception)
        finally:
            self.folder.release()

    def _break_off(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        status = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
        self.report["error"] = f"{type(exception).__name__}: {exception}"
        # The parts of weights that are split over devices cannot be asked for: other ranks may still be at work.
        whole = not has_shards(module)
        if whole and trainer.global_step > 0 and not self._fit.closing and not self._fit.has_results:
            with _told():
                self._export_trained(trainer, module, merged=False)
        with _told():
            self._write(trainer, module, status)
        with _told():
            self._mark(trainer, FAILED, self.report["error"])

    def write(self) -> None:
        """Write the report as it is to the run folder."""
        self.folder.write_report(self.report)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """See whether the run has a step left to take."""
        if trainer.state.fn == TrainerFn.FITTING:
            saved = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("limits")
            ended = saved is not None and saved == limits_of(trainer)
            self._fit.at_end = ended or limits_reached(trainer, checkpoint)
            if self._fit.at_end and trainer.strategy.restore_checkpoint_after_setup:  # so after `on_fit_start`
                self._fit.lifted = reopen(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The figures so far, for a run that is resumed."""
        figures = {metric: self.report.get(metric) for metric in self.report.get("metrics", {})}
        lasting = ("timeline", "reconstruction", "metrics", "tasks")
        kept = {key: self.report[key] for key in lasting if key in self.report}
        state = {"figures": figures, "history": self.history, "kept": kept, "id": self.report.get("id")}
        return state | {"limits": self._fit.limits, "course": self.training_record.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the figures of the run before."""
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
        """Claim the folder, and write to it what the run goes by; a resumed run has restored all by then."""
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
def _told() -> Iterator[None]:
    """Whatever goes wrong, the checkpoint that follows must be written."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"What was trained could not be exported or reported: {error!r}")
