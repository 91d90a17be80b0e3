"""Converts measurements on one device to several devices, by arithmetic: miniature runs use only one device.

Devices divide the micro-batches of calibration data and the solving with Gram matrices. Evaluations and training
batches take as long as on one device. Communication (gradients, weights) is not included in the seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from sparsefit.planning.plan_data import Work


def own_samples(work: Work) -> int:
    """The largest number of calibration samples on a device; with fewer micro-batches than devices, each has all."""
    batches = math.ceil(work.samples / work.micro_batch)
    if batches < work.devices:
        return work.samples
    return min(math.ceil(batches / work.devices) * work.micro_batch, work.samples)


def calibration_bytes(work: Work, samples: int, backward: float) -> float:
    """Bytes that calibration needs on a device in addition to the weights: its samples' hidden states between two
    blocks or, if they are more, those of a backward pass of one sample, which are freed before.

    Args:
        work: The work of the recipe.
        samples: Calibration samples of the device.
        backward: Bytes of a backward pass of one sample; 0 if the pruning takes no gradients.
    """
    return max(0.0 if work.states_on_host else float(samples * work.state_bytes), backward)


def bytes_of_a_device(work: Work, peaks: Mapping[str, float], tensors: Mapping[str, float]) -> dict[str, float]:
    """Peak bytes of each device in the stages "pruning" and "training".

    Under DDP a device holds the same as a single device, and a second copy of the gradients in communication buckets.
    With FSDP2 it holds its shards of weights, gradients and moments, and one whole block.

    Args:
        work: The work of the recipe.
        peaks: Peak bytes of a run on one device.
        tensors: Bytes as in `Measured`, of the whole model.
    """
    if work.devices == 1:
        return dict(peaks)
    held = {key: tensors.get(key, 0.0) for key in ("weights", "gradients", "moments", "block")}
    if not work.splits:
        return {stage: peak + held["gradients"] * (stage == "training") for stage, peak in peaks.items()}
    elsewhere = 1 - 1 / work.devices
    saved = {
        "pruning": elsewhere * held["weights"] - held["block"],
        "training": elsewhere * (held["weights"] + held["gradients"] + held["moments"]) - 2 * held["block"],
    }
    return {stage: peak - max(saved[stage], 0.0) for stage, peak in peaks.items()}


def least_bytes(work: Work, counts: Mapping[str, float], tensors: Mapping[str, float]) -> float:
    """Bytes of weights, gradients and moments on each device, and of the masks, which are not sharded."""
    held = sum(tensors.get(key, 0.0) for key in ("weights", "gradients", "moments"))
    return held / (work.devices if work.splits else 1) + counts.get("pruned", 0.0) / 8


def bytes_of_a_host(work: Work, counts: Mapping[str, float], tensors: Mapping[str, float]) -> float | None:
    """Peak bytes of each process on the host of its GPU; None without a GPU. Counts the model while it is read, masks
    of one bit per weight, and, until pruning is final, the removed weights, a teacher's copy and hidden states."""
    if work.host is None:
        return None
    weights = tensors.get("weights", 0.0)
    pruned = counts.get("pruned", 0.0) * weights / max(counts.get("all", 0.0), 1.0)
    kept = counts.get("pruned", 0.0) / 8 + work.removed * pruned + work.taught * weights
    states = own_samples(work) * work.state_bytes if work.states_on_host else 0
    return work.host + max(weights, kept + states)
