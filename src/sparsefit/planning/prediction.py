"""Extrapolates from miniature runs, on models with few blocks, to the whole model and all of its data.

Seconds, bytes and numbers of weights grow linearly with the number of blocks, so two miniature runs define a line that
is evaluated at the real number of blocks. A third run, with twice the calibration samples, separates the pruning time
that grows with the samples from the fixed time per block (the solvers of swaps and updates).
"""

from __future__ import annotations

import math

from sparsefit.planning.device_sharing import (
    bytes_of_a_device,
    bytes_of_a_host,
    calibration_bytes,
    least_bytes,
    own_samples,
)
from sparsefit.planning.plan_data import Measured, Plan, Stage, Work

GROWN = 0.1
"""Share by which the memory of a CPU process grows in a long training, because small long-lived objects fragment the
heap. In the quickstart, growth of 0.10 to 0.19 was measured after the first three steps, most of it after the first
fifty. GPU memory is counted by tensors, and does not grow."""


def at(blocks: int, one: tuple[int, float], two: tuple[int, float]) -> float:
    """The value at `blocks` of the line through two points (blocks, value). A falling line is noise and taken as flat.

    >>> at(10, (1, 3.0), (3, 7.0))  # 2 for each block and 1 once
    21.0
    """
    (few, first), (more, second) = one, two
    return second + (blocks - more) * max(second - first, 0.0) / max(more - few, 1)


def predict(work: Work, one: Measured, two: Measured | None = None, more: Measured | None = None) -> Plan:
    """Predict a run from two miniature runs that differ in blocks, and one with more calibration samples.

    Args:
        work: The work of the recipe.
        one: The run with the fewest blocks; if the model has no blocks, a run of the whole model.
        two: A run with more blocks; None if `one` is of the whole model.
        more: A run with the blocks of `two` and more calibration samples; None if the first runs had all samples.
    """
    largest = two or one

    def line(first: float, second: float) -> float:
        return at(work.blocks, (one.blocks, first), (largest.blocks, second))

    def whole(figures: str) -> dict[str, float]:
        return {key: line(value, getattr(largest, figures)[key]) for key, value in getattr(one, figures).items()}

    seconds, counts, tensors = whole("seconds"), whole("counts"), whole("tensors")
    if "pruning" in seconds:
        seconds["pruning"] = _pruning(work, seconds["pruning"], largest, more)
    if "reconstruction" in seconds:
        seconds["reconstruction"] *= own_samples(work) / one.samples
    # The peak measured with few blocks, plus the tensors of the remaining blocks.
    peaks = {
        stage: work.held + peak + tensors.get(stage, 0.0) - largest.tensors.get(stage, 0.0)
        for stage, peak in largest.peaks.items()
    }
    if "pruning" in peaks:
        peaks["pruning"] += calibration_bytes(work, own_samples(work), tensors.get("backward", 0.0))
        peaks["pruning"] -= calibration_bytes(work, largest.samples, largest.tensors.get("backward", 0.0))
    if "training" in peaks and work.host is None:
        peaks["training"] *= 1 + GROWN
    step = work.batches_in_step * seconds.get("batch", 0.0) + seconds.get("update", 0.0)
    stages = _around_training(work, one, seconds)
    around = sum(stage.seconds for stage in stages)
    validation = work.val_batches * seconds.get("validation", 0.0)
    steps, ends_by = _steps(work, around, step, validation)
    stages[-1:-1] = _of_training(work, steps, step, validation)
    if work.control:
        stages.append(_control(work, steps, seconds, validation))
    tokens = work.batches_in_step * work.batch_tokens * work.devices
    return Plan(
        stages=[stage for stage in stages if stage.seconds],
        step=step,
        steps=steps,
        ends_by=ends_by,
        gpu_hours=sum(stage.seconds for stage in stages) * work.devices / 3600,
        least=least_bytes(work, counts, tensors),
        peaks=bytes_of_a_device(work, peaks, tensors),
        host=bytes_of_a_host(work, counts, tensors),
        counts=counts,
        disk=line(one.disk, largest.disk),
        tokens={"calibration": work.samples * work.sample_tokens, "training": steps * tokens},
        operations=_operations(work, counts.get("all", 0.0), steps * tokens),
    )


