"""Checks whether a plan fits into memory and disk space, and names the settings to change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sparsefit.planning.device_sharing import bytes_of_a_host
from sparsefit.planning.plan_data import Measured, Plan, Work
from sparsefit.reporting.formats import size

_WAYS = {
    "pruning": "a smaller pruning.micro_batch_size, pruning.states_on_cpu: true (on a GPU) or fewer "
    "data.init_args.calibration_samples",
    "training": "model.init_args.gradient_checkpointing: true, or a smaller data.init_args.batch_size and as many "
    "times larger a trainer.accumulate_grad_batches",
}
_SPLIT = ", or split the weights: trainer.strategy: lightning.pytorch.strategies.ModelParallelStrategy"


@dataclass(frozen=True)
class Room:
    """Available bytes; None if unknown.

    Args:
        device: Memory of a device.
        host: Memory of the host.
        disk: Free disk space in `place`.
        place: The folder that will contain the run folder.
        processes: Processes of the run on one host, which share its memory.
    """

    device: float | None = None
    host: float | None = None
    disk: float | None = None
    place: str = ""
    processes: int = 1


def unfit(plan: Plan, work: Work, room: Room) -> Iterator[str]:
    """Yield a sentence for each resource that does not suffice."""
    sharing = room.processes if plan.host is None else 1  # processes on a CPU share its memory
    for stage, peak in plan.peaks.items():
        if room.device is not None and peak * sharing > room.device:
            whose = f" ({sharing} processes of {size(peak)})" if sharing > 1 else ""
            way = _WAYS[stage] + (_SPLIT if work.devices > 1 and not work.splits else "")
            yield f"{stage} takes {size(peak * sharing)}{whose} of {size(room.device)} memory: set {way}"
    if plan.host is not None and room.host is not None and plan.host * room.processes > room.host:
        yield (
            f"{room.processes} x {size(plan.host)} are held on the host, which has {size(room.host)} memory: set fewer "
            "trainer.devices, or model.init_args.dtype: bfloat16"
        )
    if room.disk is not None and plan.disk > room.disk:
        yield f"the run folder takes {size(plan.disk)}, and {room.place} has {size(room.disk)}: set run.folder"


def blocks_within(free: Room, work: Work, run: Measured) -> float:
    """Number of blocks whose miniature run takes at most half of what is free; infinity if nothing limits it.

    Each block is counted with its part of all bytes of `run`, which is more than it takes: embeddings exist once.

    Args:
        free: Free bytes.
        work: The work of the recipe.
        run: A miniature run with fewer blocks.
    """
    host = bytes_of_a_host(work, run.counts, run.tensors)
    taken = {
        "device": max(run.peaks.values(), default=0.0),
        "host": 0.0 if host is None else host - (work.host or 0.0),
        "disk": run.disk,
    }
    room = {name: getattr(free, name) for name in taken}
    fits = [room[name] / 2 / taken[name] for name in taken if taken[name] > 0 and room[name] is not None]
    return math.floor(run.blocks * min(fits)) if fits else math.inf
