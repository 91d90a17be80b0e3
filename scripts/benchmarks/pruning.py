"""Compares a complete pruning run with the plain algorithm of plain_wanda.py: seconds, memory, masks.

    python scripts/benchmarks/pruning.py --repeats 5 --threads 2
    python scripts/benchmarks/pruning.py --dtype bfloat16 --pattern 2:4 --micro-batch-size 4
    python scripts/benchmarks/pruning.py --breakdown

A Llama of about 91 million parameters with random weights, calibrated on the text of Python's manual (16 x 256
tokens), on the CPU. Every measurement runs in a separate process, which has its own peak memory; the two
algorithms alternate. "peak" is the peak memory of pruning above the memory of the model and the data, from one more run
in which the allocator keeps no free memory (which is slower). On a machine that is busy with other work, use the ratio
of CPU seconds with `--threads 1`. `--breakdown` also shows how the engine spends its time, from one more run under a
profiler.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import EXACT_HEAP, PeakMemory, add_size_options, in_a_process, make_model, make_samples  # in this folder
from plain_wanda import kept_weights, prune_plainly
from torch import Tensor, nn

from sparsefit import PruningConfig, prune

WAYS = ("plain", "sparsefit")


def way_to_prune(name: str, args: argparse.Namespace) -> Callable[[nn.Module, list[Tensor]], Any]:
    """The function that prunes a model with some samples, for the given options."""
    if name == "plain":
        return lambda model, samples: prune_plainly(model, samples, args.sparsity, args.pattern)
    settings = {"sparsity": args.sparsity, "pattern": args.pattern}
    settings["update"] = args.update
    if args.micro_batch_size is not None:
        settings["micro_batch_size"] = args.micro_batch_size
    config = PruningConfig(**settings)
    return lambda model, samples: prune(model, samples, config)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prune once in this process and write the masks to `args.masks`. Returns seconds and peak bytes."""
    torch.set_num_threads(args.threads)
    way = way_to_prune(name, args)
    way(make_model(128, 2, args.dtype), make_samples(2, 16))  # imports and first calls of kernels are not counted
    model, samples = make_model(args.hidden, args.layers, args.dtype), make_samples(args.samples, args.length)
    with PeakMemory() as memory:
        start, cpu_start = time.perf_counter(), time.process_time()
        way(model, samples)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    masks = {key: np.packbits(mask.numpy()) for key, mask in kept_weights(model).items()}
    np.savez(args.masks, **masks)
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak": memory.above,
        "parameters": sum(p.numel() for p in model.parameters()),
        "model_bytes": model_bytes,
        "pruned": sum(mask.numel() for mask in kept_weights(model).values()),
    }


def where_time_goes(args: argparse.Namespace) -> list[tuple[str, float]]:
    """Seconds of one profiled run by the engine's file that calls the operations, largest first."""
    torch.set_num_threads(args.threads)
    way = way_to_prune("sparsefit", args)
    way(make_model(128, 2, args.dtype), make_samples(2, 16))
    model, samples = make_model(args.hidden, args.layers, args.dtype), make_samples(args.samples, args.length)
    profile = cProfile.Profile()
    profile.runcall(way, model, samples)
    seconds: Counter[str] = Counter()
    for (file, _, _), (_, _, own, _, callers) in pstats.Stats(profile).stats.items():
        if file == "~":  # an operation written in C: its time is that of the functions that call it
            for (calling_file, _, _), times in callers.items():
                seconds[_part_of_engine(calling_file)] += times[2]
        else:
            seconds[_part_of_engine(file)] += own
    return seconds.most_common()


def _part_of_engine(file: str) -> str:
    path = Path(file)
    return path.name if path.parent.name == "pruning" else "forward passes (torch, transformers)"


def report(runs: dict[str, list[dict[str, Any]]], peaks: dict[str, int], agreement: float) -> None:
    """Print the medians, the ratios and the agreement."""
    first = runs[WAYS[0]][0]
    print(
        f"{first['parameters']:,} parameters, {first['pruned']:,} of them prunable, {first['model_bytes'] / 1e6:.0f} MB"
    )
    columns = {"seconds": "median s", "cpu_seconds": "CPU s", "peak": "peak over the model, MB"}
    print(f"\n{'':16} {'fastest s':>10} " + " ".join(f"{title:>{max(9, len(title))}}" for title in columns.values()))
    medians = {}
    for name, measured in runs.items():
        medians[name] = {key: statistics.median(run[key] for run in measured) for key in ("seconds", "cpu_seconds")}
        medians[name]["peak"] = peaks[name]
        seconds, cpu, peak = medians[name].values()
        print(f"{name:16} {min(run['seconds'] for run in measured):10.2f} {seconds:9.2f} {cpu:9.2f} {peak / 1e6:23.1f}")
    ratios = {key: medians[WAYS[1]][key] / max(medians[WAYS[0]][key], 1e-9) for key in columns}
    print("\nsparsefit / plain: " + ", ".join(f"{key} {ratio:.2f}" for key, ratio in ratios.items()))
    print(f"mask bits that are equal: {agreement:.6%}")


def mask_agreement(first: Path, second: Path) -> float:
    """The share of equal bits of two saved sets of masks."""
    one, other = np.load(first), np.load(second)
    different = sum(int(np.unpackbits(one[name] ^ other[name]).sum()) for name in one.files)
    return 1 - different / sum(8 * one[name].size for name in one.files)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, hidden=768, layers=12, samples=16, length=256)
    parser.add_argument("--micro-batch-size", type=int, help="of the engine; its default if not given")
    parser.add_argument("--update", default="block", help="order of the engine; the plain algorithm's is block")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--breakdown", action="store_true", help="also show where the engine's time goes")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--masks", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return
    print(f"torch {torch.__version__}, {args.threads} threads, {args.dtype}, {args.samples} x {args.length} tokens")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.npz" for name in WAYS}
        for repeat in range(args.repeats):
            for name in WAYS if repeat % 2 == 0 else WAYS[::-1]:
                arguments = [*sys.argv[1:], f"--measure={name}", f"--masks={files[name]}"]
                runs[name].append(in_a_process(__file__, arguments))
        arguments = [*sys.argv[1:], f"--masks={Path(folder) / 'again.npz'}"]
        peaks = {name: in_a_process(__file__, [*arguments, f"--measure={name}"], EXACT_HEAP)["peak"] for name in WAYS}
        report(runs, peaks, mask_agreement(*files.values()))
    if args.breakdown:
        found = where_time_goes(args)
        whole = sum(seconds for _, seconds in found)
        print(f"\nwhere the engine's time goes ({whole:.2f} s under the profiler)")
        for part, seconds in found:
            print(f"  {part:40} {seconds:8.2f} s {seconds / whole:7.1%}")


if __name__ == "__main__":
    main()
