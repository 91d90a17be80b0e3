"""`sparsefit study` prunes one or more models at every point of a grid, with a recipe in YAML."""

from __future__ import annotations

import hashlib
import logging
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from rich.markup import escape

from sparsefit.callbacks.model_call import ModelCall
from sparsefit.callbacks.slow_precision import warn_of_slow_precision
from sparsefit.cli.input_errors import PlainErrors, check_recipes, check_seed, check_trainer, trainer_errors
from sparsefit.cli.library_output import silence_libraries
from sparsefit.cli.model_data_checks import check_data
from sparsefit.cli.study_data import StudyData
from sparsefit.cli.study_folder import StudyFolder
from sparsefit.cli.study_training import FinetuningSettings, NewTrainer, TrainingSettings, finetune, trained_dense
from sparsefit.errors import ConfigError
from sparsefit.machine import machine, versions
from sparsefit.reporting.console import console, study_summary
from sparsefit.study import Grid, Point, Subject, study
from sparsefit.study.results import Row

_QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
_NAME = re.compile(r"[\w.-]+")


def run_study(arguments: list[str]) -> int:
    """Run a recipe's study, or continue it.

    Returns:
        The exit status: 1 if a point failed.
    """
    silence_libraries()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # each training would log the devices
    check_recipes(arguments)
    parser = _parser()
    settings = parser.parse_args(arguments)
    _check_names(settings.models)
    check_seed(settings.seed_everything)
    check_trainer(settings.trainer)
    _check_trainer(settings.trainer.as_dict())
    new_trainer = partial(_trainer, settings.trainer.as_dict())
    with trainer_errors():  # before any data or model is read
        warn_of_slow_precision(new_trainer())
    seed_everything(settings.seed_everything, verbose=False)
    given = parser.instantiate(settings)
    given.finetuning.check(given.grid.points())
    folder = StudyFolder(Path(settings.study.folder))
    with folder.locked():
        return _run(given, folder, settings, parser.dump(settings, skip_none=False), new_trainer)


def _run(given: Namespace, folder: StudyFolder, settings: Namespace, config: str, new_trainer: NewTrainer) -> int:
    """Study all models, write the report and return the exit status."""
    known = folder.open(config)
    about = known | _report_entries(settings, config, known)
    about["planned"] = len(given.models) * (1 + sum(_rows(given, point) for point in given.grid.points()))
    given.data.prepare_data()
    for stage in ("fit", "test"):
        # A random split made here must be the one that Lightning's own call makes before each training.
        seed_everything(settings.seed_everything, verbose=False)
        given.data.setup(stage)

    start = time.perf_counter()
    folder.write(about, 0.0)
    try:
        for name in given.models:
            _study_model(name, given, folder, about, new_trainer)
        about |= {"status": "finished", "failure": ""}
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        about |= {"status": "interrupted" if stopped else "failed", "failure": "" if stopped else str(error)}
        raise
    finally:
        whole = folder.write(about, time.perf_counter() - start)
    console.print(study_summary(whole, folder.rows))
    console.print(f"report: {folder.page}   table: {folder.table}")
    return 1 if any(row["error"] and row["model"] in given.models for row in folder.rows) else 0


def _rows(given: Namespace, point: Point) -> int:
    tuned = given.finetuning.seeds if given.finetuning.epochs and given.finetuning.takes(point) else 0
    return tuned + (given.study.calibration_seeds if point.config.needs_inputs else 1)


def _study_model(
    name: str, given: Namespace, folder: StudyFolder, about: dict[str, Any], new_trainer: NewTrainer
) -> None:
    """Study all points of one model, which exists only during this call; train it first if the recipe requests it."""
    seed, device, points = given.seed_everything, new_trainer().strategy.root_device, given.grid.points()
    seed_everything(seed, verbose=False)
    module = given.models[name]()
    _check_measures(name, module, about)
    check_data(module, given.data)
    data = StudyData(given.data, module, device, seed)
    data.check(
        trains=given.training.epochs + given.finetuning.epochs > 0,
        calibrates=any(point.config.needs_inputs for point in points),
    )
    model = about["models"].setdefault(name, {})
    trained = trained_dense(module, folder.model_file(name), given.data, given.training, new_trainer, seed)
    model["training"] = trained or model.get("training")
    results = folder.results(about["metrics"])
    _check_weights(name, module, model, results.rows)
    model["settings"] = yaml.safe_load(about["config"])["models"][name]
    module.to(device)
    tuning = given.finetuning
    subject = Subject(
        name,
        module,
        ModelCall(module),
        partial(finetune, data, tuning, new_trainer, device) if tuning.epochs else None,
        tuning.takes,
        tuning.epochs,
        seed,
        given.study.calibration_seeds,
        tuning.seeds,
    )
    try:
        study(subject, data, points, results, partial(_print_row, about["metrics"]))
    finally:
        _describe(model, subject)


def _check_weights(name: str, module: LightningModule, model: dict[str, Any], rows: Sequence[Row]) -> None:
    """Check that existing rows were measured on this model."""
    sha = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        sha.update(key.encode())
        if isinstance(tensor, torch.Tensor):
            sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    before, model["digest"] = model.get("digest"), sha.hexdigest()
    measured = any(row["model"] == name and not row["error"] for row in rows)
    if measured and before not in (None, model["digest"]):
        raise ConfigError(
            f"models.{name} has other weights than the model that the study has results of: give the study another "
            "folder (study.folder), or use the earlier model"
        )


