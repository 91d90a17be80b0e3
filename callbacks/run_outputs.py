"""The outputs of a run, metrics and exported files, and the time they take: the base class of `RunReport`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden

from sparsefit.callbacks.hooks import PrunedRunCallback
from sparsefit.callbacks.loggers import loggers_of_run
from sparsefit.callbacks.quantization import QuantizedBase
from sparsefit.callbacks.reconstruction import BlockwiseReconstruction
from sparsefit.callbacks.report_entries import point
from sparsefit.callbacks.run_folder import LOGS, RunFolder
from sparsefit.callbacks.trainer_lookup import budget_of, ledger_of, masks_of
from sparsefit.callbacks.trainer_validation import better, logged_as, validated
from sparsefit.callbacks.zero_shot_tasks import LEDGER_STAGE, METRIC, ZeroShotTasks
from sparsefit.errors import MergeError
from sparsefit.pruning import MaskSet
from sparsefit.recovery.adapter_files import form_of
from sparsefit.recovery.adapters import LOSSLESS
from sparsefit.recovery.gather_shards import whole_on_first_rank
from sparsefit.recovery.inspection import inspect_folder
from sparsefit.recovery.merge import lossy_layers, merged_in_place
from sparsefit.recovery.quantize import in_floats
from sparsefit.reporting.console import stage_progress

_MARGIN = 1.25  # the last evaluation may be somewhat slower than the earlier ones that it is estimated from


class RunOutputs(PrunedRunCallback):
    """Evaluates and exports a module at the stages of a run, and makes the budget keep the time for that.

    Args:
        folder: The run folder, to which files are written.
        tasks: Zero-shot tasks to evaluate in addition.
        name: Name of the run; by default that of the folder.
        loggers: Names of the loggers to add to the trainer.
    """

    def __init__(self, folder: RunFolder, tasks: ZeroShotTasks, name: str | None, loggers: tuple[str, ...]) -> None:
        self.folder = folder
        self.tasks = tasks
        self.name = name or folder.path.name
        self.loggers = loggers
        self._made: list[Logger] = []
        self.report: dict[str, Any] = {}
        self.history: list[dict[str, float]] = []
        self._seconds = {"evaluation": 0.0, "export": 0.0, LEDGER_STAGE: 0.0}  # the longest so far

    def new_loggers(self) -> list[Logger]:
        """Create the loggers of the run for its Trainer; they write to the run folder."""
        self._made = loggers_of_run(self.loggers, self.folder.path / LOGS, self.name)
        return self._made

    def _add_loggers(self, trainer: Trainer) -> None:
        if not any(logger in trainer.loggers for logger in self._made):
            trainer.loggers = [*trainer.loggers, *self.new_loggers()]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record loss, learning rate and GPU-hours as often as the trainer logs."""
        step = trainer.global_step
        new = not self.history or self.history[-1]["step"] < step
        if new and (step == 1 or step % trainer.log_every_n_steps == 0):
            self.history += point(trainer, outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics that a validation logged as `val_...`."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        for metric in self.report.get("metrics", {}):
            if (value := trainer.callback_metrics.get(logged_as(metric))) is not None:
                self._note(trainer, "validation", metric, float(value))

    def measure(self, trainer: Trainer, module: LightningModule, stage: str) -> dict[str, float]:
        """Evaluate the module on the test data; a module without `evaluate` by what its validation logs."""
        evaluate = getattr(module, "evaluate", None)
        if not callable(evaluate):
            with self._charged(trainer, "evaluation"):
                figures = validated(trainer, getattr(module, "metrics", {}))
            self.report["metrics"] = {name: better(name) for name in figures} | self.report["metrics"]
            return figures
        source = trainer.datamodule if trainer.datamodule is not None else module
        loader = source.test_dataloader() if is_overridden("test_dataloader", source) else None
        if loader is None:
            return {}
        with self._charged(trainer, "evaluation"), trainer.precision_plugin.val_step_context():
            total = len(loader) if hasattr(loader, "__len__") else None
            with stage_progress(f"evaluating the {stage} model", total, visible=trainer.is_global_zero) as advance:
                return evaluate(loader, progress=lambda _: advance())

    def _evaluate(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        figures = self.measure(trainer, module, stage) | self._task_figures(trainer, module, stage)
        for metric, value in figures.items():
            self.report.setdefault(metric, {})[stage] = value
            self._note(trainer, stage, metric, value)
            for logger in trainer.loggers:
                logger.log_metrics({f"{metric}/{stage}": value}, step=trainer.global_step)

    def _task_figures(self, trainer: Trainer, module: LightningModule, stage: str) -> dict[str, float]:
        if not self.tasks.names or stage not in self.tasks.stages:
            return {}
        with self._charged(trainer, LEDGER_STAGE), trainer.precision_plugin.val_step_context():
            figures, results = self.tasks.measure(module, stage, visible=trainer.is_global_zero)
        self.report.setdefault("tasks", {})[stage] = results
        self.report["metrics"] |= {METRIC: "higher"}
        return figures

    def _note(self, trainer: Trainer, stage: str, metric: str, value: float) -> None:
        """Add a point to the curve of quality against GPU-hours."""
        point = {"stage": stage, "gpu_hours": ledger_of(trainer).hours, "step": trainer.global_step}
        self.report.setdefault("timeline", []).append(point | {"metric": metric, "value": value})

    def _reserve(self, trainer: Trainer, module: LightningModule, ahead: int = 0) -> None:
        """Make the budget keep the time of `ahead` more evaluations before training and of everything after it."""
        if (budget := budget_of(trainer)) is not None:
            form, masks = form_of(module), masks_of(trainer)  # masks are None before the pruning
            merges = form in LOSSLESS if masks is None else form is not None and not lossy_layers(module, masks)
            closing = (1 + merges) * (self._seconds["evaluation"] + self._seconds["export"])
            tasks = (ahead + 1) * self._seconds[LEDGER_STAGE]  # the evaluations ahead and that of the recovered model
            budget.keep(_MARGIN * (ahead * self._seconds["evaluation"] + tasks + closing), "closing")

    @staticmethod
    def _reconstructs(trainer: Trainer) -> bool:
        return any(isinstance(c, BlockwiseReconstruction) and c.settings.passes for c in trainer.callbacks)

    @contextmanager
    def _charged(self, trainer: Trainer, stage: str) -> Iterator[None]:
        start = time.monotonic()
        with ledger_of(trainer).stage(stage):
            yield
        self._seconds[stage] = max(self._seconds[stage], time.monotonic() - start)

    def _export_base(self, trainer: Trainer, module: LightningModule, masks: MaskSet) -> None:
        with self._charged(trainer, "export"), whole_on_first_rank(module):
            if trainer.is_global_zero:
                self.folder.write_base(module, masks)
                self._count(self.folder.path)

    def _export_trained(self, trainer: Trainer, module: LightningModule, merged: bool = True) -> None:
        masks = masks_of(trainer)
        if masks is None:
            return
        quantization = next((c.account for c in trainer.callbacks if isinstance(c, QuantizedBase)), None)
        with self._charged(trainer, "export"), whole_on_first_rank(module):
            if not trainer.is_global_zero:
                return
            written = self.folder.write_trained(module, masks, {"quantization": quantization or None})
            if not merged and written == self.folder.adapter:
                self.folder.drop_merged()  # left by an earlier end of the run that was not completed
            if written == self.folder.model or "sparsity" not in self.report:  # a resumed run has not counted yet
                self._count(self.folder.path if written == self.folder.adapter else written)

    def _count(self, folder: Path) -> None:
        inspection = inspect_folder(folder)
        files = ", ".join(str(file.relative_to(self.folder.path)) for file in inspection.files)
        self.report["sparsity"] = inspection.account() | {"counted_on": files}

    def _merge(self, trainer: Trainer, module: LightningModule) -> None:
        """Merge the adapters if that is lossless, write the merged model and evaluate it."""
        form, masks = form_of(module), masks_of(trainer)
        if form is None or masks is None:
            return
        self.report["merge"] = {"form": form, "lossless": False}
        try:
            with in_floats(module), merged_in_place(module, masks):
                with self._charged(trainer, "export"), whole_on_first_rank(module):
                    if trainer.is_global_zero:
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
