"""The tables of perplexities: methods, comparison groups, updates, seeds, and a few that are not in the paper."""

from __future__ import annotations

from statistics import mean, stdev

from tables.layout import Table, markdown
from tables.methods import COMPARED, METHODS, PAPERS, SPARSEGPT, SPARSITIES, cell
from tables.setup import Point, Settings, Setup
from tables.store import Store

Grid = dict[str, dict[str, Settings]]

SCORES = {"magnitude": "magnitude", "SparseGPT's score": "sparsegpt", "Wanda": "wanda"}
GROUPS = ("layer", "input", "(input, 128)", "output", "(output, 128)")
UPDATES = {"none": None, "sequential": "sequential", "iterative": "iterative", "least squares": "least_squares"}

METHODS_GRID: Grid = {
    method: {name: found for name, column in SPARSITIES.items() if (found := cell(row, column)) is not None}
    for method, row in METHODS.items()
}
# The same with layer errors for Wanda, which need Gram matrices.
COSTS_GRID: Grid = METHODS_GRID | {
    "Wanda": {name: {"score": "wanda_with_errors"} | column for name, column in SPARSITIES.items()}
}
GROUPS_GRID: Grid = {
    name: {group: {"score": score, "granularity": group} for group in GROUPS} for name, score in SCORES.items()
}
UPDATES_GRID: Grid = {
    f"{name}, {sparsity}": {
        update: {"score": score, "reconstruction": how} | SPARSITIES[sparsity] for update, how in UPDATES.items()
    }
    for sparsity in PAPERS
    for name, score in (("magnitude", "magnitude"), ("Wanda", "wanda"))
}
NORMS_GRID: Grid = {
    name: {sparsity: {"score": score} | column for sparsity, column in SPARSITIES.items()}
    for name, score in (("l1", "wanda_l1"), ("l2 (Wanda)", "wanda"), ("l-infinity", "wanda_linf"))
}
ORDERS_GRID: Grid = {
    f"{name}, {order}": {sparsity: row | {"update": order} | column for sparsity, column in SPARSITIES.items()}
    for name, row in (
        ("Wanda", {}),
        ("SparseGPT", SPARSEGPT),
        ("Wanda, 10 swaps, least squares", METHODS["Wanda, 10 swaps, least squares"]),
    )
    for order in ("none", "block")
}
ALLOCATION_GRID: Grid = {
    name: {f"{share:.0%}": {"allocation": how, "sparsity": share} for share in (0.5, 0.6, 0.7, 0.8)}
    for name, how in (
        ("per output, as in the paper", None),
        ("uniform", "uniform"),
        ("OWL", "owl"),
        ("Fisher", "fisher"),
    )
}
SEEDS_GRID: Grid = {name: {sparsity: METHODS_GRID[name][sparsity] for sparsity in PAPERS} for name in COMPARED[1:]}


def chosen(grid: Grid, setup: Setup) -> Grid:
    """The rows and columns of a grid that the options ask for."""
    rows = {
        row: {column: settings for column, settings in cells.items() if setup.wanted(row, column)}
        for row, cells in grid.items()
    }
    return {row: cells for row, cells in rows.items() if cells}


def grid_table(title: str, grid: Grid) -> Table:
    """A table of perplexities, including that of the dense model."""

    def points(setup: Setup) -> list[Point]:
        cells = [settings for row in chosen(grid, setup).values() for settings in row.values()]
        return [setup.point("perplexity", settings) for settings in [None, *cells]] if cells else []

    def render(setup: Setup, store: Store) -> str:
        rows = chosen(grid, setup)
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines = [["dense"] + [f"{store[setup.point('perplexity', None)]['perplexity']:.2f}"] * len(columns)]
        for name, row in rows.items():
            found = {c: store[setup.point("perplexity", settings)]["perplexity"] for c, settings in row.items()}
            lines.append([name] + [f"{found[c]:.2f}" if c in found else "-" for c in columns])
        return markdown(["perplexity", *columns], lines)

    return Table(title, points, render)


def costs_points(setup: Setup) -> list[Point]:
    """All methods at 50% and 2:4."""
    rows = chosen(COSTS_GRID, setup).values()
    return [setup.point("perplexity", row[column]) for row in rows for column in ("50%", "2:4") if column in row]


def render_costs(setup: Setup, store: Store) -> str:
    """Seconds, mean layer error and sparsity counted."""
    lines = []
    for name, row in chosen(COSTS_GRID, setup).items():
        line = [name]
        for column in ("50%", "2:4"):
            found = store[setup.point("perplexity", row[column])] if column in row else None
            line += ["-"] * 3 if found is None else [f"{found['seconds']:.1f}"]
            if found is not None:
                line += ["-" if found["layer_error"] is None else f"{found['layer_error']:.4f}"]
                line += [f"{found['sparsity']:.4%}"]
        lines.append(line)
    columns = [f"{what}, {column}" for column in ("50%", "2:4") for what in ("seconds", "layer error", "sparsity")]
    return markdown(["", *columns], lines)


def seeds_points(setup: Setup) -> list[Point]:
    """Each method on each calibration set."""
    rows = chosen(SEEDS_GRID, setup).values()
    return [setup.point("perplexity", s, seed) for row in rows for s in row.values() for seed in setup.seeds]


def render_seeds(setup: Setup, store: Store) -> str:
    """Mean and standard deviation of the perplexity over calibration sets."""
    rows = chosen(SEEDS_GRID, setup)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = []
    for name, row in rows.items():
        cells = []
        for settings in (row.get(column) for column in columns):
            points = [setup.point("perplexity", settings, seed) for seed in setup.seeds] if settings is not None else []
            values = [store[point]["perplexity"] for point in points]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}" if values else "-")
        lines.append([name, *cells])
    seeds = ", ".join(str(seed) for seed in setup.seeds)
    return markdown(["perplexity", *columns], lines) + f"\nSeeds {seeds}; ± is the standard deviation between them."
