"""The figures: perplexity against the sparsity, and against the number of calibration samples."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from sparsefit.reporting.drawing import MUTED, SERIES, figure_of, standalone, styled, svg
from tables.layout import Table, markdown
from tables.methods import COMPARED, METHODS
from tables.setup import Point, Setup
from tables.store import Store

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SAMPLED = ("SparseGPT", "Wanda")
Curves = dict[str, dict[float, Point]]  # the points of each method, by x


def sweep(setup: Setup) -> Curves:
    """Each method at each sparsity."""
    return {
        method: {share: setup.point("perplexity", METHODS[method] | {"sparsity": share}) for share in SHARES}
        for method in COMPARED
        if setup.wanted(method)
    }


def samples(setup: Setup) -> Curves:
    """Wanda and SparseGPT at 50% with 1, 2, 4, ... calibration samples."""
    counts = [2**power for power in range(setup.most_samples.bit_length())]
    half = {"sparsity": 0.5}
    return {
        method: {n: setup.point("perplexity", METHODS[method] | half, samples=n) for n in counts}
        for method in SAMPLED
        if setup.wanted(method)
    }


def figure_table(title: str, name: str, curves: Callable[[Setup], Curves], axis: str) -> Table:
    """A figure and a table of its values; its files are called `name`."""

    def points(setup: Setup) -> list[Point]:
        found = [point for curve in curves(setup).values() for point in curve.values()]
        return [setup.point("perplexity", None), *found] if found else []

    def values(setup: Setup, store: Store) -> dict[str, dict[float, float]]:
        found = {
            method: {x: store[point]["perplexity"] for x, point in curve.items()}
            for method, curve in curves(setup).items()
        }
        dense = store[setup.point("perplexity", None)]["perplexity"]
        return {"dense": dict.fromkeys(next(iter(found.values())), dense)} | found

    def render(setup: Setup, store: Store) -> str:
        found = values(setup, store)
        columns = [f"{x:.0%}" if isinstance(x, float) else str(x) for x in found["dense"]]
        lines = [[method, *(f"{y:.2f}" for y in curve.values())] for method, curve in found.items()]
        return markdown([axis, *columns], lines) + f"\n![{title}]({name}.svg)\n"

    def draw(setup: Setup, store: Store, folder: Path) -> None:
        found = values(setup, store)
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([axis, *found])
            writer.writerows([x, *(curve[x] for curve in found.values())] for x in found["dense"])
        draw_curves(found, title, axis, folder / name)

    return Table(title, points, render, draw)


@styled
def draw_curves(curves: dict[str, dict[float, float]], title: str, axis: str, path: Path) -> None:
    """Draw a line for each method and a dotted one for the dense model, as PNG and SVG."""
    from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter

    figure = figure_of(5.6, 3.6)
    axes = figure.subplots()
    dense = curves["dense"]
    axes.plot(list(dense), list(dense.values()), color=MUTED, linestyle=":", label="dense")
    for (name, curve), colour in zip(list(curves.items())[1:], SERIES, strict=False):
        axes.plot(list(curve), list(curve.values()), color=colour, marker="o", markersize=4, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    if axis == "sparsity":
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(title=title, xlabel=axis, ylabel="perplexity")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(f"{path}.png", dpi=150)
    Path(f"{path}.svg").write_text(standalone(svg(figure, title)), encoding="utf-8")


SPARSITIES_TABLE = figure_table("Perplexity and sparsity", "sparsities", sweep, "sparsity")
SAMPLES_TABLE = figure_table("Perplexity and calibration samples, 50%", "samples", samples, "calibration samples")