def _pruning(work: Work, seconds: float, run: Measured, more: Measured | None) -> float:
    """Seconds of pruning with all calibration samples; the time of solvers is divided by the number of devices."""
    if more is None or more.samples == run.samples:
        of_one = 0.0
    else:
        of_one = max(more.seconds["pruning"] - run.seconds["pruning"], 0.0) / (more.samples - run.samples) / run.blocks
    by_samples = of_one * run.samples * work.blocks
    shared = max(seconds - by_samples, 0.0) / (work.devices if work.gram and more is not None else 1)
    return shared + of_one * own_samples(work) * work.blocks


def _around_training(work: Work, run: Measured, seconds: dict[str, float]) -> list[Stage]:
    """All stages except training and validation; the last one is the export."""
    read = {stage: work.reading.get(stage, 0.0) for stage in ("setup", "pruning", "evaluation")}
    evaluation = run.evaluations * work.test_batches * seconds.get("evaluation", 0.0)
    tasks = run.task_stages * work.task_items * seconds.get("task item", 0.0)
    return [
        Stage("setup", "data", read["setup"]),
        Stage("evaluation", f"{run.evaluations} x {work.test_batches} batches", evaluation + read["evaluation"]),
        Stage("zero-shot tasks", f"{run.task_stages} x {work.task_items} items", tasks),
        Stage("calibration and pruning", f"{work.samples} samples", seconds.get("pruning", 0.0) + read["pruning"]),
        Stage("reconstruction", f"{work.samples} samples", seconds.get("reconstruction", 0.0)),
        Stage("export", "model, masks, adapters", seconds.get("export", 0.0)),
    ]


def _of_training(work: Work, steps: int, step: float, validation: float) -> list[Stage]:
    tokens, times = work.batches_in_step * work.batch_tokens * work.devices, _validations(work, steps)
    reading = work.reading.get("training", 0.0) if steps else 0.0
    what = "tokens" if work.sample_tokens > 1 else "samples"
    return [
        Stage("training", f"{steps} steps of {tokens:,} {what}", steps * step + reading),
        Stage("validation", f"{times} x {work.val_batches} batches", times * validation),
    ]


def _validations(work: Work, steps: int) -> int:
    """Number of validations, including the one that Lightning runs when training stops."""
    return (math.floor(steps / work.val_every) + 1) * bool(work.val_batches) if steps else 0


def _control(work: Work, steps: int, seconds: dict[str, float], validation: float) -> Stage:
    """The control: the same steps of the dense model without a teacher, whose pass takes a quarter of a batch."""
    batch = seconds.get("batch", 0.0) * (3 / 4 if work.taught else 1)
    training = steps * (work.batches_in_step * batch + seconds.get("update", 0.0))
    closing = work.test_batches * seconds.get("evaluation", 0.0) + _validations(work, steps) * validation
    return Stage("control", f"{steps} steps, no part of the budget", training + closing)


def _steps(work: Work, around: float, step: float, validation: float) -> tuple[int, str | None]:
    limit, ends_by = (0, None) if work.max_steps is None else (work.max_steps, work.limited_by)
    if step == 0 or work.gpu_hours == math.inf:
        return limit, ends_by
    seconds = work.gpu_hours * 3600 / work.devices
    # `around` includes what follows training, for which at least the reserve is kept.
    left = min(seconds - around, seconds * (1 - work.reserve)) - validation - work.reading.get("training", 0.0)
    affordable = max(int(left / (step + validation / work.val_every)), 0)
    return (affordable, "budget") if ends_by is None or affordable < limit else (limit, ends_by)


def _operations(work: Work, weights: float, trained: float) -> float:
    calibrated = work.forwards * work.samples * work.sample_tokens
    return 2 * weights * (calibrated + 3 * trained)  # a backward pass costs two forward ones
