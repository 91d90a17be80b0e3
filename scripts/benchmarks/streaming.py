"""Measures how pruning's peak memory grows with depth, for models streamed from the disk.

    python scripts/benchmarks/streaming.py --depths 4 8 16 32
    python scripts/benchmarks/streaming.py --model FOLDER --samples 16 --length 512 --update none

Llamas with random weights, of one width and several depths, are written to disk (or one is read from a folder). Each is
pruned twice, in separate processes: loaded into memory, and with its weights mapped from files
(`sparsefit.modules.streaming`). "peak" is the peak memory of loading and pruning above the memory before, so it does
not contain libraries. It contains mapped files while they are in use. "masks" is one bit per weight; both keep the
masks until the end. "equal" compares the digests of the masks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import EXACT_HEAP, PeakMemory, add_size_options, in_a_process, make_model, make_samples  # in this folder

from sparsefit import PruningConfig, prune
from sparsefit.modules.loading import load_causal_lm
from sparsefit.modules.streaming import stream_causal_lm

WAYS = ("memory", "stream")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Prune once in this process."""
    import torch

    torch.set_num_threads(args.threads)
    settings = {"score": args.score, "update": args.update, "swaps": args.swaps, "allocation": args.allocation}
    config = PruningConfig(sparsity=args.sparsity, micro_batch_size=args.micro_batch_size, **settings)
    prune(make_model(128, 2), make_samples(2, 16), config)  # loads libraries
    samples = make_samples(args.samples, args.length)
    with tempfile.TemporaryDirectory(dir=args.scratch) as copy, PeakMemory() as memory:
        start = time.perf_counter()
        if args.measure == "memory":
            result = prune(load_causal_lm(args.model, args.dtype), samples, config)
        else:
            model, weights = stream_causal_lm(args.model, Path(copy), args.dtype)
            result = prune(model, samples, config, mapped=weights)
            weights.flush()
        seconds = time.perf_counter() - start
    sizes = result.masks.counts().values()
    return {
        "model": sum(file.stat().st_size for file in Path(args.model).glob("*.safetensors")),
        "masks": sum(-(-size // 8) for size, _ in sizes),
        "digest": result.masks.digest(),
        "peak": memory.above,
        "seconds": seconds,
    }


def report(depths: list[int], rows: list[dict[str, dict[str, Any]]]) -> None:
    """Print the table, and the cost of one more block."""
    print("\n| blocks | model MB | in memory: peak MB | s | streamed: peak MB | s | masks MB | masks equal |")
    print("|---|---|---|---|---|---|---|---|")
    for depth, row in zip(depths, rows, strict=True):
        memory, stream = (row[way] for way in WAYS)
        figures = [
            *(f"{number / 1e6:.0f}" for number in (memory["model"], memory["peak"])),
            *(f"{memory['seconds']:.1f}", f"{stream['peak'] / 1e6:.0f}", f"{stream['seconds']:.1f}"),
            *(f"{memory['masks'] / 1e6:.1f}", "yes" if memory["digest"] == stream["digest"] else "NO"),
        ]
        print(f"| {depth or 'all'} | {' | '.join(figures)} |")
    if len(rows) > 1:
        slopes = {way: np.polyfit(depths, [row[way]["peak"] for row in rows], 1)[0] / 1e6 for way in WAYS}
        masks = np.polyfit(depths, [row["stream"]["masks"] for row in rows], 1)[0] / 1e6
        print(
            f"\nfor each further block: {slopes['memory']:.1f} MB in memory, {slopes['stream']:.1f} MB streamed, "
            f"of which {masks:.1f} MB are masks"
        )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, hidden=768, layers=0, samples=8, length=128)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--model", help="a model folder, instead of models with random weights")
    parser.add_argument("--scratch", help="where models are written; by default the folder of temporary files")
    parser.add_argument("--score", default="wanda")
    parser.add_argument("--update", default="block")
    parser.add_argument("--swaps", type=int, default=0)
    parser.add_argument("--allocation")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    depths, rows = args.depths if args.model is None else [0], []
    for depth in depths:
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            if args.model is None:
                make_model(args.hidden, depth, args.dtype).save_pretrained(folder, max_shard_size="100MB")
            options = [] if args.model is not None else [f"--model={folder}"]
            command = [*sys.argv[1:], *options, "--measure"]
            rows.append({way: in_a_process(__file__, [*command, way], EXACT_HEAP) for way in WAYS})
    report(depths, rows)


if __name__ == "__main__":
    main()
