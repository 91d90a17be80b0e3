"""What a plan is reckoned from, and what it is: plain values."""

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
        limited_by: The setting that says so.
        gpu_hours: The budget; infinity where there is none.
        reserve: Share of the budget that is kept for the end of the run.
        devices: That the run is on.
        splits: Whether they split the weights (FSDP2); else each holds all (DDP).
        state_bytes: Of the hidden states of one calibration sample that are held between two blocks.
        test_tokens: Tokens of a test batch.
        reading: Wall seconds that reading data takes in the stages "setup", "pruning", "evaluation" and "training".
        held: Bytes that the process of the run holds beside the model: libraries, data.
        host: The same on the host, where the run is on a GPU; None where it is on the host.
        removed: Share of the pruned weights' bytes that an undo of the pruning keeps on the host of a GPU.
        taught: Whether the dense model is the teacher.
        val_batches: Batches of a validation in the midst of the training.
        val_every: Optimizer steps between two of them; infinity where there is one at the end alone.
        task_items: Items of the zero-shot tasks that a model is measured by.
        gram: Whether pruning solves for Gram matrices, which several devices share out.
        micro_batch: Calibration samples that go through the model at once.
        control: Whether the dense model is trained by the same recipe afterwards.
    """

    blocks: int
    samples: int
    sample_tokens: int
    test_batches: int
    batches_in_step: int
    batch_tokens: int
    max_steps: int | None
    limited_by: str = "max_steps"
    gpu_hours: float = math.inf
    reserve: float = 0.0
    devices: int = 1
    splits: bool = False
    state_bytes: int = 0
    test_tokens: int = 0
    reading: Mapping[str, float] = field(default_factory=dict)
    held: float = 0.0
    host: float | None = None
    removed: float = 0.5
    taught: bool = False
    val_batches: int = 0
    val_every: float = math.inf
    task_items: int = 0
    gram: bool = False
    micro_batch: int = 8
    control: bool = False


@dataclass(frozen=True)
class Measured:
    """What a miniature run measured.

    Args:
        blocks: Of its model.
        samples: Calibration samples.
        evaluations: Times that the test data are evaluated.
        seconds: Wall seconds: of "pruning" and "reconstruction" in all, of one "evaluation" of a batch, of a batch of
            a "validation", of a zero-shot "task item", of the forward and backward pass of a training "batch", of the
            optimizer's "update", and of "export". A stage that the recipe has not is missing.
        peaks: Most bytes held in the stages "pruning" and "training", beside what was held before there was a model.
        tensors: Bytes of the tensors that are held in these stages, counted one by one: exact where the process's
            memory is not; and of some of them alone: "weights", "gradients", "moments", and the weights of one "block".
        counts: Weights in "all", those that are "pruned", and those that "train".
        disk: Bytes in its run folder.
        task_stages: Times that the zero-shot tasks are measured.
    """

    blocks: int
    samples: int
    evaluations: int
    seconds: Mapping[str, float]
    peaks: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    disk: float = 0.0
    task_stages: int = 0


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
        ends_by: "budget", the setting that limits the steps, or None where nothing ends it.
        gpu_hours: Of all stages.
        least: Bytes of weights, gradients, moments and masks: a device holds at least these.
        peaks: Most bytes that a device holds in the stages "pruning" and "training".
        host: Most bytes that a process holds on the host of its GPU; None where it has none.
        counts: Weights in "all", those that are "pruned", and those that "train".
        disk: Bytes that the run folder will hold.
        tokens: In "calibration", and in all steps of the "training".
        operations: Floating-point operations, by the count of 2 for each weight and token in a forward pass and 4 in a
            backward one.
    """

    stages: list[Stage]
    step: float
    steps: int
    ends_by: str | None
    gpu_hours: float
    least: float
    peaks: dict[str, float]
    host: float | None
    counts: dict[str, float]
    disk: float
    tokens: dict[str, float]
    operations: float
