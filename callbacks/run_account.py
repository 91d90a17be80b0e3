"""What a report says of a run: how it began, and how it stands."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from sparsefit.callbacks.ledgers import budget_of, ledger_of
from sparsefit.callbacks.quantization import QuantizedBase
from sparsefit.callbacks.reconstruction import BlockwiseReconstruction
from sparsefit.reporting.machine import machine, peak_memory, versions


def beginning(name: str, folder: Path, module: LightningModule) -> dict[str, Any]:
    """The report of a run that begins."""
    return {
        "name": name,
        "id": None,  # a checkpoint brings that of its run
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "folder": str(folder),
        "command": shlex.join([sys.argv[0].rpartition("/")[2], *sys.argv[1:]]),
        "metrics": dict(getattr(module, "metrics", {})),
        "versions": versions(),
        "machine": machine(),
    }


def standing(
    trainer: Trainer, module: LightningModule, report: Mapping[str, Any], history: list[dict[str, float]]
) -> dict[str, Any]:
    """The entries of a report that change as the run goes on.

    Args:
        trainer: Of the run.
        module: Of the run.
        report: The report so far; its count of zeros is told what pruning was asked for.
        history: Points of the training.
    """
    ledger, budget = ledger_of(trainer), budget_of(trainer)
    memory, kind = peak_memory()
    pruning = next((c.summary for c in trainer.callbacks if getattr(c, "summary", None)), {})
    entries: dict[str, Any] = {
        "pruning": pruning,
        "training": {
            "steps": trainer.global_step,
            "stop_reason": _stop_reason(trainer),
            "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
            "history": history,
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
    for key, callback in (("reconstruction", BlockwiseReconstruction), ("quantization", QuantizedBase)):
        if account := next((c.account for c in trainer.callbacks if isinstance(c, callback)), None):
            entries[key] = account
    if "sparsity" in report and pruning:
        asked = pruning["config"]
        entries["sparsity"] = report["sparsity"] | {"pattern": asked["pattern"], "asked": asked["sparsity"]}
        entries["sparsity"] |= {key: pruning.get(key) for key in ("coverage", "overall_sparsity")}
    return entries


def _stop_reason(trainer: Trainer) -> str | None:
    budget = budget_of(trainer)
    if budget is not None and budget.stop_reason:
        return budget.stop_reason
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"max_steps={trainer.max_steps} reached"
    return "the data or max_epochs ended" if trainer.global_step else None
