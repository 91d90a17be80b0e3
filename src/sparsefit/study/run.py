"""Runs a study: calibrates the dense model for each seed, then prunes, evaluates and fine-tunes it for each point."""

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

from sparsefit.calibration.batches import device_of
from sparsefit.calibration.samples import split_samples, tensors_in
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
from sparsefit.pruning.input_watch import evaluating
from sparsefit.pruning.targets import find_weights
from sparsefit.study.grid import Point
from sparsefit.study.results import Results


class Data(Protocol):
    """The data of a study: batches that can be passed to the module directly, the same in each iteration."""

    def calibration_dataloader(self, seed: int) -> Iterable[Any]:
        """Calibration batches, with different samples for each seed."""

    def test_dataloader(self) -> Iterable[Any]:
        """Batches for evaluation."""


@dataclass
class Subject:
    """A dense model under study. Its dense weights are restored after each point.

    Args:
        name: The name of the model in the study.
        module: A module with `evaluate(batches)`, which returns metrics by name.
        forward: Runs the module on a calibration batch.
        finetune: Trains a pruned module with fixed masks; called with module, masks and seed.
        finetunes: Whether a point is fine-tuned.
        epochs: Epochs of fine-tuning, for the results.
        seed: The first seed of calibrations and of fine-tunings.
        calibration_seeds: Number of seeds for drawing calibration samples: `seed` and the integers after it.
        training_seeds: Number of seeds for fine-tuning, starting from the pruning with the first calibration seed.

    Attributes:
        notes: What differs from the request, and why.
        left_dense: Matrices that are not pruned, and why.
        calibration: Samples of one calibration and seconds of all of them; None before the first.
        prunable: Number of weights in the pruned matrices; 0 before the first pruning.
    """

    name: str
    module: nn.Module
    forward: Callable[[Any], Any]
    finetune: Callable[[nn.Module, MaskSet, int], None] | None = None
    finetunes: Callable[[Point], bool] = lambda point: True
    epochs: int = 0
    seed: int = 0
    calibration_seeds: int = 1
    training_seeds: int = 1
    notes: list[str] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    prunable: int = 0

    def keys(self, point: Point, seed: int) -> list[dict[str, Any]]:
        """The keys of a point's rows: pruned with a calibration seed, and fine-tuned with each training seed.

        A pruning without calibration data is the same for all calibration seeds, so its key has none.
        """
        calibrated = seed if point.config.needs_inputs else ""
        whole = {"model": self.name, **point.key, "calibration_seed": calibrated}
        keys = [{**whole, "stage": "pruned", "epochs": 0, "training_seed": ""}]
        if seed == self.seed and self.finetune is not None and self.finetunes(point):
            seeds = range(self.seed, self.seed + self.training_seeds)
            keys += [{**whole, "stage": "finetuned", "epochs": self.epochs, "training_seed": s} for s in seeds]
        return keys

    def runs(self, points: Iterable[Point]) -> Iterator[tuple[int, list[Point]]]:
        """Yield each calibration seed and the points that are pruned with it."""
        for seed in range(self.seed, self.seed + self.calibration_seeds):
            yield seed, [point for point in points if seed == self.seed or point.config.needs_inputs]


