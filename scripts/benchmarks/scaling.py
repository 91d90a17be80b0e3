"""Measures how the seconds of pruning grow with the parameters and with the calibration tokens.

    python scripts/benchmarks/scaling.py --output runs/scaling.png --repeats 3 --threads 2

There are two series: models of one width and growing depth, calibrated on the same tokens; and one model, calibrated on
a growing number of samples. Prints and draws each series with a fitted line and its R^2. Both should be straight lines,
as every weight and every token is used a fixed number of times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from common import add_size_options, make_model, make_samples  # in this folder

from sparsefit import PruningConfig, prune

Points = list[tuple[float, float]]  # (parameters or tokens, median seconds)


def seconds_to_prune(sizes: list[tuple[int, int]], args: argparse.Namespace) -> list[tuple[int, float]]:
    """For each (blocks, samples) the prunable weights and the median seconds of pruning fresh models.

    The sizes alternate, so that a machine that slows down for a while does not bend the line.
    """
    config = PruningConfig(sparsity=args.sparsity, pattern=args.pattern)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    measured: list[list[float]] = [[] for _ in sizes]
    weights = [0 for _ in sizes]
    for _ in range(args.repeats):
        for index, (layers, samples) in enumerate(sizes):
            model, data = make_model(args.hidden, layers, args.dtype), make_samples(samples, args.length)
            start = clock()
            result = prune(model, data, config)
            measured[index].append(clock() - start)
            weights[index] = sum(size for size, _ in result.masks.counts().values())
    return [(size, statistics.median(seconds)) for size, seconds in zip(weights, measured, strict=True)]


def line_through(points: Points) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of the straight line of least squares."""
    x, y = np.array(points).T
    slope, intercept = np.polyfit(x, y, 1)
    residual = ((y - slope * x - intercept) ** 2).sum()
    return slope, intercept, 1 - residual / ((y - y.mean()) ** 2).sum()


def print_series(title: str, unit: str, points: Points) -> None:
    """Print a series as a table, and its line."""
    print(f"\n{unit:>18} {'median s':>10}   {title}")
    for size, seconds in points:
        print(f"{size:18,.0f} {seconds:10.2f}")
    slope, intercept, fit = line_through(points)
    print(f"  {slope * 1e6:.4g} s per million {unit} + {intercept:.2f} s, R^2 = {fit:.4f}")


def draw(series: list[tuple[str, str, Points]], clock: str, output: Path) -> None:
    """Draw each series in its own panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(series), figsize=(4.6 * len(series), 3.6), layout="constrained")
    for panel, (title, unit, points) in zip(panels, series, strict=True):
        slope, intercept, fit = line_through(points)
        scale, name = (1e6, "million") if max(points)[0] >= 1e6 else (1e3, "thousand")
        x, y = np.array(points).T / np.array([[scale], [1]])
        ends = np.array([0, x.max() * 1.05])
        panel.plot(ends, slope * scale * ends + intercept, color="0.6", linewidth=1.5, label=f"line, R² = {fit:.4f}")
        panel.plot(x, y, "o", color="#1f5fa8", label="measured (median)")
        panel.set(xlabel=f"{name} {unit}", ylabel=f"seconds ({clock} time)", title=title, xlim=(0, ends[1]))
        panel.set_ylim(bottom=0, top=y.max() * 1.15)
        panel.legend(frameon=False, loc="upper left")
        panel.spines[["top", "right"]].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, hidden=512, layers=4, samples=16, length=128)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 12, 16], help="blocks, first series")
    parser.add_argument("--sample-counts", type=int, nargs="+", default=[8, 16, 32, 64, 96], help="second series")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is busy with other work"
    )
    parser.add_argument("--output", type=Path, default=Path("scaling.png"), help="PNG or SVG")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.dtype}, width {args.hidden}, {args.clock} time")
    prune(make_model(128, 2, args.dtype), make_samples(2, 16))  # loads libraries, chooses kernels
    depths = seconds_to_prune([(depth, args.samples) for depth in args.depths], args)
    grown = seconds_to_prune([(args.layers, count) for count in args.sample_counts], args)
    tokens = [(count * args.length, point[1]) for count, point in zip(args.sample_counts, grown, strict=True)]
    series = [
        (f"Depth grows ({args.samples * args.length:,} tokens)", "prunable weights", depths),
        (f"Calibration grows ({args.layers} blocks)", "calibration tokens", tokens),
    ]
    for title, unit, points in series:
        print_series(title, unit, points)
    draw(series, args.clock, args.output)
    print(f"\ndrawn to {args.output}")


if __name__ == "__main__":
    main()
