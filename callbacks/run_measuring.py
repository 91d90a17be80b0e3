"""What a run measures, at which cost: the half of `RunReport` that evaluates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from sparsefit.callbacks.hooks import PrunedRunCallback
from sparsefit.callbacks.ledgers import budget_of, ledger_of, masks_of
from sparsefit.callbacks.reconstruction import BlockwiseReconstruction
from sparsefit.callbacks.task_figures import LEDGER_STAGE, METRIC, TaskFigures
from sparsefit.callbacks.validating import better, validated
from sparsefit.recovery.adapter_files import form_of
from sparsefit.recovery.adapters import LOSSLESS
from sparsefit.recovery.merge import lossy_layers
from sparsefit.reporting.console import stage_progress

_MARGIN = 1.25  # the last evaluation may be somewhat slower than the ones it is measured by


class RunMeasuring(PrunedRunCallback):
    """Measures a module at the stages of a run, and has the budget keep what that takes.

    Args:
        tasks: Zero-shot tasks that it is measured by, too.
    """

    def __init__(self, tasks: TaskFigures) -> None:
        self.tasks = tasks
        self.report: dict[str, Any] = {}
        self._seconds = {"evaluation": 0.0, "export": 0.0, LEDGER_STAGE: 0.0}  # the longest of each

    def measure(self, trainer: Trainer, module: LightningModule, stage: str) -> dict[str, float]:
        """What the module measures on the test data; of one that declares nothing, what its validation logs."""
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
        """A point of the curve of quality against GPU-hours."""
        point = {"stage": stage, "gpu_hours": ledger_of(trainer).hours, "step": trainer.global_step}
        self.report.setdefault("timeline", []).append(point | {"metric": metric, "value": value})

    def _reserve(self, trainer: Trainer, module: LightningModule, ahead: int = 0) -> None:
        """Have the budget keep the time of the evaluations before training and of all that comes after it."""
        if (budget := budget_of(trainer)) is not None:
            form, masks = form_of(module), masks_of(trainer)  # none before the pruning
            merges = form in LOSSLESS if masks is None else form is not None and not lossy_layers(module, masks)
            closing = (1 + merges) * (self._seconds["evaluation"] + self._seconds["export"])
            tasks = (ahead + 1) * self._seconds[LEDGER_STAGE]  # of what is ahead, and of the recovered model
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
