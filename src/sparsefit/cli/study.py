"""`sparsefit study`: a grid of prunings over one or more models, from a recipe in YAML."""

from __future__ import annotations

import logging
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from rich.markup import escape

from sparsefit.cli.quiet import quieten
from sparsefit.cli.study_folder import StudyFolder
from sparsefit.cli.study_training import FinetuningSettings, NewTrainer, TrainingSettings, finetune, trained_dense
from sparsefit.errors import ConfigError
from sparsefit.reporting.console import console, study_summary
from sparsefit.reporting.machine import machine, versions
from sparsefit.study import Grid, Subject, study

_QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
_NAME = re.compile(r"[\w.-]+")


def run_study(arguments: list[str]) -> int:
    """Run the study of a recipe; one that was stopped goes on where it was.

    Returns:
        The exit status: 1 if a point failed.
    """
    quieten()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # each training would say which devices there are
    parser = _parser()
    settings = parser.parse_args(arguments)
    given = parser.instantiate(settings)
    given.grid.points()
    _check_names(settings.models)
    new_trainer = partial(_trainer, settings.trainer.as_dict())
    new_trainer()  # what cannot work is told before anything is read
    folder = StudyFolder(Path(settings.study.folder))
    config = parser.dump(settings, skip_none=False)
    about = folder.open(config) | _account(settings, config)
    given.data.prepare_data()
    for stage in ("fit", "test"):
        given.data.setup(stage)

    start = time.perf_counter()
    folder.write(about, 0.0)
    try:
        for name in given.models:
            _study_model(name, given, folder, about, new_trainer)
    finally:
        whole = folder.write(about, time.perf_counter() - start)
    console.print(study_summary(whole, folder.rows))
    console.print(f"report: {folder.page}   table: {folder.table}")
    return 1 if any(row["error"] for row in folder.rows) else 0


def _study_model(
    name: str, given: Namespace, folder: StudyFolder, about: dict[str, Any], new_trainer: NewTrainer
) -> None:
    """All points of one model, which is made, and trained where the recipe says so, for the length of this call."""
    seed, device = given.seed_everything, new_trainer().strategy.root_device
    seed_everything(seed, verbose=False)
    module = given.models[name]()
    _check_measures(name, module, about)
    model = about["models"].setdefault(name, {})
    trained = trained_dense(module, folder.model_file(name), given.data, given.training, new_trainer, seed)
    model["training"] = trained or model.get("training")
    module.to(device)
    train = partial(finetune, given.data, given.finetuning, new_trainer, seed, device)
    epochs = given.finetuning.epochs
    subject = Subject(name, module, train if epochs else None, given.finetuning.takes, epochs)
    try:
        results = folder.results(about["metrics"])
        study(subject, given.data, given.grid.points(), results, partial(_tell, about["metrics"]))
    finally:
        _describe(model, subject)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="sparsefit study", description=__doc__)
    parser.add_argument("-c", "--config", action="config", help="a recipe in YAML")
    parser.add_argument("--seed_everything", type=int, default=0, help="seed of every training")
    parser.add_argument("--study.folder", type=str, required=True, help="where the results go")
    parser.add_argument("--study.name", type=str | None, default=None, help="title; by default the folder's name")
    parser.add_argument("--models", type=dict[str, Callable[[], LightningModule]], required=True, help="by name")
    parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False, required=True)
    parser.add_class_arguments(Grid, "grid")
    parser.add_class_arguments(TrainingSettings, "training")
    parser.add_class_arguments(FinetuningSettings, "finetuning")
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False, instantiate=False)
    return parser


def _trainer(settings: Mapping[str, Any], **others: Any) -> Trainer:
    devices = {"devices": 1} if settings["devices"] == "auto" else {}
    trainer = Trainer(**{**settings, **_QUIET, **devices, **others})
    if trainer.world_size > 1:
        raise ConfigError("a study runs on one device: give trainer.devices=1")
    return trainer


def _check_names(models: Mapping[str, Any]) -> None:
    wrong = [name for name in models if not _NAME.fullmatch(name)]
    if wrong or not models:
        raise ConfigError(
            f"models: {wrong[0]!r} is no name for a file: use letters, digits, '.', '-' and '_'"
            if wrong
            else "the study has no models: give at least one under `models`, by a name of your own"
        )


def _account(settings: Namespace, config: str) -> dict[str, Any]:
    return {
        "name": settings.study.name or Path(settings.study.folder).name,
        "command": shlex.join([sys.argv[0].rpartition("/")[2], *sys.argv[1:]]),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "finetuning": settings.finetuning.as_dict() if settings.finetuning.epochs else None,
        "versions": versions(),
        "machine": machine(),
        "config": config,
    }


def _check_measures(name: str, module: LightningModule, about: dict[str, Any]) -> None:
    """See that a model can be measured, by what the study's other models are measured by."""
    metrics = dict(getattr(module, "metrics", {}))
    if not metrics or not callable(getattr(module, "evaluate", None)):
        raise ConfigError(
            f"models.{name}: {type(module).__name__} has no `metrics` and `evaluate(batches)`, by which a study "
            "measures it; see CausalLMModule and ImageClassifierModule"
        )
    if about.setdefault("metrics", metrics) != metrics:
        raise ConfigError(
            f"models.{name} measures {sorted(metrics)} and the study's other models {sorted(about['metrics'])}: "
            "study them apart"
        )


def _tell(metrics: Mapping[str, str], row: Mapping[str, Any]) -> None:
    share, order = row["pattern"] or f"{row['sparsity']:g}", "" if row["update"] == "none" else row["update"]
    what = " ".join(part for part in (row["score"], row["granularity"], share, order) if part)
    stage = row["stage"] if row["stage"] == "dense" else f"{what} {row['stage']}"
    found = row.get("error") or ", ".join(f"{name} {row[name]:.4g}" for name in metrics)
    console.print(f"{escape(row['model'])}: {escape(stage)}: {escape(found)}", highlight=False)


def _describe(model: dict[str, Any], subject: Subject) -> None:
    """What a study has learned of a model; of a study that goes on, what was known before stays."""
    model["class"] = type(getattr(subject.module, "model", subject.module)).__name__
    model["parameters"] = sum(parameter.numel() for parameter in subject.module.parameters())
    model["prunable"] = subject.prunable or model.get("prunable", 0)
    model["left_dense"] = subject.left_dense or model.get("left_dense", {})
    model["calibration"] = subject.calibration or model.get("calibration")
    model["notes"] = [*dict.fromkeys([*model.get("notes", []), *subject.notes])]
