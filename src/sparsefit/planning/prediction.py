"""From runs of a model with a few blocks and with some more to the whole model and all of its data.

Seconds, bytes and counts of weights grow by the same amount with each block of a model, so two miniature runs give the
line, and its height at the real number of blocks is the prediction. A third one, with twice the calibration samples,
tells what of the pruning grows with the samples from what is once for a block (the solvers of swaps, of updates).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Work:
    """What a recipe has to do.

    Args:
        blocks: Repeated blocks of the model.
        samples: Calibration samples, of `sample_tokens` each.
        sample_tokens: Tokens (or other positions) of a calibration sample.
        test_batches: Batches of the test data, which are evaluated several times.
        batches_in_step: Batches of an optimizer step.
        batch_tokens: Tokens of a training batch.
        max_steps: Optimizer steps after which the recipe ends; None where only the budget does.
        gpu_hours: The budget; infinity where there is none.
        reserve: Share of the budget that is kept for the end of the run.
        devices: That the run is on.
        state_bytes: Of the hidden states of one calibration sample that are held between two blocks.
        test_tokens: Tokens of a test batch.
        reading: Wall seconds that reading data takes in the stages "pruning" and "evaluation".
        held: Bytes that the process of the run holds beside the model: libraries, data.
        control: Whether the dense model is trained by the same recipe afterwards.
    """

    blocks: int
    samples: int
    sample_tokens: int
    test_batches: int
    batches_in_step: int
    batch_tokens: int
    max_steps: int | None
    gpu_hours: float = math.inf
    reserve: float = 0.0
    devices: int = 1
    state_bytes: int = 0
    test_tokens: int = 0
    reading: Mapping[str, float] = field(default_factory=dict)
    held: float = 0.0
    control: bool = False


@dataclass(frozen=True)
class Measured:
    """What a miniature run measured.

    Args:
        blocks: Of its model.
        samples: Calibration samples.
        evaluations: Times that the test data are evaluated.
        seconds: Wall seconds: of "pruning" and "reconstruction" in all, of one "evaluation" of a batch, of the forward
            and backward pass of a training "batch", of the optimizer's "update", and of "export". A stage that the
            recipe has not is missing.
        peaks: Most bytes held in the stages "pruning" and "training", beside what was held before there was a model.
        tensors: Bytes of the tensors that are held then, counted one by one: exact where the process's memory is not.
        counts: Weights in "all", those that are "pruned", and those that "train".
        disk: Bytes in its run folder.
    """

    blocks: int
    samples: int
    evaluations: int
    seconds: Mapping[str, float]
    peaks: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    disk: float = 0.0


@dataclass(frozen=True)
class Stage:
    """A stage of the run: what it does, in words, and its wall seconds."""

    name: str
    what: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        stages: In their order.
        step: Wall seconds of an optimizer step.
        steps: That are taken, by the recipe's limit and by its budget.
        ends_by: "max_steps", "budget", or None where nothing ends it.
        gpu_hours: Of all stages.
        peaks: Most bytes held in the stages "pruning" and "training".
        counts: Weights in "all", those that are "pruned", and those that "train".
        disk: Bytes that the run folder will hold.
        operations: Floating-point operations, by the count of 2 for each weight and token in a forward pass and 4 in a
            backward one.
    """

    stages: list[Stage]
    step: float
    steps: int
    ends_by: str | None
    gpu_hours: float
    peaks: dict[str, float]
    counts: dict[str, float]
    disk: float
    operations: float


def at(blocks: int, one: tuple[int, float], two: tuple[int, float]) -> float:
    """The height at so many blocks of the line through two points; a line that falls is noise, and taken as level.

    >>> at(10, (1, 3.0), (3, 7.0))  # 2 for each block and 1 once
    21.0
    """
    (few, first), (more, second) = one, two
    return second + (blocks - more) * max(second - first, 0.0) / max(more - few, 1)


