"""Compares the seconds of pruning on several ranks and on one, with the same calibration samples.

    python scripts/benchmarks/ranks.py --ranks 1 2 --hidden 512 --layers 4 --repeats 3

Each rank is a process of one thread with gloo. The samples are divided among the ranks, and so are the input groups of
methods that need Gram matrices. Prints for each method the median seconds for each number of ranks, the ratio to one
rank, and how many mask bits differ from those of one rank.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import add_size_options, make_model, make_samples  # in this folder

from sparsefit import MaskSet, PruningConfig, prune
from sparsefit.recovery.block_reconstruction import ReconstructSettings, dense_weights, reconstruct

METHODS: dict[str, dict[str, Any]] = {
    "wanda": {},
    "sparsegpt": {"score": "sparsegpt", "reconstruction": "iterative"},
    "10 swaps": {"swaps": 10},
    "least squares": {"reconstruction": "least_squares"},
}
TUNED = "reconstruction, 1 pass"


def _rank(rank: int, ranks: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    data = make_samples(args.samples, args.length)  # divided among the ranks
    found: dict[str, tuple[list[float], MaskSet | None]] = {}
    for _ in range(args.repeats):
        for name, settings in METHODS.items():
            model = make_model(args.hidden, args.layers, args.dtype)
            dense = dense_weights(model)
            dist.barrier()
            start = time.perf_counter()
            result = prune(model, data, PruningConfig(sparsity=args.sparsity, pattern=args.pattern, **settings))
            found.setdefault(name, ([], result.masks))[0].append(time.perf_counter() - start)
        dist.barrier()
        start = time.perf_counter()  # of the last model
        reconstruct(model, data, dense, result.masks, ReconstructSettings(passes=1, batch_size=8))
        found.setdefault(TUNED, ([], None))[0].append(time.perf_counter() - start)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


def measure(ranks: int, args: argparse.Namespace) -> dict[str, tuple[float, MaskSet | None]]:
    """The median seconds and the masks of each method on a number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (ranks, args, folder), nprocs=ranks, start_method="spawn")
        found = torch.load(Path(folder) / "found.pt", weights_only=False)
    return {name: (statistics.median(seconds), masks) for name, (seconds, masks) in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, hidden=512, layers=4, samples=32, length=256)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.set_defaults(threads=1)
    args = parser.parse_args()
    found = {ranks: measure(ranks, args) for ranks in args.ranks}
    first = found[args.ranks[0]]
    print(f"{'method':24}" + "".join(f"{ranks:>9} ranks" for ranks in found) + "   ratio to the first   other bits")
    for name, (seconds, masks) in first.items():
        others = [own[name] for own in found.values()]
        row = "".join(f"{own:13.2f} s" for own, _ in others)
        ratios = " ".join(f"{own / seconds:.2f}" for own, _ in others[1:])
        bits = " ".join(_other_bits(masks, other) for _, other in others[1:]) if masks else "-"
        print(f"{name:24}{row}   {ratios:18}   {bits}")


def _other_bits(masks: MaskSet, others: MaskSet) -> str:
    differing = sum(int((mask != others[name]).sum()) for name, mask in masks.items())
    return f"{differing:,} of {sum(mask.numel() for mask in masks.values()):,}"


if __name__ == "__main__":
    main()
