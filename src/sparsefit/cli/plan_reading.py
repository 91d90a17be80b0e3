"""Reads a recipe's data for its plan in the order of the run, so that reading time counts for the right stage."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.utilities.model_helpers import is_overridden

from sparsefit.calibration.samples import count_samples, cut_batch
from sparsefit.callbacks.calibration import TRAINING_SAMPLES
from sparsefit.errors import CalibrationError, ConfigError, SparsefitError
from sparsefit.evaluation.zero_shot import load_tasks


@dataclass
class Data:
    """The data that a plan needs.

    Args:
        calibration: All calibration batches.
        train: The first training batch.
        epoch_batches: Training batches in an epoch.
        test: The first test batch.
        test_batches: How many test batches there are.
        val: The first validation batch.
        val_batches: How many validation batches there are.
        task_items: How many items the zero-shot tasks have.
        reading: Seconds that reading took, by stage.
    """

    calibration: list[Any] = field(default_factory=list)
    train: Any = None
    epoch_batches: float = math.inf
    test: Any = None
    test_batches: int = 0
    val: Any = None
    val_batches: int = 0
    task_items: int = 0
    reading: dict[str, float] = field(default_factory=dict)


def read_data(settings: Any, evaluates: bool) -> Data:
    """The data of a recipe, read as its run would read them.

    Args:
        settings: The settings of the recipe.
        evaluates: Whether the module has `evaluate`, which takes test data; otherwise validations measure it.

    Raises:
        CalibrationError: if there is nothing to calibrate on.
        ConfigError: if the recipe has no data, or its model must generate them first.
    """
    if settings.get("data") is None:
        raise ConfigError("a plan needs a `data` section: a module with its own data loaders cannot be planned")
    found, source = Data(), instantiate_class((), settings.data.as_dict())
    with _timed(found, "setup"):
        source.prepare_data()
        source.setup("fit")
    calibrate = getattr(source, "calibration_dataloader", None)
    try:
        with _timed(found, "pruning"):
            found.calibration = list(calibrate()) if callable(calibrate) else []
        if evaluates:
            with _timed(found, "evaluation"):
                _read_test(found, source)
        with _timed(found, "training"):
            loader = source.train_dataloader()
            found.train, found.epoch_batches = next(iter(loader), None), _length(loader, settings.trainer, "train")
    except SparsefitError as error:
        if callable(getattr(source, "write_with", None)):
            raise ConfigError(
                f"the model generates this recipe's text when the run starts, so it cannot be planned before: {error}"
            ) from error
        raise
    if not callable(calibrate):
        found.calibration = first_samples(loader, settings.pruning.calibration_samples or TRAINING_SAMPLES)
    if not found.calibration or found.calibration[0] is None:
        raise CalibrationError("there is nothing to calibrate on: the data give no batch")
    if is_overridden("val_dataloader", source):
        found.val, found.val_batches = _validation(source.val_dataloader(), settings.trainer)
    if not evaluates:
        found.test, found.test_batches = found.val, found.val_batches
    if settings.run.tasks:
        limit = settings.run.tasks_limit or math.inf
        tasks = load_tasks(settings.run.tasks, settings.run.tasks_folder)
        found.task_items = int(sum(min(len(task.eval_docs), limit) for task in tasks.values()))
    return found


def first_samples(batches: Iterable[Any], samples: int) -> list[Any]:
    """The first samples, in batches."""
    taken: list[Any] = []
    for batch in batches:
        if samples <= 0:
            break
        size = count_samples(batch)
        taken.append(batch if size <= samples else cut_batch(batch, samples))
        samples -= size
    return taken


@contextmanager
def _timed(data: Data, stage: str) -> Iterator[None]:
    """Add the body's seconds to the reading time of a stage."""
    start = time.monotonic()
    yield
    data.reading[stage] = time.monotonic() - start


def _read_test(data: Data, source: Any) -> None:
    if not is_overridden("test_dataloader", source):
        return
    try:
        source.setup("test")
        loader = source.test_dataloader()
    except SparsefitError:  # a recipe may have no test data
        return
    if loader is not None:
        batches = _whole_length(loader)
        data.test, data.test_batches = next(iter(loader), None), 0 if batches == math.inf else int(batches)


def _validation(loaders: Any, trainer: Any) -> tuple[Any, int]:
    """The first validation batch, and the number of batches in a validation."""
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    loaders = [loader for loader in loaders if loader is not None]
    batches = sum(_length(loader, trainer, "val") for loader in loaders)
    if not batches or batches == math.inf:
        return None, 0
    return next(iter(loaders[0]), None), int(batches)


def _length(loader: Any, trainer: Any, kind: str) -> float:
    """Batches of a loader within the Trainer's limits; infinity if the length is unknown."""
    whole = _whole_length(loader)
    limit = trainer[f"limit_{kind}_batches"]
    if limit is None:
        return whole
    return min(whole, limit) if isinstance(limit, int) else whole if whole == math.inf else int(whole * limit)


def _whole_length(loader: Any) -> float:
    """All batches of a loader; infinity if the length is unknown."""
    try:
        return len(loader)
    except TypeError:
        return math.inf