class _Parser(PlainErrors, ArgumentParser):
    """A parser whose errors are one sentence."""


def _parser() -> ArgumentParser:
    parser = _Parser(prog="sparsefit study", description=__doc__)
    parser.add_argument("-c", "--config", action="config", help="a recipe in YAML")
    seeds = "seed of all random numbers; with several seeds, the first one"
    parser.add_argument("--seed_everything", type=int, default=0, help=seeds)
    parser.add_argument("--study.folder", type=str, required=True, help="folder of the results")
    parser.add_argument("--study.name", type=str | None, default=None, help="title; by default the folder's name")
    parser.add_argument(
        "--study.calibration_seeds",
        type=PositiveInt,
        default=1,
        help="number of seeds to draw calibration samples with: seed_everything and the numbers after it",
    )
    parser.add_argument(
        "--models", type=dict[str, Callable[[], LightningModule]], required=True, help="the models by name"
    )
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


def _check_trainer(settings: Mapping[str, Any]) -> None:
    """Check that each training can have its own trainer with these settings.

    Raises:
        ConfigError: for objects, which trainings would share, and for settings that a study's evaluation ignores.
    """
    for name, value in settings.items():
        if (name == "callbacks" and value) or any(isinstance(v, Mapping) for v in _as_list(value)):
            raise ConfigError(
                f"a study creates a trainer for each training and does not support trainer.{name}: leave it out; use "
                "`sparsefit fit` for one training with your own callbacks and plugins"
            )
    for name in ("fast_dev_run", "limit_test_batches", "limit_predict_batches"):
        if settings.get(name):
            raise ConfigError(
                f"a study has its own evaluation and does not support trainer.{name}: leave it out, and give the data "
                "fewer images or windows (such as data.init_args.test_images) or the grid fewer points"
            )


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _check_names(models: Mapping[str, Any]) -> None:
    wrong = [name for name in models if not isinstance(name, str) or not _NAME.fullmatch(name)]
    if wrong or not models:
        raise ConfigError(
            f"models: {wrong[0]!r} cannot be a file name: use letters, digits, '.', '-' and '_'"
            if wrong
            else "the study has no models: give at least one under `models`, with a name of your choice"
        )


def _report_entries(settings: Namespace, config: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of study.json about the study as a whole."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "status": "running",
        "failure": "",
        "name": settings.study.name or Path(settings.study.folder).name,
        "command": shlex.join([sys.argv[0].rpartition("/")[2], *sys.argv[1:]]),
        "created": known.get("created") or now,
        "continued": [*known.get("continued", []), now] if "created" in known else [],
        "finetuning": settings.finetuning.as_dict() if settings.finetuning.epochs else None,
        "versions": versions(),
        "machine": machine(),
        "config": config,
    }


def _check_measures(name: str, module: LightningModule, about: dict[str, Any]) -> None:
    """Check that a model has the metrics of the study's other models."""
    metrics = getattr(module, "metrics", None)
    named = isinstance(metrics, Mapping) and metrics and set(metrics.values()) <= {"higher", "lower"}
    if not named or not callable(getattr(module, "evaluate", None)):
        raise ConfigError(
            f"models.{name}: {type(module).__name__} has no `metrics` (name to 'higher' or 'lower') and "
            "`evaluate(batches)`, with which a study measures it; see CausalLMModule and ImageClassifierModule"
        )
    metrics = dict(metrics)
    if about.setdefault("metrics", metrics) != metrics:
        raise ConfigError(
            f"models.{name} measures {sorted(metrics)} and the study's other models {sorted(about['metrics'])}: "
            "use a study for each"
        )


def _print_row(metrics: Mapping[str, str], row: Mapping[str, Any]) -> None:
    share, order = row["pattern"] or f"{row['sparsity']:g}", "" if row["update"] == "none" else row["update"]
    setting = " ".join(part for part in (row["score"], row["granularity"], share, order) if part)
    stage = row["stage"] if row["stage"] == "dense" else f"{setting} {row['stage']}"
    seed = row["training_seed" if row["stage"] == "finetuned" else "calibration_seed"]
    stage += f", seed {seed}" if seed else ""
    found = row.get("error") or ", ".join(f"{name} {row[name]:.4g}" for name in metrics)
    console.print(f"{escape(row['model'])}: {escape(stage)}: {escape(found)}", highlight=False)


def _describe(model: dict[str, Any], subject: Subject) -> None:
    """Fill a model's entries in study.json; a continued study keeps earlier values."""
    model["class"] = type(getattr(subject.module, "model", subject.module)).__name__
    model["parameters"] = sum(parameter.numel() for parameter in subject.module.parameters())
    model["prunable"] = subject.prunable or model.get("prunable")
    model["left_dense"] = subject.left_dense or model.get("left_dense", {})
    model["calibration"] = subject.calibration or model.get("calibration")
    model["notes"] = [*dict.fromkeys([*model.get("notes", []), *subject.notes])]
