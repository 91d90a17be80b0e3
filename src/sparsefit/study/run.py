"""Running a study: one dense calibration, then for each point a selection, an evaluation, and perhaps fine-tuning."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsefit.errors import CalibrationError, ConfigError, SparsefitError
from sparsefit.pruning import (
    DenseStatistics,
    MaskSet,
    PruningConfig,
    PruningResult,
    collect_statistics,
    prune,
    prune_from_statistics,
)
from sparsefit.pruning.blocks import find_block_lists
from sparsefit.pruning.calibration import device_of
from sparsefit.pruning.evaluating import evaluating
from sparsefit.pruning.samples import split_samples
from sparsefit.pruning.targets import find_weights
from sparsefit.study.grid import Point
from sparsefit.study.results import Results


class Data(Protocol):
    """What a study reads: batches that the module takes as they are, the same each time."""

    def calibration_dataloader(self) -> Iterable[Any]:
        """Calibration batches."""

    def test_dataloader(self) -> Iterable[Any]:
        """What models are evaluated on."""


@dataclass
class Subject:
    """A dense model under study. It is dense again after each point.

    Args:
        name: What the study calls it.
        module: Has `evaluate(batches)`, which gives figures by name.
        forward: How a calibration batch goes through it.
        finetune: Trains a pruned module with its masks fixed; called with both.
        finetunes: Which points are fine-tuned.
        epochs: Of the fine-tuning, for the results.

    Attributes:
        notes: What did not go as asked, and why.
        left_dense: Matrices that are not pruned, and why.
        calibration: The account of the calibration: samples and seconds.
        prunable: Weights that are pruned from; 0 as long as nothing was pruned.
    """

    name: str
    module: nn.Module
    forward: Callable[[Any], Any]
    finetune: Callable[[nn.Module, MaskSet], None] | None = None
    finetunes: Callable[[Point], bool] = lambda point: True
    epochs: int = 0
    notes: list[str] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    prunable: int = 0

    def stages(self, point: Point) -> list[str]:
        """The stages at which a point is measured."""
        return ["pruned", *(["finetuned"] if self.finetune is not None and self.finetunes(point) else [])]

    def key(self, point: Point | None, stage: str) -> dict[str, Any]:
        """What tells a row of the results from the others; the dense model has no point."""
        of_point = {"score": "", "granularity": "", "update": "", "pattern": "", "sparsity": 0.0}
        if point is not None:
            of_point = point.key
        return {"model": self.name, "stage": stage, "epochs": self.epochs if stage == "finetuned" else 0, **of_point}


def study(
    subject: Subject,
    data: Data,
    points: Sequence[Point],
    results: Results,
    done: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> None:
    """Measure every point of a model that the results do not hold yet.

    The dense network is calibrated on once, for all points of update "none"; other orders need passes of their own. A
    point that fails is recorded with the reason, and the rest goes on; a study that goes on tries it again.

    Args:
        subject: The model.
        data: Calibration and test data.
        points: The grid.
        results: Where rows go as soon as they are there.
        done: Called with each new row.

    Raises:
        SparsefitError: If the dense model cannot be evaluated or calibrated on; the results so far are kept.
    """
    results.forget(subject.name, [subject.key(p, stage) for p in points for stage in subject.stages(p)])
    missing = [p for p in points if any(results.find(**subject.key(p, stage)) is None for stage in subject.stages(p))]

    def add(row: Mapping[str, Any]) -> None:
        results.add(row)
        done(row)

    calibration = _calibration(subject, data, missing)
    if results.find(**subject.key(None, "dense")) is None:
        figures, seconds = _evaluated(subject.module, data, results.metrics)
        add({**subject.key(None, "dense"), **figures, "evaluation_seconds": seconds})
    if not missing:
        return
    statistics = _calibrated(subject, calibration, missing)
    calibration = []
    dense = {name: tensor.detach().clone() for name, tensor in _tensors(subject.module).items()}
    for point in missing:
        with _restored(subject.module, dense):
            for row in _measured(subject, data, point, statistics, results):
                add(row)


def _measured(
    subject: Subject, data: Data, point: Point, statistics: DenseStatistics | None, results: Results
) -> Iterator[dict[str, Any]]:
    """The rows of a point: pruned, and then fine-tuned."""
    stage = "pruned"
    try:
        result, row = _pruned(subject, data, point, statistics)
        if results.find(**subject.key(point, stage)) is None:
            figures, seconds = _evaluated(subject.module, data, results.metrics)
            yield {**subject.key(point, stage), **row, **figures, "evaluation_seconds": seconds}
        for stage in subject.stages(point)[1:]:
            start = time.perf_counter()
            subject.finetune(subject.module, result.masks)
            row |= {"finetuning_seconds": time.perf_counter() - start}
            row |= {"counted": _zeros(subject.module, result.masks), "selection_seconds": None}
            figures, seconds = _evaluated(subject.module, data, results.metrics)
            yield {**subject.key(point, stage), **row, **figures, "evaluation_seconds": seconds}
    except Exception as error:  # whatever it is, the other points go on
        told = f"{type(error).__name__}: {error}"
        yield {**subject.key(point, stage), "error": " ".join(told.split())}


def _pruned(
    subject: Subject, data: Data, point: Point, statistics: DenseStatistics | None
) -> tuple[PruningResult, dict[str, Any]]:
    """Prune the model, and what its row says of that."""
    config, module = point.config, subject.module
    if config.update == "none" and statistics is not None:
        result = prune_from_statistics(module, statistics, config)
    else:
        batches = data.calibration_dataloader() if config.needs_inputs else None
        result = prune(module, batches, config, forward=subject.forward)
    result.masks.verify(module)
    subject.left_dense |= result.left_dense
    subject.prunable = sum(weights for weights, _ in result.masks.counts().values())
    subject.notes += [f"{point}: {note}" for note in result.notes if f"{point}: {note}" not in subject.notes]
    row = {"counted": _zeros(module, result.masks), "digest": result.masks.digest(), "used_update": result.update}
    return result, row | {"selection_seconds": result.seconds}


def _calibration(subject: Subject, data: Data, points: Iterable[Point]) -> list[Any]:
    """The calibration batches, if points need any; one sample has gone through the model.

    Raises:
        CalibrationError: before anything is evaluated, if there are none, or the sample does not go through.
    """
    if not any(point.config.needs_inputs for point in points):
        return []
    batches = list(data.calibration_dataloader())
    if not batches:
        raise CalibrationError("the study needs calibration data and there is none: calibration_dataloader() is empty")
    samples = split_samples(batches[0])
    with torch.no_grad(), evaluating(subject.module):
        subject.forward(samples[0] if samples else batches[0])
    return batches


def _calibrated(subject: Subject, batches: list[Any], points: Iterable[Point]) -> DenseStatistics | None:
    """The statistics of the dense network that some points need; None where none does."""
    configs = [point.config for point in points if point.config.update == "none" and point.config.needs_inputs]
    # What does not fit the model fails as a point of its own.
    configs = [config for config in configs if _fits(subject.module, config)]
    if not configs:
        return None
    statistics = collect_statistics(subject.module, batches, configs, forward=subject.forward)
    subject.calibration = {"samples": statistics.samples, "seconds": statistics.seconds}
    subject.notes += [note for note in statistics.notes if note not in subject.notes]
    return statistics


def _fits(module: nn.Module, config: PruningConfig) -> bool:
    try:
        find_weights(module, [block for blocks in find_block_lists(module) for block in blocks], config)
    except ConfigError:
        return False
    return True


def _evaluated(module: nn.Module, data: Data, metrics: Sequence[str]) -> tuple[dict[str, float], float]:
    """The figures and the seconds that they took.

    Raises:
        SparsefitError: If a figure is missing or NaN.
    """
    start = time.perf_counter()
    figures = module.evaluate(data.test_dataloader())
    seconds = time.perf_counter() - start
    for name in metrics:
        if not isinstance(figures, Mapping) or name not in figures:
            given = sorted(figures) if isinstance(figures, Mapping) else type(figures).__name__
            raise ConfigError(f"the module's evaluate gives no {name!r}, which its metrics name, but {given}")
        if math.isnan(figures[name]):
            raise SparsefitError(f"{name} is NaN: the model's outputs are not finite; look at its weights and its data")
    return {name: float(figures[name]) for name in metrics}, seconds


def _zeros(module: nn.Module, masks: MaskSet) -> float:
    """The share of zeros among the prunable weights, counted in the model."""
    matrices = [matrix for _, matrix in masks.matrices_in(module)]
    weights = sum(matrix.numel() for matrix in matrices)
    return 1 - sum(int(torch.count_nonzero(matrix)) for matrix in matrices) / max(1, weights)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those too that a state dict leaves out."""
    return dict(itertools.chain(module.named_parameters(), module.named_buffers()))


@contextmanager
def _restored(module: nn.Module, dense: Mapping[str, Tensor]) -> Iterator[None]:
    """The module as it was, to the bit, whatever happens: weights, buffers, modes and what requires a gradient."""
    modes = {name: part.training for name, part in module.named_modules()}
    trains = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    device = device_of(module)
    try:
        yield
    finally:
        module.to(device)
        module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, tensor in _tensors(module).items():
                tensor.copy_(dense[name])
        for name, part in module.named_modules():
            part.training = modes[name]
        for name, parameter in module.named_parameters():
            parameter.requires_grad = trains[name]
