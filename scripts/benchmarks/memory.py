"""Measures how pruning's peak memory grows with depth.

    python scripts/benchmarks/memory.py --depths 2 4 8 16 24
    python scripts/benchmarks/memory.py --device cuda --depths 2 4 8 16 24
    python scripts/benchmarks/memory.py --device cuda --offload --dtype bfloat16 --hidden 2048

Prunes models of one width and several depths, each in a separate process. "peak" is the peak memory of pruning above
the memory of the model and the data: of the process on the CPU, of the device with `--device cuda`. `--offload` keeps
the model in CPU memory and computes one block at a time on the device (PruningConfig(device="cuda",
states_on_cpu=True)); then the device does not hold the model.

Weights stay dense until the end, so that an error leaves the model unchanged. Until then, masks of one bit per weight
are kept in CPU memory. Their size grows with depth; it is computed and shown next to the peak. Nothing else should
grow; the last lines say whether something does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

import numpy as np
import torch
from common import EXACT_HEAP, PeakMemory, add_size_options, in_a_process, make_model, make_samples  # in this folder

from sparsefit import PruningConfig, prune


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Prune in this process: bytes of the model, of the masks, and of the peak above the model."""
    torch.set_num_threads(args.threads)
    home = "cpu" if args.offload else args.device
    settings: dict[str, Any] = {"sparsity": args.sparsity, "pattern": args.pattern}
    if args.micro_batch_size is not None:
        settings["micro_batch_size"] = args.micro_batch_size
    if args.offload:
        settings |= {"device": args.device, "states_on_cpu": True}
    config = PruningConfig(**settings)
    prune(make_model(128, 2, args.dtype, home), make_samples(2, 16, home), config)  # loads libraries, chooses kernels
    model = make_model(args.hidden, args.layers, args.dtype, home)
    samples = make_samples(args.samples, args.length, home)
    with PeakMemory(args.device) as memory:
        result = prune(model, samples, config)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "model": sum(p.numel() * p.element_size() for p in model.parameters()),
        "masks": sum(-(-size // 8) for size, _ in result.masks.counts().values()),
        "peak": memory.above,
    }


def report(depths: list[int], rows: list[dict[str, Any]], masks_count: bool) -> None:
    """Print the table and the growth per block."""
    titles = ("depth", "parameters", "model MB", "peak over the model MB", "masks MB", "the rest MB")
    print("\n{:>5} {:>13} {:>9} {:>23} {:>9} {:>12}".format(*titles))
    for depth, row in zip(depths, rows, strict=True):
        masks = row["masks"] if masks_count else 0
        figures = [row["model"], row["peak"], masks, row["peak"] - masks]
        model, peak, bits, rest = (f"{number / 1e6:.1f}" for number in figures)
        print(f"{depth:5} {row['parameters']:13,} {model:>9} {peak:>23} {bits:>9} {rest:>12}")
    if len(rows) < 2:
        return
    per_block = {key: np.polyfit(depths, [row[key] for row in rows], 1)[0] / 1e6 for key in ("model", "peak", "masks")}
    print(
        f"\nfor each further block: model {per_block['model']:.2f} MB, peak over the model {per_block['peak']:.2f} MB"
    )
    if masks_count:
        print(f"  of which {per_block['masks']:.2f} MB are the masks at one bit a weight, kept until all are applied")
    rest = per_block["peak"] - (per_block["masks"] if masks_count else 0)
    share = rest / per_block["model"]
    verdict = "does not grow with depth" if share < 0.02 else "GROWS with depth"
    print(f"all that is not masks {verdict}: {rest:+.2f} MB a block, {share:.1%} of a block's weights")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, hidden=512, layers=0, samples=8, length=128)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--offload", action="store_true", help="the model stays in CPU memory; blocks go to the device")
    parser.add_argument("--micro-batch-size", type=int, help="of the engine; its default if not given")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.offload and args.device == "cpu":
        parser.error("--offload needs a --device other than cpu")
    if args.measure:
        print(json.dumps(measure(args)))
        return
    size = f"width {args.hidden}, {args.samples} x {args.length} tokens"
    print(f"torch {torch.__version__}, {args.device}, {args.dtype}, {size}")
    rows = []
    for depth in args.depths:
        arguments = [*sys.argv[1:], "--measure", f"--layers={depth}"]
        runs = [in_a_process(__file__, arguments, EXACT_HEAP) for _ in range(args.repeats)]
        rows.append(runs[0] | {"peak": statistics.median(run["peak"] for run in runs)})
    report(args.depths, rows, masks_count=args.device == "cpu")


if __name__ == "__main__":
    main()