def study(
    subject: Subject,
    data: Data,
    points: Sequence[Point],
    results: Results,
    done: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> None:
    """Measure every point of a model that is missing in the results.

    For each calibration seed, statistics of the dense network are collected once for all points with update "none";
    other points need passes of their own. If a point fails, the error is recorded and the study continues; a resumed
    study tries the point again.

    Args:
        subject: The model.
        data: Calibration and test data.
        points: The grid.
        results: The table to which each row is added as soon as it is measured.
        done: Called with each new row.

    Raises:
        SparsefitError: If the dense model cannot be evaluated or calibrated on, or two seeds give the same calibration
            samples; the results so far are kept.
    """
    keys = {seed: [subject.keys(point, seed) for point in asked] for seed, asked in subject.runs(points)}
    results.adopt(itertools.chain.from_iterable(keys[subject.seed]))
    results.forget(subject.name, [key for of_seed in keys.values() for of_point in of_seed for key in of_point])

    def add(row: Mapping[str, Any]) -> None:
        done(results.add(row))

    drawn: dict[int, list[Tensor]] = {}
    for seed, asked in subject.runs(points):
        missing = [p for p in asked if any(results.find(**key) is None for key in subject.keys(p, seed))]
        batches = _calibration(subject, data, missing, seed)
        _check_drawn(drawn, seed, batches)
        if results.find(model=subject.name, stage="dense") is None:
            figures, seconds = _evaluated(subject.module, data, results.metrics)
            add({"model": subject.name, "stage": "dense", "sparsity": 0.0, **figures, "evaluation_seconds": seconds})
        if not missing:
            continue
        statistics = _calibrated(subject, batches, missing)
        del batches
        dense = _copy(subject.module)
        for point in missing:
            with _restored(subject.module, dense):
                for row in _measured(subject, data, point, seed, statistics, results):
                    add(row)


def _measured(
    subject: Subject, data: Data, point: Point, seed: int, statistics: DenseStatistics | None, results: Results
) -> Iterator[dict[str, Any]]:
    """Yield the missing rows of a point: pruned, then fine-tuned with each seed."""
    key, *tuned = subject.keys(point, seed)
    try:
        result, row = _pruned(subject, data, point, seed, statistics)
        if results.find(**key) is None:
            figures, seconds = _evaluated(subject.module, data, results.metrics)
            yield {**key, **row, **figures, "evaluation_seconds": seconds}
        tuned = [key for key in tuned if results.find(**key) is None]
        pruned = _copy(subject.module) if tuned else {}
        for key in tuned:
            with _restored(subject.module, pruned):
                start = time.perf_counter()
                subject.finetune(subject.module, result.masks, key["training_seed"])
                row |= {"finetuning_seconds": time.perf_counter() - start}
                row |= {"counted": _zeros(subject.module, result.masks), "selection_seconds": None}
                figures, seconds = _evaluated(subject.module, data, results.metrics)
                yield {**key, **row, **figures, "evaluation_seconds": seconds}
    except Exception as error:  # after any error, the study continues with the next point
        told = f"{type(error).__name__}: {error}"
        yield {**key, "error": " ".join(told.split())}


def _pruned(
    subject: Subject, data: Data, point: Point, seed: int, statistics: DenseStatistics | None
) -> tuple[PruningResult, dict[str, Any]]:
    """Prune the model; returns the result and the entries of its row."""
    config, module = point.config, subject.module
    if config.takes_statistics and statistics is not None:
        result = prune_from_statistics(module, statistics, config)
    else:
        batches = data.calibration_dataloader(seed) if config.needs_inputs else None
        result = prune(module, batches, config, forward=subject.forward)
    result.masks.verify(module)
    subject.left_dense |= result.left_dense
    subject.prunable = sum(weights for weights, _ in result.masks.counts().values())
    subject.notes += [f"{point}: {note}" for note in result.notes if f"{point}: {note}" not in subject.notes]
    row = {"counted": _zeros(module, result.masks), "digest": result.masks.digest(), "used_update": result.update}
    return result, row | {"selection_seconds": result.seconds}


def _calibration(subject: Subject, data: Data, points: Iterable[Point], seed: int) -> list[Any]:
    """The calibration batches, if points need any. One sample is run through the model to find errors early.

    Raises:
        CalibrationError: if there are no batches.
    """
    if not any(point.config.needs_inputs for point in points):
        return []
    batches = list(data.calibration_dataloader(seed))
    if not batches:
        raise CalibrationError("the study needs calibration data and there is none: calibration_dataloader() is empty")
    samples = split_samples(batches[0])
    with torch.no_grad(), evaluating(subject.module):
        subject.forward(samples[0] if samples else batches[0])
    return batches


def _check_drawn(drawn: dict[int, list[Tensor]], seed: int, batches: Sequence[Any]) -> None:
    """Check that the first batch of a seed differs from those in `drawn`, and add it there."""
    if not batches:
        return
    first = list(tensors_in(batches[0]))
    for other, before in drawn.items():
        if len(before) == len(first) and all(map(torch.equal, before, first)):
            raise CalibrationError(
                f"calibration_dataloader() gives the same samples for the seeds {other} and {seed}, so their spread "
                "would tell nothing: draw them with `hparams.seed` of the datamodule or with torch's global random "
                "numbers, or calibrate with one seed (study.calibration_seeds)"
            )
    drawn[seed] = first


def _calibrated(subject: Subject, batches: list[Any], points: Iterable[Point]) -> DenseStatistics | None:
    """The statistics of the dense network for the points that need them; None if none does."""
    configs = [point.config for point in points if point.config.takes_statistics and point.config.needs_inputs]
    # A point that does not fit the model fails later, with its own error.
    configs = [config for config in configs if _fits(subject.module, config)]
    if not configs:
        return None
    statistics = collect_statistics(subject.module, batches, configs, forward=subject.forward)
    before = 0.0 if subject.calibration is None else subject.calibration["seconds"]
    subject.calibration = {"samples": statistics.samples, "seconds": before + statistics.seconds}
    subject.notes += [note for note in statistics.notes if note not in subject.notes]
    return statistics


def _fits(module: nn.Module, config: PruningConfig) -> bool:
    try:
        find_weights(module, [block for blocks in find_block_lists(module) for block in blocks], config)
    except ConfigError:
        return False
    return True


def _evaluated(module: nn.Module, data: Data, metrics: Sequence[str]) -> tuple[dict[str, float], float]:
    """Evaluate the module; returns the metrics and the wall seconds.

    Raises:
        SparsefitError: If a metric is missing or NaN.
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
    """The share of zeros in the pruned matrices, counted in the model."""
    matrices = [matrix for _, matrix in masks.matrices_in(module)]
    weights = sum(matrix.numel() for matrix in matrices)
    return 1 - sum(int(torch.count_nonzero(matrix)) for matrix in matrices) / max(1, weights)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, including non-persistent buffers."""
    return dict(itertools.chain(module.named_parameters(), module.named_buffers()))


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(module).items()}


@contextmanager
def _restored(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Restore a module bitwise at the end: weights and buffers from `state`, device, training modes and
    `requires_grad`."""
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
                tensor.copy_(state[name])
        for name, part in module.named_modules():
            part.training = modes[name]
        for name, parameter in module.named_parameters():
            parameter.requires_grad = trains[name]
