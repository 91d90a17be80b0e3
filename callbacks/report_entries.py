"""The entries of a run's report: how it began, how its model was pruned, and its current state."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor

from sparsefit.callbacks.quantization import QuantizedBase
from sparsefit.callbacks.reconstruction import BlockwiseReconstruction
from sparsefit.callbacks.trainer_lookup import budget_of, ledger_of
from sparsefit.machine import machine, peak_memory, versions
from sparsefit.pruning import MaskSet, PruningConfig, PruningResult


def beginning(name: str, folder: Path, module: LightningModule) -> dict[str, Any]:
    """The entries of a report when its run begins."""
    return {
        "name": name,
        "id": None,  # restored from the checkpoint of a resumed run
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "folder": str(folder),
        "command": shlex.join([sys.argv[0].rpartition("/")[2], *sys.argv[1:]]),
        "metrics": dict(getattr(module, "metrics", {})),
        "versions": versions(),
        "machine": machine(),
    }


def named_model(configuration: str | None) -> dict[str, Any] | None:
    """The name of the model in a recipe, and whether it came from the hub; None without a recipe or a name.

    Args:
        configuration: The recipe as YAML. Its model is loaded already, so a name that is not a local path is on the
            hub.
    """
    settings: Any = yaml.safe_load(configuration or "")
    for key in ("model", "init_args", "model"):
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    if not isinstance(settings, str):
        return None
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", settings) and not settings.endswith(".gguf")
    return {"name": settings, "hub": bool(hub) and not Path(settings).exists()}


def pruned(result: PruningResult, source: str) -> dict[str, Any]:
    """A summary of a pruning, in values that can be saved in a checkpoint.

    Args:
        result: What `prune` returned.
        source: A description of where the calibration data came from.
    """
    memory, kind = peak_memory()
    kept = ("update", "coverage", "overall_sparsity", "samples", "tokens", "seconds")
    return {
        "config": plain_config(result.config),
        "digest": result.masks.digest(),
        "sparsity": result.masks.sparsity,
        **{name: getattr(result, name) for name in kept},
        "source": source,
        "peak_memory_bytes": memory,
        "peak_memory_kind": kind,
        "layer_errors": dict(result.layer_errors),
        "notes": list(result.notes),
        "left_dense": dict(result.left_dense),
    }


def plain_config(config: PruningConfig) -> dict[str, Any]:
    """A configuration as a dict for checkpoints and loggers, with lists instead of tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def log_pruned(loggers: Iterable[Logger], summary: Mapping[str, Any], masks: MaskSet, step: int) -> None:
    """Log a pruning: its configuration, and the sparsity in total and per layer.

    Args:
        loggers: The loggers of the trainer.
        summary: What `pruned` returned.
        masks: The masks.
        step: Optimizer steps taken.
    """
    keys = ("sparsity", "coverage", "overall_sparsity", "seconds", "peak_memory_bytes")
    metrics = {f"pruning/{key}": summary[key] for key in keys if summary[key] is not None}
    metrics |= {f"sparsity/{name}": zeros / weights for name, (weights, zeros) in masks.counts().items()}
    settings = {f"pruning/{key}": value for key, value in summary["config"].items()}
    for logger in loggers:
        logger.log_hyperparams({**settings, "pruning/digest": summary["digest"]})
        logger.log_metrics(metrics, step=step)


def point(trainer: Trainer, outputs: Any) -> list[dict[str, float]]:
    """The point of the training curve after a batch, in a list; an empty list if its outputs have no loss."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if not isinstance(loss, Tensor):
        return []
    return [
        {
            "step": trainer.global_step,
            "gpu_hours": ledger_of(trainer).hours,
            "loss": float(loss.detach()) * trainer.accumulate_grad_batches,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
    ]


def standing(
    trainer: Trainer, module: LightningModule, report: Mapping[str, Any], history: list[dict[str, float]]
) -> dict[str, Any]:
    """The entries of a report that change during the run.

    Args:
        trainer: The trainer of the run.
        module: The module of the run.
        report: The report so far; the requested sparsity is added to its count of zeros.
        history: Points of the training curve.
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
