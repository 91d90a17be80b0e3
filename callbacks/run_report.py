"""`RunReport`: evaluates the dense, pruned and recovered model, exports it, and reports what it all cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from sparsefit.callbacks.course import Course
from sparsefit.callbacks.hooks import tell
from sparsefit.callbacks.ledgers import ledger_of, masks_of
from sparsefit.callbacks.lightning_loops import Limits, end_now, limits_of, limits_reached, reopen
from sparsefit.callbacks.quantization import QuantizedBase
from sparsefit.callbacks.run_account import beginning, standing
from sparsefit.callbacks.run_folder import RunFolder
from sparsefit.callbacks.run_measuring import RunMeasuring
from sparsefit.callbacks.task_figures import TaskFigures
from sparsefit.callbacks.validating import logged_as
from sparsefit.errors import MergeError, RunFolderError
from sparsefit.files import file_sum, write_text
from sparsefit.pruning import MaskSet, PruningResult
from sparsefit.recovery.adapter_files import form_of
from sparsefit.recovery.export import exported_masks, trains_base
from sparsefit.recovery.inspection import inspect_folder
from sparsefit.recovery.merge import merged_in_place
from sparsefit.recovery.quantize import in_floats
from sparsefit.recovery.run_files import CLAIMED, CLOSING, FAILED, FINISHED, PRUNED, TRAINING
from sparsefit.reporting.console import console, summary
from sparsefit.reporting.html import render_html
from sparsefit.reporting.report import read_json, write_json
from sparsefit.settings import named_settings


@named_settings
class RunReport(RunMeasuring):
    """Fills a run folder: sparse base, adapter, merged model, masks, `report.json` and `report.html`.

    The module is evaluated dense, pruned, reconstructed, recovered and merged if there are test data and it has a
    method `evaluate(batches, progress)` that returns figures by name and calls `progress` after each batch; its
    attribute `metrics` says which way each figure is better ("lower" or "higher"). A module without `evaluate` is
    measured by the Trainer's own validation: by what it logs as `val_...`, all of it or what `metrics` names. The
    sparse base is written once, as soon as it is ready, so a run that breaks off later leaves it; what was trained
    until then is written too. The folder `model` holds the recovered model, exactly sparse, where the adapters merge
    without a loss or there are none.

    What recovery is worth shows beside a control, the dense model trained by the same recipe: see `DenseControl`, which
    adds it to the report of a run that has ended.

    The folder says in `state.json` how far its run is: claimed, pruned, training, closing, finished or failed. A run
    goes on from each of these, whatever ended its process, and makes up for what its end is to make (export, figures,
    report). One process at a time has the folder.

    ```python
    report = RunReport("runs/mine", resume=True)
    Trainer(callbacks=[WandaPruning(0.5), report, SparseCheckpoints("runs/mine")]).fit(
        MyModule(), MyData(), ckpt_path=report.checkpoint
    )
    ```

    Args:
        folder: The run folder: new or empty, unless a run is resumed.
        name: What the report is titled with; by default the folder's name.
        tasks: Zero-shot tasks of lm-eval that a language model is measured by, too: dense, pruned, reconstructed and
            recovered. Their time is kept from the budget like that of other evaluations.
        tasks_folder: A folder with files of their items, for use without the hub.
        tasks_limit: The first so many items of each task; None takes all.
        tasks_batch_size: Requests of the tasks that are sent through the model at once.
        resume: Go on with the run that lies in the folder, if one does; give the fit its `checkpoint`.

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
    ) -> None:
        self.folder = RunFolder(folder)
        super().__init__(TaskFigures(tasks, tasks_folder, tasks_limit, tasks_batch_size))
        self.name = name or self.folder.path.name
        self.course = Course()
        """What the training is repeated by."""

        self._history: list[dict[str, float]] = []
        self._configuration: str | None = None
        self.resume = resume
        self._claimed = False
        self._begun = False  # from here on the run writes to the folder
        self._closing = False
        self._has_results = False  # which an earlier end of the run has made
        self._limits: Limits | None = None  # by which training ended
        self._at_end = False  # of a run that is resumed: no step is left to take
        self._left: str | None = None  # and why its end is to be made up for
        self._lifted: Limits | None = None

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint in the run folder from which its run goes on; None where it has none, and begins."""
        return self.folder.newest_checkpoint()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin the report."""
        if stage != "fit":
            return
        ledger_of(trainer)
        self._claimed = self._begun = self._closing = self._has_results = self._at_end = False
        self._limits = self._left = self._lifted = None
        self.course = Course()
        self.folder.image_processor = getattr(trainer.datamodule, "image_processor", None)
        self.report = beginning(self.name, self.folder.path, pl_module)
        self.tasks.load(pl_module)

    def take_configuration(self, text: str) -> None:
        """Keep the YAML of the run in the report, and beside it as a file that a new run can start from."""
        self._configuration = text

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the folder before anything is spent."""
        self.course.note_random("fit")
        # Where a strategy restores late, it shows only when training starts whether a run is resumed.
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._claim(trainer, pl_module)
        if self._left is not None:
            self._lifted = reopen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, with a strategy that restores late; and a base for a run that goes on in another folder."""
        self._begin(trainer, pl_module)
        if self._at_end:
            end_now(trainer, self._lifted)
        else:
            self._mark(trainer, TRAINING)
            if trainer.ckpt_path is not None and not self._has_results:
                self._write(trainer, pl_module, "running")
        if self._left is not None:
            rank_zero_info(
                f"The run in {self.folder.path} had taken all of its steps, and its end is to be made up for "
                f"({self._left}): it is exported, evaluated and reported now."
            )
        self.course.note_random("training")
        masks = masks_of(trainer)
        if masks is not None and not self.folder.masks.exists() and not trains_base(pl_module):
            self._export_base(trainer, pl_module, masks)

    def on_pruning_check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, where `WandaPruning` has its turn before."""
        self._claim(trainer, pl_module)
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
        self.course.note_rates(trainer.global_step, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note loss, learning rate and GPU-hours, as often as the trainer logs."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        step = trainer.global_step
        new = not self._history or self._history[-1]["step"] < step
        if new and isinstance(loss, torch.Tensor) and (step == 1 or step % trainer.log_every_n_steps == 0):
            self._history.append(
                {
                    "step": step,
                    "gpu_hours": ledger_of(trainer).hours,
                    "loss": float(loss.detach()) * trainer.accumulate_grad_batches,
                    "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
                }
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what a validation logged as `val_` and the name of a figure."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        for metric in self.report.get("metrics", {}):
            if (value := trainer.callback_metrics.get(logged_as(metric))) is not None:
                self._note(trainer, "validation", metric, float(value))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export what was trained, evaluate it apart and merged, and write the report."""
        if self._at_end and self._left is None:
            return
        if trainer.global_step > 0:
            self._limits = limits_of(trainer)
            tell(trainer, "on_closing", pl_module)
            self._closing = True
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
            if self._at_end and self._left is None:
                rank_zero_info(f"The run in {self.folder.path} is finished: nothing was left to do.")
        self.course.steps, self.course.masks = trainer.global_step, masks_of(trainer)
        if trainer.is_global_zero and self.report.get("status"):
            console.print(summary(self.report))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let others have the folder."""
        self.folder.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what was trained so far, and report how far the run came. What an earlier end of it has made stays."""
        try:
            if self._begun:  # else the folder is not ours to write to, or what is in it is not yet restored
                self._break_off(trainer, pl_module, exception)
        finally:
            self.folder.release()

    def _break_off(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        status = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
        self.report["error"] = f"{type(exception).__name__}: {exception}"
        steps = [
            lambda: self._write(trainer, module, status),
            lambda: self._mark(trainer, FAILED, self.report["error"]),
        ]
        if trainer.global_step > 0 and not self._closing and not self._has_results:
            steps.insert(0, lambda: self._export_trained(trainer, module, merged=False))
        for step in steps:
            try:
                step()
            except Exception as error:  # whatever it is, the checkpoint that follows must be written
                rank_zero_warn(f"What was trained could not be exported or reported: {error!r}")

    def write(self) -> None:
        """Write the report as it is to the run folder."""
        write_text(render_html(self.report), self.folder.html)
        write_json(self.report | {"page": file_sum(self.folder.html)}, self.folder.json, seal=True)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """See whether the run has a step left to take."""
        if trainer.state.fn == TrainerFn.FITTING:
            saved = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("limits")
            self._at_end = limits_reached(trainer, checkpoint) or (saved is not None and saved == limits_of(trainer))

    def state_dict(self) -> dict[str, Any]:
        """The figures so far, for a run that is resumed."""
        figures = {metric: self.report.get(metric) for metric in self.report.get("metrics", {})}
        lasting = ("timeline", "reconstruction", "metrics", "tasks")
        kept = {key: self.report[key] for key in lasting if key in self.report}
        state = {"figures": figures, "history": self._history, "kept": kept, "id": self.report.get("id")}
        state["limits"] = self._limits
        return state | {"course": self.course.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the figures of the run before."""
        self.report.update({metric: values for metric, values in state_dict["figures"].items() if values})
        self.report.update(state_dict.get("kept", {}))
        self.report["id"] = state_dict.get("id")
        self._history = list(state_dict["history"])
        if "course" in state_dict:
            self.course.load_state_dict(state_dict["course"])

    def _claim(self, trainer: Trainer, module: LightningModule) -> None:
        if self._claimed:
            return
        resuming = trainer.ckpt_path is not None
        if trainer.is_global_zero:
            self.folder.claim(module, resuming=resuming or self.resume)
            if not resuming and (newest := self.checkpoint) is not None:
                raise RunFolderError(
                    f"the run in {self.folder.path} has a checkpoint, {newest}: give it to the fit "
                    "(trainer.fit(..., ckpt_path=report.checkpoint)), or take a new folder"
                )
            if resuming and (masks := masks_of(trainer)) is not None:
                self.folder.check_same_run(self.report["id"], exported_masks(module, masks))
            self.report["id"] = self.report["id"] or self.folder.run_id() or uuid4().hex
            state = self.folder.state()
            self._has_results = state is not None and state.results > 0
        self._claimed = True
        if resuming and self._at_end:
            self._left = trainer.strategy.broadcast(self.folder.left_to_do() if trainer.is_global_zero else None)
        if not resuming:
            self._begin(trainer, module)
            self._mark(trainer, CLAIMED)

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Claim the folder, and write to it what the run goes by; a resumed run has restored all by then."""
        self._claim(trainer, module)
        if self._begun:
            return
        if trainer.is_global_zero and self._configuration is not None:
            self.folder.write_configuration(self._configuration)
        self.report["configuration"] = self._configuration
        self._begun = True

    def _mark(self, trainer: Trainer, state: str, error: str | None = None) -> None:
        if trainer.is_global_zero:
            self.folder.write_state(state, self.report.get("id"), trainer.global_step, error)

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        self._write(trainer, module, "finished")
        self._mark(trainer, FINISHED)

    def _export_base(self, trainer: Trainer, module: LightningModule, masks: MaskSet) -> None:
        if trainer.is_global_zero:
            with self._charged(trainer, "export"):
                self.folder.write_base(module, masks)
                self._count(self.folder.path)

    def _export_trained(self, trainer: Trainer, module: LightningModule, merged: bool = True) -> None:
        masks = masks_of(trainer)
        if not trainer.is_global_zero or masks is None:
            return
        with self._charged(trainer, "export"):
            quantization = next((c.account for c in trainer.callbacks if isinstance(c, QuantizedBase)), None)
            written = self.folder.write_trained(module, masks, {"quantization": quantization or None})
            if not merged and written == self.folder.adapter:
                self.folder.drop_merged()  # of an end that was never made whole
            if written == self.folder.model or "sparsity" not in self.report:  # a resumed run has not counted yet
                self._count(self.folder.path if written == self.folder.adapter else written)

    def _count(self, folder: Path) -> None:
        inspection = inspect_folder(folder)
        files = ", ".join(str(file.relative_to(self.folder.path)) for file in inspection.files)
        self.report["sparsity"] = inspection.account() | {"counted_on": files}

    def _merge(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the model with its adapters merged, if that loses nothing, and evaluate it."""
        form, masks = form_of(module), masks_of(trainer)
        if form is None or masks is None:
            return
        self.report["merge"] = {"form": form, "lossless": False}
        try:
            with in_floats(module), merged_in_place(module, masks):
                if trainer.is_global_zero:
                    with self._charged(trainer, "export"):
                        self.folder.write_merged(module, masks)
                        self._count(self.folder.model)
                self._evaluate(trainer, module, "merged")
        except MergeError as reason:
            self.report["merge"]["reason"] = str(reason)
            if trainer.is_global_zero:
                self.folder.drop_merged()
            return
        counted = self.report.get("sparsity", {}).get("total")
        self.report["merge"] |= {"lossless": True, "folder": self.folder.model.name, "sparsity": counted}

    def _write(self, trainer: Trainer, module: LightningModule, status: str) -> None:
        self.report |= {"status": status} | standing(trainer, module, self.report, self._history)
        if trainer.is_global_zero:
            self.write()
