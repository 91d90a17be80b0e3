"""The figure of a report that shows how sparse each layer is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsefit.reporting import report as _report
from sparsefit.reporting.drawing import INK, SERIES, WIDTH, figure_of, grid, styled, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BARS = 40


@styled
def sparsity(report: Mapping[str, Any]) -> str | None:
    """Sparsity of each layer: a map of blocks by layer types, or bars where the names hold no block number."""
    layers = [
        (str(layer.get("name", "?")), share, _report.number(layer.get("weights")) or 1.0)
        for layer in _report.items(report, "sparsity", "layers")
        if isinstance(layer, Mapping) and (share := _report.layer_sparsity(layer)) is not None
    ]
    if not layers:
        return None
    return _sparsity_map(layers) if any(_report.block_of(name) for name, _, _ in layers) else _sparsity_bars(layers)


def _sparsity_map(layers: Sequence[tuple[str, float, float]]) -> str:
    blocks = sorted({block for name, _, _ in layers if (block := _report.block_of(name))})
    outside = any(_report.block_of(name) is None for name, _, _ in layers)
    rows = list(dict.fromkeys(_report.layer_type(name) for name, _, _ in layers))
    sums: dict[tuple[int, int], tuple[float, float]] = {}
    for name, share, weights in layers:
        block = _report.block_of(name)
        cell = (rows.index(_report.layer_type(name)), blocks.index(block) if block else len(blocks))
        zeros, total = sums.get(cell, (0.0, 0.0))
        sums[cell] = (zeros + share * weights, total + weights)
    cells = {cell: zeros / total for cell, (zeros, total) in sums.items()}
    labels = [*_block_labels(blocks), *(["other"] if outside else [])]

    figure = figure_of(WIDTH, 0.85 + 0.29 * len(rows))
    axes = grid(figure, 1, 1)[0]
    _draw_cells(figure, axes, cells, (len(rows), len(labels)))
    axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
    shown = range(0, len(blocks), -(-len(blocks) // 14))
    ticks = [*shown, *([len(blocks)] if outside else [])]
    axes.set_xticks([tick + 0.5 for tick in ticks], [labels[tick] for tick in ticks])
    axes.tick_params(length=0)
    axes.set_title("zeros per layer, in percent", loc="left")
    axes.set_xlabel("block" if not outside else "block (other: in no block)")
    low, high = min(cells.values()), max(cells.values())
    return svg(figure, f"Sparsity of {len(layers)} layers by block and type, from {low:.2%} to {high:.2%}.")


def _draw_cells(figure: Figure, axes: Axes, cells: Mapping[tuple[int, int], float], shape: tuple[int, int]) -> None:
    """Coloured cells, with their values where there is room; rows count from the top."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    values = np.full(shape, np.nan)
    for cell, share in cells.items():
        values[cell] = 100 * share
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    spread = max(0.0, 20 - (high - low)) / 2  # a scale narrower than 20 points would dramatise rounding
    low, high = max(0.0, low - spread), min(100.0, high + spread)
    colours = LinearSegmentedColormap.from_list("sparsity", ["#d9f0e6", "#4fb3a5", "#17566b", "#0d2a45"], N=48)
    mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, edgecolors="none")
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    for edge in range(1, shape[1]) if shape[1] <= 40 else ():
        axes.axvline(edge, color="#ffffff", lw=1)
    for edge in range(1, shape[0]):
        axes.axhline(edge, color="#ffffff", lw=1)
    if shape[1] <= 12:
        digits = 0 if np.allclose(values[~np.isnan(values)], np.round(values[~np.isnan(values)]), atol=0.05) else 1
        for (row, column), share in cells.items():
            ink = "#ffffff" if 100 * share > low + 0.45 * (high - low) else "#10202e"
            text = f"{100 * share:.{digits}f}"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=9)
    bar = figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.02)
    bar.locator = MaxNLocator(4)
    bar.solids.set_edgecolor("face")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=9)


def _block_labels(blocks: Iterable[tuple[str, tuple[int, ...]]]) -> list[str]:
    """ "3", or "1.3" for block 3 of stage 1, led by the part of the path that differs where there are several paths."""
    blocks = list(blocks)
    paths = [prefix.split(".") for prefix in dict.fromkeys(prefix for prefix, _ in blocks)]
    differs = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), 0)
    names = {".".join(path): path[min(differs, len(path) - 1)] + " " if len(paths) > 1 else "" for path in paths}
    return [names[prefix] + ".".join(map(str, index)) for prefix, index in blocks]


def _sparsity_bars(layers: Sequence[tuple[str, float, float]]) -> str:
    shown = layers[:_MOST_BARS]
    figure = figure_of(WIDTH, 0.7 + 0.27 * len(shown))
    axes = grid(figure, 1, 1)[0]
    bars = axes.barh(range(len(shown)), [100 * share for _, share, _ in shown], 0.62, color=SERIES[1])
    axes.bar_label(bars, [f"{share:.2%}" for _, share, _ in shown], padding=4, color=INK, fontsize=9)
    axes.set_yticks(range(len(shown)), [_shorten(name.removesuffix(".weight")) for name, _, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 100 if max(share for _, share, _ in shown) < 0.85 else 118)
    axes.set_xticks([0, 25, 50, 75, 100])
    more = f", first {len(shown)} of {len(layers)}" if len(layers) > len(shown) else ""
    axes.set_title(f"zeros per layer, in percent{more}", loc="left")
    return svg(figure, f"Sparsity of {len(layers)} layers.")


def _shorten(text: str, most: int = 28) -> str:
    return text if len(text) <= most else "…" + text[1 - most :]