def predict(work: Work, one: Measured, two: Measured | None = None, more: Measured | None = None) -> Plan:
    """A plan, from a run with a few blocks, one with some more, and one with as many and more calibration samples.

    Args:
        work: What there is to do.
        one: The first run; of the whole model, where that has no blocks to count.
        two: The second; None takes the first for the whole model.
        more: The third; None where the others had all of the calibration samples.
    """

    def line(first: float, second: float) -> float:
        return at(work.blocks, (one.blocks, first), ((two or one).blocks, second))

    def whole(figures: str) -> dict[str, float]:
        first = getattr(one, figures)
        return {key: line(value, getattr(two or one, figures)[key]) for key, value in first.items()}

    seconds = whole("seconds")
    if "pruning" in seconds:
        seconds["pruning"] += _of_further_samples(work, two or one, more)
    if "reconstruction" in seconds:
        seconds["reconstruction"] *= work.samples / one.samples
    read = {stage: work.reading.get(stage, 0.0) for stage in ("pruning", "evaluation")}
    largest, counts, grown = two or one, whole("counts"), whole("tensors")
    # What is measured of a few blocks, and what the tensors of the others add.
    peaks = {
        stage: work.held + peak + grown.get(stage, 0.0) - largest.tensors.get(stage, 0.0)
        for stage, peak in largest.peaks.items()
    }
    if "pruning" in peaks:
        peaks["pruning"] += (work.samples - one.samples) * work.state_bytes
    step = work.batches_in_step * seconds.get("batch", 0.0) + seconds.get("update", 0.0)
    evaluation = work.test_batches * seconds.get("evaluation", 0.0)
    stages = [
        Stage(
            "evaluation",
            f"{one.evaluations} x {work.test_batches} batches",
            one.evaluations * evaluation + read["evaluation"],
        ),
        Stage("calibration and pruning", f"{work.samples} samples", seconds.get("pruning", 0.0) + read["pruning"]),
        Stage("reconstruction", f"{work.samples} samples", seconds.get("reconstruction", 0.0)),
        Stage("export", "model, masks, adapters", seconds.get("export", 0.0)),
    ]
    steps, ends_by = _steps(work, sum(stage.seconds for stage in stages), step)
    tokens = work.batches_in_step * work.batch_tokens
    stages.insert(3, Stage("training", f"{steps} steps of {tokens:,} tokens", steps * step))
    if work.control:
        stages.append(Stage("control", f"{steps} steps, no part of the budget", steps * step + evaluation))
    return Plan(
        stages=[stage for stage in stages if stage.seconds],
        step=step,
        steps=steps,
        ends_by=ends_by,
        gpu_hours=sum(stage.seconds for stage in stages) * work.devices / 3600,
        peaks=peaks,
        counts=counts,
        disk=line(one.disk, (two or one).disk),
        operations=_operations(work, counts.get("all", 0.0), steps),
    )


def _of_further_samples(work: Work, run: Measured, more: Measured | None) -> float:
    """Seconds of pruning for the calibration samples that the miniature runs left out."""
    if more is None or more.samples == run.samples:
        return 0.0
    of_one = (more.seconds["pruning"] - run.seconds["pruning"]) / (more.samples - run.samples) / run.blocks
    return max(of_one, 0.0) * (work.samples - run.samples) * work.blocks


def _steps(work: Work, around: float, step: float) -> tuple[int, str | None]:
    limit, ends_by = (0, None) if work.max_steps is None else (work.max_steps, "max_steps")
    if step == 0 or work.gpu_hours == math.inf:
        return limit, ends_by
    seconds = work.gpu_hours * 3600 / work.devices
    # The end of the run has its own part: what follows training is in `around`, and at least the reserve is kept.
    affordable = max(int((min(seconds - around, seconds * (1 - work.reserve))) / step), 0)
    return (affordable, "budget") if ends_by is None or affordable < limit else (limit, ends_by)


def _operations(work: Work, weights: float, steps: int) -> float:
    passes = 2 * work.samples * work.sample_tokens  # once with the dense blocks, once with the pruned ones
    trained = 3 * steps * work.batches_in_step * work.batch_tokens  # a backward pass costs two forward ones
    return 2 * weights * (passes + trained)
