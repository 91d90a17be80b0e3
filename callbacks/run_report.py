"""`RunReport`: evaluates the dense, pruned and recovered model, exports it, and reports what it all cost."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from sparsefit.callbacks.ledgers import budget_of, ledger_of
from sparsefit.callbacks.run_folder import RunFolder
from sparsefit.errors import RunFolderError
from sparsefit.pruning import MaskSet, PruningResult
from sparsefit.recovery.export import export_adapter, export_base, exported_masks, trains_base
from sparsefit.recovery.inspection import inspect_folder
from sparsefit.reporting.console import console, stage_progress, summary
from sparsefit.reporting.html import render_html
from sparsefit.reporting.machine import machine, peak_memory, versions
from sparsefit.reporting.report import write_json

_MARGIN = 1.25  # the last evaluation may be somewhat slower than the ones it is measured by


class RunReport(Callback):
    """Fills a run folder: sparse base, adapter, masks, `report.json` and `report.html`.

    The module is evaluated dense, pruned and recovered if there are test data and it has a method
    `evaluate(batches, progress)` that returns figures by name and calls `progress` after each batch; its attribute
    `metrics` says which way each figure is better ("lower" or "higher"). The sparse base is written as soon as
    the model is pruned, so a run that breaks off later leaves it; what was trained until then is written too.

    Args:
        folder: The run folder: new or empty, unless a run is resumed.
        name: What the report is titled with; by default the folder's name.

    Raises:
        RunFolderError: at the start of the fit, if the folder cannot be used.
    """

    def __init__(self, folder: str = "runs/sparsefit", name: str | None = None) -> None:
        self.folder = RunFolder(folder)
        self.name = name or self.folder.path.name
        self.report: dict[str, Any] = {}
        self._history: list[dict[str, float]] = []
        self._seconds = {"evaluation": 0.0, "export": 0.0}  # the longest of each
        self._configuration: str | None = None
        self._claimed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin the report."""
        if stage != "fit":
            return
        ledger_of(trainer)
        self._claimed = False
        self.report = {
            "name": self.name,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "folder": str(self.folder.path),
            "command": shlex.join([sys.argv[0].rpartition("/")[2], *sys.argv[1:]]),
            "metrics": dict(getattr(pl_module, "metrics", {})),
            "versions": versions(),
            "machine": machine(),
        }

    def take_configuration(self, text: str) -> None:
        """Keep the YAML of the run in the report, and beside it as a file that a new run can start from."""
        self._configuration = text

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the folder before anything is spent."""
        # Where a strategy restores late, it shows only when training starts whether a run is resumed.
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._claim(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, with a strategy that restores late."""
        self._claim(trainer, pl_module)

    def on_pruning_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the dense model."""
        self._claim(trainer, pl_module)
        self._evaluate(trainer, pl_module, "dense")
        self._reserve(trainer, 2 * self._seconds["evaluation"])  # the pruned and the recovered model are to come

    def on_pruning_end(self, trainer: Trainer, pl_module: LightningModule, result: PruningResult) -> None:
        """Write the sparse base and its masks, and evaluate it."""
        self._export_base(trainer, pl_module, result.masks)
        self._evaluate(trainer, pl_module, "pruned")
        self._reserve(trainer, sum(self._seconds.values()))
        self._write(trainer, pl_module, "running")

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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export what was trained, evaluate it, and write the report."""
        if trainer.global_step > 0:
            self._export_trained(trainer, pl_module)
            self._evaluate(trainer, pl_module, "recovered")
        self._write(trainer, pl_module, "finished")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the report's summary."""
        if self.report.get("status") == "running":  # nothing was trained
            self._write(trainer, pl_module, "finished")
        if trainer.is_global_zero and self.report.get("status"):
            console.print(summary(self.report))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what was trained so far, and report how far the run came."""
        if not self._claimed:
            return  # the folder is not ours to write to
        status = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
        self.report["error"] = f"{type(exception).__name__}: {exception}"
        try:
            if trainer.global_step > 0:
                self._export_trained(trainer, pl_module)
            self._write(trainer, pl_module, status)
        except Exception as error:  # whatever it is, the checkpoint that follows must be written
            rank_zero_warn(f"What was trained could not be exported or reported: {error!r}")

    def state_dict(self) -> dict[str, Any]:
        """The figures so far, for a run that is resumed."""
        return {"figures": {m: self.report.get(m) for m in self.report.get("metrics", {})}, "history": self._history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the figures of the run before."""
        self.report.update({metric: values for metric, values in state_dict["figures"].items() if values})
        self._history = list(state_dict["history"])

    def _claim(self, trainer: Trainer, module: LightningModule) -> None:
        if self._claimed:
            return
        if trainer.is_global_zero:
            self.folder.claim(module, resuming=trainer.ckpt_path is not None)
            self._check_same_run(trainer, module)
            if self._configuration is not None:
                self.folder.configuration.write_text(self._configuration, encoding="utf-8")
        self.report["configuration"] = self._configuration
        self._claimed = True

    def _check_same_run(self, trainer: Trainer, module: LightningModule) -> None:
        """A base that lies in the folder must be the one that the resumed run trains its adapter for."""
        masks = _masks_of(trainer)
        if trainer.ckpt_path is None or masks is None or not self.folder.masks.exists():
            return
        if MaskSet.load(self.folder.masks).digest() != exported_masks(module, masks).digest():
            raise RunFolderError(
                f"the run folder {self.folder.path} holds another run: its masks are not those of the checkpoint. Give "
                "the folder of the run that the checkpoint is from, or a new one"
            )

    def _evaluate(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        evaluate = getattr(module, "evaluate", None)
        source = trainer.datamodule if trainer.datamodule is not None else module
        has_data = is_overridden("test_dataloader", source)
        loader = source.test_dataloader() if callable(evaluate) and has_data else None
        if loader is None:
            return
        with self._charged(trainer, "evaluation"), trainer.precision_plugin.val_step_context():
            total = len(loader) if hasattr(loader, "__len__") else None
            with stage_progress(f"evaluating the {stage} model", total, visible=trainer.is_global_zero) as advance:
                figures = evaluate(loader, progress=lambda _: advance())
        for metric, value in figures.items():
            self.report.setdefault(metric, {})[stage] = value
            for logger in trainer.loggers:
                logger.log_metrics({f"{metric}/{stage}": value}, step=trainer.global_step)

    def _reserve(self, trainer: Trainer, seconds: float) -> None:
        """Have the budget keep the time that is still needed when training ends."""
        if (budget := budget_of(trainer)) is not None:
            budget.keep(_MARGIN * seconds, "closing")

    @contextmanager
    def _charged(self, trainer: Trainer, stage: str) -> Iterator[None]:
        start = time.monotonic()
        with ledger_of(trainer).stage(stage):
            yield
        self._seconds[stage] = max(self._seconds[stage], time.monotonic() - start)

    def _export_base(self, trainer: Trainer, module: LightningModule, masks: MaskSet) -> None:
        if not trainer.is_global_zero:
            return
        with self._charged(trainer, "export"):
            saved = export_base(module, masks, self.folder.base)
            saved.save(self.folder.masks)
            self._count()

    def _count(self) -> None:
        inspection = inspect_folder(self.folder.path)
        files = ", ".join(str(file.relative_to(self.folder.path)) for file in inspection.files)
        self.report["sparsity"] = inspection.account() | {"counted_on": files}

    def _export_trained(self, trainer: Trainer, module: LightningModule) -> None:
        masks = _masks_of(trainer)
        if not trainer.is_global_zero or masks is None:
            return
        with self._charged(trainer, "export"):
            has_adapter = export_adapter(module, self.folder.base, self.folder.adapter)
        if not has_adapter or trains_base(module) or not self.folder.masks.exists():
            self._export_base(trainer, module, masks)  # it was trained itself, or lies in the folder of another run
        elif "sparsity" not in self.report:  # a resumed run: the base is that of the first one
            self._count()

    def _write(self, trainer: Trainer, module: LightningModule, status: str) -> None:
        ledger, budget = ledger_of(trainer), budget_of(trainer)
        memory, kind = peak_memory()
        pruning = next((c.summary for c in trainer.callbacks if getattr(c, "summary", None)), {})
        if "sparsity" in self.report and pruning:
            self.report["sparsity"] |= {key: pruning["config"][key] for key in ("pattern",)}
            self.report["sparsity"]["asked"] = pruning["config"]["sparsity"]
        self.report |= {
            "status": status,
            "pruning": pruning,
            "training": {
                "steps": trainer.global_step,
                "stop_reason": _stop_reason(trainer),
                "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
                "history": self._history,
            },
            "gpu_hours": {
                "total": ledger.hours,
                "budget": budget.gpu_hours if budget is not None else None,
                "devices": trainer.world_size,
                "stages": ledger.stages,
            },
            "seconds": {"total": sum(ledger.seconds.values()), "stages": ledger.seconds},
            "memory": {"peak_bytes": memory, "kind": kind},
        }
        if trainer.is_global_zero:
            write_json(self.report, self.folder.json)
            self.folder.html.write_text(render_html(self.report), encoding="utf-8")


def _masks_of(trainer: Trainer) -> MaskSet | None:
    return next((c.masks for c in trainer.callbacks if isinstance(getattr(c, "masks", None), MaskSet)), None)


def _stop_reason(trainer: Trainer) -> str | None:
    budget = budget_of(trainer)
    if budget is not None and budget.stop_reason:
        return budget.stop_reason
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"max_steps={trainer.max_steps} reached"
    return "the data or max_epochs ended" if trainer.global_step else None
