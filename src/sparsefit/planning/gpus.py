"""Estimates what a run takes on a GPU that is not available, from operation counts and data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsefit.errors import ConfigError
from sparsefit.planning.device_sharing import calibration_bytes, own_samples
from sparsefit.planning.plan_data import Measured, Work

REACHED = 0.3
"""Assumed share of the peak performance. One pruning of LLaMA-7B's shapes in block order, two passes of 128 x 2,048
tokens with 6.8e15 operations, took 24.0 s on an H100: 0.29 of its peak. Training was not measured."""

KEPT = 17
"""Elements that a block keeps for a backward pass, per token and hidden unit: the 34 bytes in half precision of
Korthikanti et al. 2022 (arXiv 2205.05198, equation 2 without the attention matrix). With gradient checkpointing each
block keeps one, and one block at a time all of them."""


@dataclass(frozen=True)
class GPU:
    """A GPU by its data sheet: dense bfloat16 operations per second, and bytes of memory."""

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
    """The properties of a decoder that determine its memory.

    Args:
        hidden: Size of the hidden states.
        vocabulary: Size of the vocabulary.
        weight_bytes: Bytes per weight.
        activation_bytes: Bytes per element of activations and logits: 2 with half-precision weights or autocast.
        checkpointing: Whether gradient checkpointing is used.
        taught: Whether the dense model is the teacher.
    """

    hidden: int
    vocabulary: int
    weight_bytes: int
    activation_bytes: int = 2
    checkpointing: bool = False
    taught: bool = False


def gpu_called(name: str) -> GPU:
    """The GPU with a name.

    Raises:
        ConfigError: if the name is unknown; lists the known ones.
    """
    if name.lower() not in GPUS:
        raise ConfigError(f"there is no data sheet of a GPU called {name!r}: use one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def estimated(
    work: Work, counts: Mapping[str, float], shape: Shape, gpu: GPU, passes: int, evaluations: int
) -> Measured:
    """Estimate the measurements on a GPU at `REACHED` of its peak performance, without solvers and files.

    Args:
        work: The work of the recipe.
        counts: Numbers of weights as in `Measured`, of the whole model.
        shape: The shape of the model.
        gpu: The GPU.
        passes: Passes of blockwise reconstruction.
        evaluations: Number of evaluations on the test data.
    """
    forward = 2 * counts["all"] / (gpu.operations * REACHED)  # seconds for a token
    samples = work.samples * work.sample_tokens
    seconds = {
        "pruning": work.forwards * forward * own_samples(work) * work.sample_tokens,
        "evaluation": forward * work.test_tokens,
        "validation": forward * work.test_tokens,
        "batch": (3 + shape.taught) * forward * work.batch_tokens,
    }
    if passes:
        seconds["reconstruction"] = (3 * passes + 2) * forward * samples
    weights, trained = counts["all"] * shape.weight_bytes, counts["train"] * shape.weight_bytes
    tensors = {"weights": weights, "gradients": trained, "moments": 2 * trained, "block": weights / work.blocks}
    if work.gradients:
        tensors["backward"] = backward_bytes(counts, shape, work.blocks, work.sample_tokens)
    # Masks are kept in host memory.
    peaks = {"pruning": weights + calibration_bytes(work, work.samples, tensors.get("backward", 0.0))}
    if work.batch_tokens:
        held = sum(tensors[key] for key in ("weights", "gradients", "moments"))
        peaks["training"] = held + beside_weights(counts, shape, work.blocks, work.batch_tokens)
    return Measured(work.blocks, work.samples, evaluations, seconds, peaks, tensors, counts)


def beside_weights(counts: Mapping[str, float], shape: Shape, blocks: int, tokens: int) -> float:
    """Bytes that training needs in addition to weights, gradients and moments: the teacher's removed weights,
    activations, and logits with a float32 copy and its gradient."""
    removed = counts["pruned"] / 2 * shape.weight_bytes if shape.taught else 0
    states = KEPT * blocks if not shape.checkpointing else blocks + KEPT
    logits = tokens * shape.vocabulary * (shape.activation_bytes + 2 * 4) * (2 if shape.taught else 1)
    return removed + _activations(shape, states, tokens) + logits


def backward_bytes(counts: Mapping[str, float], shape: Shape, blocks: int, tokens: int) -> float:
    """Bytes that the gradients of one calibration sample need in addition to the weights: a byte for each weight that
    may be removed, activations, and logits with a float32 copy, its log-probabilities and the gradients of both."""
    logits = tokens * shape.vocabulary * (shape.activation_bytes + 4 * 4)
    return counts["pruned"] + _activations(shape, KEPT * blocks, tokens) + logits


def _activations(shape: Shape, elements: int, tokens: int) -> float:
    """Bytes of activations with so many elements per token and hidden unit."""
    return float(shape.activation_bytes * elements * tokens * shape.hidden)
