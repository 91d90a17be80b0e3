"""Estimates the cost of a streamed pruning of LLaMA-7B and LLaMA-70B. Nothing is measured here.

    python scripts/streaming_estimate.py

Wanda in bfloat16 on 128 x 2,048 tokens. The system's cache is assumed to keep nothing of the model between two passes.
Prints the memory that `sparsefit prune --stream` holds, the bytes that it reads and writes, and the seconds. The
constants below are the assumptions.
"""

from __future__ import annotations

import argparse

from scaling_estimate import LENGTH, MICRO_BATCH, MODELS, SAMPLES, Model  # in this folder

from sparsefit.planning.gpus import GPUS, REACHED

VOCABULARY = 32000
BYTES = 2  # of a weight, and of a number in the hidden states
READS = {
    "copy of the model": 1,
    "a pass of one sample: which weights are used": 1,
    "weights that are not finite": 1,
    "existing zeros": 1,
    "a pass of one sample: whether blocks can be run one by one": 1,
    "pruning of each block": 1,
    "checksums of the files": 1,
    "zeros counted in the files": 1,
}
WRITES = {"copy of the model": 1, "pruned weights": 1}
DISK_READS, DISK_WRITES = 2e9, 1e9  # bytes a second


def figures(model: Model) -> dict[str, str]:
    """Each row of the table."""
    block = BYTES * model.weights / model.blocks
    ends = BYTES * 2 * VOCABULARY * model.width  # embeddings and head
    whole = BYTES * model.weights + ends
    held = {
        "embeddings and head": ends,
        "one block, and its copy as it is written": 2 * block,
        "hidden states of all samples": BYTES * SAMPLES * LENGTH * model.width,
        "a micro-batch inside a block": BYTES * MICRO_BATCH * LENGTH * (4 * model.width + 3 * model.inner),
        "masks, one bit a weight": model.weights / 8,
    }
    reads, writes = whole * sum(READS.values()), whole * sum(WRITES.values())
    computed = 2 * 2 * model.weights * SAMPLES * LENGTH / (GPUS["h100"].operations * REACHED)
    rows = {"weights on disk": _gigabytes(whole)}
    rows |= {f"memory: {what}": _gigabytes(size) for what, size in held.items()}
    rows["**memory in all**"] = f"**{_gigabytes(sum(held.values()))}**"
    rows[f"read from the disk ({sum(READS.values())} times the model)"] = _gigabytes(reads)
    rows[f"written ({sum(WRITES.values())} times the model)"] = _gigabytes(writes)
    rows[f"seconds of the disk, at {DISK_READS / 1e9:g} and {DISK_WRITES / 1e9:g} GB/s"] = (
        f"{reads / DISK_READS + writes / DISK_WRITES:,.0f}"
    )
    rows["seconds of computing, blocks on an H100 (`device: cuda`)"] = f"{computed:,.0f}"
    return rows


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    columns = [figures(model) for model in MODELS]
    print(f"| computed, not measured | {' | '.join(model.name for model in MODELS)} |")
    print("|---" * (len(MODELS) + 1) + "|")
    for row in columns[0]:
        print(f"| {row} | {' | '.join(column[row] for column in columns)} |")


if __name__ == "__main__":
    main()
