"""Estimates the cost of each stage of a run on 1 to 1,024 GPUs. Nothing is measured here.

    python scripts/scaling_estimate.py

Prints a table for LLaMA-7B (data parallel, each rank holds the model) and one for LLaMA-70B (sharded): seconds of each
stage, and the GPU-hours of the whole run. The constants below are the assumptions; docs/scaling.md has the conclusions.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from sparsefit.planning.gpus import GPUS, REACHED
from sparsefit.ranks import shared_out

RANKS = (1, 2, 8, 64, 256, 1024)
WITHIN_NODE, BETWEEN_NODES = 300e9, 25e9  # bytes a second that one GPU sends, in a node of 8 and beyond it
LATENCY = 30e-6  # seconds for each doubling of the ranks that take part in a collective
SHARED_FOLDER, DISK = 10e9, 1e9  # bytes a second that all ranks together read, and that one writes
SAMPLES, LENGTH, MICRO_BATCH = 128, 2048, 8  # of the calibration
SEQUENCE, STEP_TOKENS, STEPS = 1024, 128 * 1024, 500  # of the training
SOLVING_7B = 34.4 - 15.0  # seconds of SparseGPT beyond Wanda on one H100, measured (docs/results.md)


@dataclass(frozen=True)
class Model:
    """A decoder of LLaMA's form: blocks, width, inner width, width of keys and values."""

    name: str
    blocks: int
    width: int
    inner: int
    keys: int
    sharded: bool

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(inputs, rows) of the input groups of a block: query, key and value; output; gate and up; down."""
        w, i = self.width, self.inner
        return [(w, w + 2 * self.keys), (w, w), (w, 2 * i), (i, w)]

    @property
    def weights(self) -> int:
        """Number of pruned weights."""
        return self.blocks * sum(inputs * rows for inputs, rows in self.groups)

    @property
    def solving(self) -> list[int]:
        """Multiplications of SparseGPT, up to a factor, for each group of a block."""
        return [inputs * inputs * (inputs + rows) for inputs, rows in self.groups]


MODELS = (
    Model("LLaMA-7B", 32, 4096, 11008, 4096, sharded=False),
    Model("LLaMA-70B", 80, 8192, 28672, 1024, sharded=True),
)


def stages(model: Model, ranks: int) -> dict[str, float]:
    """Seconds of each stage."""
    bandwidth = WITHIN_NODE if ranks <= 8 else BETWEEN_NODES
    speed = GPUS["h100"].operations * REACHED
    collective = LATENCY * math.log2(ranks)
    size, apart = 2 * model.weights, ranks > 1  # bytes in bfloat16
    # Ranks divide the micro-batches; with more ranks than micro-batches, these are smaller.
    micro_batch = max(1, min(MICRO_BATCH, SAMPLES // ranks))
    own_samples = math.ceil(SAMPLES / micro_batch / ranks) * micro_batch
    # A step has a sequence for each rank at least: with more ranks than sequences, steps are fewer and larger.
    steps = STEPS * min(1.0, STEP_TOKENS / SEQUENCE / ranks)
    gathers = size / bandwidth * (1 - 1 / ranks) if model.sharded else 0.0
    return {
        "reading the model": size * (1 if model.sharded else ranks) / SHARED_FOLDER,
        "calibration, 2 passes": 2 * 2 * model.weights * own_samples * LENGTH / speed + 3 * gathers,
        "sums of inputs": 4 * model.blocks * collective,
        "Gram matrices": apart * 2 * 8 * model.blocks * sum(n * n for n, _ in model.groups) / bandwidth,
        "solving (SparseGPT)": SOLVING_7B * model.blocks * _largest_share(model.solving, ranks) / _solving_7b(),
        "masks and values": apart * model.weights * (1 / 8 + 2 / 2) / bandwidth + 8 * model.blocks * collective,
        f"training, {STEPS * STEP_TOKENS / 1e6:.0f} M tokens": STEPS
        * 3
        * 2
        * model.weights
        * STEP_TOKENS
        / (speed * ranks)
        + steps * (2 * gathers + apart * 2 * 4 * _adapter(model) / bandwidth + collective),
        "writing the model": size / DISK,
    }


def _largest_share(costs: list[int], ranks: int) -> int:
    """The largest cost that a rank has to solve in a block."""
    solvers = shared_out(costs, ranks)
    return max(sum(cost for cost, own in zip(costs, solvers, strict=True) if own == rank) for rank in solvers)


def _solving_7b() -> float:
    return MODELS[0].blocks * sum(MODELS[0].solving)


def _adapter(model: Model) -> int:
    """Number of weights of a LoRA of rank 16 on all linear layers."""
    return 16 * model.blocks * sum(inputs + rows for inputs, rows in model.groups)


def main() -> None:
    """Print both tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for model in MODELS:
        found = {ranks: stages(model, ranks) for ranks in RANKS}
        print(f"\n{model.name}, {model.weights / 1e9:.1f} G pruned weights, {'sharded' if model.sharded else 'DDP'}\n")
        print("| seconds on GPUs | " + " | ".join(f"{ranks:,}" for ranks in RANKS) + " |")
        print("|---" * (len(RANKS) + 1) + "|")
        for stage in found[RANKS[0]]:
            print(f"| {stage} | " + " | ".join(_shown(found[ranks][stage]) for ranks in RANKS) + " |")
        whole = {ranks: sum(seconds.values()) for ranks, seconds in found.items()}
        print("| **all** | " + " | ".join(_shown(whole[ranks]) for ranks in RANKS) + " |")
        print("| GPU-hours | " + " | ".join(_shown(whole[ranks] * ranks / 3600) for ranks in RANKS) + " |")


def _shown(number: float) -> str:
    return f"{number:,.2f}" if number < 10 else f"{number:,.0f}"


if __name__ == "__main__":
    main()
