"""What several devices share out, by arithmetic alone: no miniature run is on more than one.

They deal out the calibration data in micro-batches, and the solving for Gram matrices. Evaluations and a batch of the
training take each of them as long as one alone. What they tell each other (gradients, weights) is not in any figure of
seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from sparsefit.planning.plan_data import Work


def own_samples(work: Work) -> int:
    """Calibration samples of the device that has most; with fewer micro-batches than devices, each takes all."""
    batches = math.ceil(work.samples / work.micro_batch)
    if batches < work.devices:
        return work.samples
    return min(math.ceil(batches / work.devices) * work.micro_batch, work.samples)


def bytes_of_a_device(work: Work, peaks: Mapping[str, float], tensors: Mapping[str, float]) -> dict[str, float]:
    """Most bytes that each device holds in the stages "pruning" and "training".

    Under DDP it holds all that one would, and the gradients a second time, in the buckets in which they are sent. With
    weights split (FSDP2) it holds its part of weights, gradients and moments, and one block as a whole.

    Args:
        work: What there is to do.
        peaks: Of a run on one device.
        tensors: As those of `Measured`, of the whole model.
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
    """Bytes of the weights, gradients and moments on each device, and of the masks, which are whole everywhere."""
    held = sum(tensors.get(key, 0.0) for key in ("weights", "gradients", "moments"))
    return held / (work.devices if work.splits else 1) + counts.get("pruned", 0.0) / 8


def bytes_of_a_host(work: Work, counts: Mapping[str, float], tensors: Mapping[str, float]) -> float | None:
    """Most bytes that each process holds on the host of its GPU: the model as it is read, masks of one bit a weight,
    the removed weights for as long as pruning may be undone, and a teacher's copy until then; None without a GPU."""
    if work.host is None:
        return None
    weights = tensors.get("weights", 0.0)
    pruned = counts.get("pruned", 0.0) * weights / max(counts.get("all", 0.0), 1.0)
    kept = counts.get("pruned", 0.0) / 8 + work.removed * pruned + work.taught * weights
    return work.host + max(weights, kept)
