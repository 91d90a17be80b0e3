"""What a run takes on a GPU that is not here, from its arithmetic alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsefit.errors import ConfigError
from sparsefit.planning.device_sharing import own_samples
from sparsefit.planning.plan_data import Measured, Work

REACHED = 0.3
"""Share of the peak that is reckoned with. One pruning of LLaMA-7B's shapes in block order, two passes of 128 x 2,048
tokens with 6.8e15 operations, took 24.0 s on an H100: 0.29 of its peak. Training was not measured."""


@dataclass(frozen=True)
class GPU:
    """By its maker's data sheet: dense bfloat16 operations a second, and bytes of memory."""

    operations: float
    memory: float


GPUS = {
    "a100-40gb": GPU(312e12, 40e9),
    "a100-80gb": GPU(312e12, 80e9),
    "h100": GPU(989e12, 80e9),
    "h200": GPU(989e12, 141e9),
    "l40s": GPU(362e12, 48e9),
    "rtx-4090": GPU(165e12, 24e9),
}


@dataclass(frozen=True)
class Shape:
    """Of a decoder: what its memory follows from.

    Args:
        hidden: Width of the states between two blocks.
        vocabulary: Columns of the logits.
        weight_bytes: Of a weight.
        checkpointing: Whether activations are computed twice.
        taught: Whether the dense model is the teacher.
    """

    hidden: int
    vocabulary: int
    weight_bytes: int
    checkpointing: bool = False
    taught: bool = False


def gpu_called(name: str) -> GPU:
    """The GPU of a name.

    Raises:
        ConfigError: if it is not known; names those that are.
    """
    if name.lower() not in GPUS:
        raise ConfigError(f"there is no data sheet of a GPU called {name!r}: use one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def estimated(
    work: Work, counts: Mapping[str, float], shape: Shape, gpu: GPU, passes: int, evaluations: int
) -> Measured:
    """What would be measured on a GPU that reaches `REACHED` of its peak; solvers and files are not in it.

    Args:
        work: What there is to do.
        counts: As those of `Measured`, of the whole model.
        shape: Of the model.
        gpu: The GPU.
        passes: Of blockwise reconstruction.
        evaluations: Times that the test data are evaluated.
    """
    forward = 2 * counts["all"] / (gpu.operations * REACHED)  # seconds for a token
    samples = work.samples * work.sample_tokens
    seconds = {
        "pruning": 2 * forward * own_samples(work) * work.sample_tokens,
        "evaluation": forward * work.test_tokens,
        "validation": forward * work.test_tokens,
        "batch": (3 + shape.taught) * forward * work.batch_tokens,
    }
    if passes:
        seconds["reconstruction"] = (3 * passes + 2) * forward * samples
    weights, trained = counts["all"] * shape.weight_bytes, counts["train"] * shape.weight_bytes
    tensors = {"weights": weights, "gradients": trained, "moments": counts["train"] * 8, "block": weights / work.blocks}
    # Masks are in the host's memory.
    peaks = {
        "pruning": weights + work.samples * work.state_bytes,
        "training": sum(tensors[key] for key in ("weights", "gradients", "moments"))
        + beside_weights(counts, shape, work.blocks, work.batch_tokens),
    }
    return Measured(work.blocks, work.samples, evaluations, seconds, peaks, tensors, counts)


def beside_weights(counts: Mapping[str, float], shape: Shape, blocks: int, tokens: int) -> float:
    """Bytes that training holds beside weights, gradients and moments: the teacher's removed weights, logits, and
    activations: 34 bytes for each token and hidden unit of a block in half precision (Korthikanti et al. 2022,
    arXiv 2205.05198, equation 2 without the attention matrix); with checkpointing 2, and those of one block."""
    removed = counts["pruned"] / 2 * shape.weight_bytes if shape.taught else 0
    states = 34 * blocks if not shape.checkpointing else 2 * blocks + 34
    logits = tokens * shape.vocabulary * (2 + 4 + 4) * (2 if shape.taught else 1)
    return removed + states * tokens * shape.hidden + logits
