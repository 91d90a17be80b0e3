"""The inputs and the result of a plan: plain dataclasses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Work:
    """The amount of work in a recipe.

    Args:
        blocks: Repeated blocks of the model.
        samples: Calibration samples, of `sample_tokens` each.
        sample_tokens: Tokens (or other positions) per calibration sample.
        test_batches: Batches of the test data, which are evaluated several times.
        batches_in_step: Batches per optimizer step.
        batch_tokens: Tokens per training batch.
        max_steps: Optimizer steps after which the recipe ends; None if only the budget ends it.
        limited_by: The setting that determines `max_steps`.
        gpu_hours: The budget; infinity if there is none.
        reserve: Share of the budget that is kept for the end of the run.
        devices: Number of devices of the run.
        splits: Whether weights are sharded over devices (FSDP2); otherwise each device holds all weights (DDP).
        state_bytes: Bytes of the hidden states of one calibration sample that are kept between two blocks.
        test_tokens: Tokens per test batch.
        reading: Wall seconds that reading data takes in the stages "setup", "pruning", "evaluation" and "training".
        held: Bytes that the process of the run holds in addition to the model: libraries, data.
        host: These bytes on the host, if the run is on a GPU; None if it is on the CPU.
        removed: Share of the pruned weights' bytes that is kept on the host of a GPU to undo the pruning.
        taught: Whether the dense model is the teacher.
        val_batches: Batches of a validation during training.
        val_every: Optimizer steps between two validations; infinity if there is only one, at the end.
        task_items: Items of the zero-shot tasks that a model is evaluated on.
        gram: Whether pruning solves with Gram matrices, which several devices divide among them.
        micro_batch: Calibration samples that go through the model at once.
        control: Whether the dense model is trained by the same recipe afterwards.
        states_on_host: Whether hidden states are kept on the host of a GPU.
        forwards: Forward passes of the calibration samples in the pruning; a backward pass counts as two.
        gradients: Whether the pruning takes gradients of calibration samples.
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
    states_on_host: bool = False
    forwards: int = 2
    gradients: bool = False


@dataclass(frozen=True)
class Measured:
    """The measurements of a miniature run.

    Args:
        blocks: Blocks of its model.
        samples: Calibration samples.
        evaluations: Number of evaluations on the test data.
        seconds: Wall seconds: in total for "pruning", "reconstruction" and "export"; per batch for "evaluation",
            "validation" and "batch" (forward and backward pass of a training batch); per zero-shot "task item"; per
            "update" of the optimizer. Stages that the recipe does not have are missing.
        peaks: Peak bytes in the stages "pruning" and "training", without what was held before the model was loaded.
        tensors: Bytes of the tensors held in these stages, counted one by one, which is exact, unlike the memory of
            the process; of "weights", "gradients", "moments", and the weights of one "block"; and, if the pruning takes
            gradients, what the "backward" pass of one calibration sample needs in addition to the weights.
        counts: Number of weights: "all", "pruned", and "train" for those that train.
        disk: Bytes in its run folder.
        task_stages: Number of evaluations on the zero-shot tasks.
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
    """A stage of the run, a description of its work, and its wall seconds."""

    name: str
    what: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The prediction for a run.

    Attributes:
        stages: The stages in execution order.
        step: Wall seconds per optimizer step.
        steps: Optimizer steps that will be taken.
        ends_by: "budget", the setting that limits the steps, or None if nothing ends training.
        gpu_hours: GPU-hours of all stages.
        least: Bytes of weights, gradients, moments and masks, the minimum that a device holds.
        peaks: Peak bytes on a device in the stages "pruning" and "training".
        host: Peak bytes of a process on the host of its GPU; None without a GPU.
        counts: Number of weights: "all", "pruned", and "train" for those that train.
        disk: Bytes in the run folder at the end.
        tokens: Tokens in "calibration", and in all steps of "training".
        operations: Floating-point operations, counted as 2 per weight and token in a forward pass and 4 in a backward
            pass.
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
