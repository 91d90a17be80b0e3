"""The figures of a report, drawn with matplotlib and returned as SVG text to be placed inside a page.

Ink and lines take the page's colours (`--ink`, `--muted`, `--line`) where the page defines them, so that a figure reads
in a light and in a dark theme. All ids carry a digest of the figure: any number of them can live in one page.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from sparsefit.reporting import report as _report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGE_COLOURS = {"dense": "#8492a6", "pruned": "#e8833a", "recovered": "#2a9d8f"}
_INK, _MUTED, _LINE = "#1c2733", "#66727f", "#dfe4e9"
_THEMED = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line"}
_SERIES = ("#4f83d6", "#2a9d8f", "#e8833a", "#9b6bc4", "#d65f7a", "#b59a2b", "#5aa9c9", "#8492a6")
_WIDTH = 5.0
_MOST_BARS = 40
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sparsefit",
    "text.parse_math": False,
    "text.color": _INK,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}
_FONT = "system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif"


def _styled(draw: Callable[[Mapping[str, Any]], str | None]) -> Callable[[Mapping[str, Any]], str | None]:
    """Draw in the project's style, whatever the user's matplotlibrc says, and leave no global state behind."""

    @functools.wraps(draw)
    def styled(report: Mapping[str, Any]) -> str | None:
        from matplotlib import style

        with style.context(["default", _STYLE]):
            return draw(report)

    return styled


@_styled
def quality(report: Mapping[str, Any]) -> str | None:
    """Bars of each metric for the dense, the pruned and the recovered model; None where nothing was measured."""
    measured = {name: values for name in _report.metrics(report) if (values := _report.metric_values(report, name))}
    if not measured:
        return None
    figure = _figure(_WIDTH, 3.0)
    for axes, (metric, values) in zip(_grid(figure, 1, len(measured)), measured.items(), strict=True):
        bars = axes.bar(range(len(values)), list(values.values()), 0.62, color=[STAGE_COLOURS[s] for s in values])
        labels = [_report.format_metric(metric, value) for value in values.values()]
        axes.bar_label(bars, labels, padding=3, color=_INK, fontsize=11, fontweight="bold")
        axes.set_xticks(range(len(values)), list(values))
        axes.set_xlim(-0.6, max(len(values), 3) - 0.4)
        scale = _scale_of_bars(axes, list(values.values()))
        axes.set_title(f"{metric}{scale} ({_report.metrics(report)[metric]} is better)", loc="left")
        axes.set_yticks([])
        axes.minorticks_off()
        axes.spines["left"].set_visible(False)
    told = "; ".join(
        f"{name}: " + ", ".join(f"{s} {v:.4g}" for s, v in values.items()) for name, values in measured.items()
    )
    return _svg(figure, f"Quality by stage. {told}")


def _scale_of_bars(axes: Axes, values: Sequence[float]) -> str:
    """Linear from zero, unless the smallest bar would vanish beside the largest."""
    if min(values) > 0 and max(values) > 40 * min(values):
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 2, max(values) * 3)
        return ", log scale"
    axes.set_ylim(min(0.0, min(values)), max(*values, 0.0) * 1.15 or 1.0)
    return ""


@_styled
def loss(report: Mapping[str, Any]) -> str | None:
    """Training loss against the GPU-hours spent: raw points and a smoothed line; None where nothing was trained."""
    history = [entry for entry in _report.items(report, "training", "history") if isinstance(entry, Mapping)]
    spent = [(_report.number(entry.get("gpu_hours")), _report.number(entry.get("loss"))) for entry in history]
    points = [(x, y) for x, y in spent if x is not None and y is not None]
    if not points:
        return None
    budget = _report.number(_report.section(report, "gpu_hours").get("budget"))
    factor, unit = _time_unit(points[-1][0])
    hours, losses = [x * factor for x, _ in points], [y for _, y in points]
    smooth, step = _smooth(losses), max(1, len(points) // 500)
    figure = _figure(_WIDTH, 3.0)
    axes = _grid(figure, 1, 1)[0]
    axes.plot(hours[::step], losses[::step], "o", ms=2.6, mew=0, color=_SERIES[0], alpha=0.45)
    axes.plot([*hours[::step], hours[-1]], [*smooth[::step], smooth[-1]], color=_SERIES[0], lw=1.8)
    axes.set_title(f"training loss, {smooth[-1]:.3g} at the end (smoothed)", loc="left")
    axes.set_xlabel(f"{unit} spent, all stages")
    axes.grid(axis="y", color=_LINE, lw=0.7)
    axes.set_axisbelow(True)
    _mark_times(axes, hours, None if budget is None else budget * factor)
    return _svg(
        figure, f"Training loss against {unit} spent, {len(points)} points, smoothed {smooth[-1]:.4g} at the end."
    )


def _mark_times(axes: Axes, hours: Sequence[float], budget: float | None) -> None:
    """Shade what was spent before the first step that was logged and mark the budget where it lies near."""
    near = budget is not None and hours[-1] < 1.25 * budget
    axes.set_xlim(0, 1.02 * max(hours[-1], budget if budget is not None and near else 0) or 1)
    if hours[0] > 0.01 * hours[-1]:
        axes.axvspan(0, hours[0], color=_LINE, alpha=0.6, lw=0)
        _note(axes, hours[0], "first step logged", "left")
    if budget is not None and near:
        axes.axvline(budget, color=_SERIES[4], lw=1.2, ls="--")
        _note(axes, budget, "budget", "right")


def _note(axes: Axes, x: float, text: str, side: str) -> None:
    offset = 4 if side == "left" else -4
    where = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "va": "top", "ha": side}
    axes.annotate(text, (x, 1.0), (offset, -2), fontsize=9, color=_MUTED, **where)


def _time_unit(hours: float) -> tuple[float, str]:
    if hours >= 1:
        return 1.0, "GPU-hours"
    return (60.0, "GPU-minutes") if hours >= 1 / 60 else (3600.0, "GPU-seconds")


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential average without the pull of its start, over about a fifteenth of the points."""
    keep = 1 - 1 / max(1.0, len(values) / 15)
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


@_styled
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

    figure = _figure(_WIDTH, 0.85 + 0.29 * len(rows))
    axes = _grid(figure, 1, 1)[0]
    _draw_cells(figure, axes, cells, (len(rows), len(labels)))
    axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
    shown = range(0, len(blocks), -(-len(blocks) // 14))
    ticks = [*shown, *([len(blocks)] if outside else [])]
    axes.set_xticks([tick + 0.5 for tick in ticks], [labels[tick] for tick in ticks])
    axes.tick_params(length=0)
    axes.set_title("zeros per layer, in percent", loc="left")
    axes.set_xlabel("block" if not outside else "block (other: in no block)")
    low, high = min(cells.values()), max(cells.values())
    return _svg(figure, f"Sparsity of {len(layers)} layers by block and type, from {low:.2%} to {high:.2%}.")


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
    figure = _figure(_WIDTH, 0.7 + 0.27 * len(shown))
    axes = _grid(figure, 1, 1)[0]
    bars = axes.barh(range(len(shown)), [100 * share for _, share, _ in shown], 0.62, color=_SERIES[1])
    axes.bar_label(bars, [f"{share:.2%}" for _, share, _ in shown], padding=4, color=_INK, fontsize=9)
    axes.set_yticks(range(len(shown)), [_shorten(name.removesuffix(".weight")) for name, _, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 100 if max(share for _, share, _ in shown) < 0.85 else 118)
    axes.set_xticks([0, 25, 50, 75, 100])
    more = f", first {len(shown)} of {len(layers)}" if len(layers) > len(shown) else ""
    axes.set_title(f"zeros per layer, in percent{more}", loc="left")
    return _svg(figure, f"Sparsity of {len(layers)} layers.")


def _shorten(text: str, most: int = 28) -> str:
    return text if len(text) <= most else "…" + text[1 - most :]


@_styled
def gpu_hours(report: Mapping[str, Any]) -> str | None:
    """One bar of the GPU-hours by stage, with what was left of the budget; None where no hours were counted."""
    spent = _report.section(report, "gpu_hours")
    parts = [(name, hours) for name, _, hours in _report.stages(report) if hours]
    total = _report.number(spent.get("total"))
    counted = sum(hours for _, hours in parts)
    if total is not None and total > 1.005 * counted:
        parts.append(("other", total - counted))
    total = max(counted, total or 0.0)
    if total <= 0:
        return None
    budget = _report.number(spent.get("budget")) or 0.0
    scale = max(total, budget)
    colours = [_SERIES[index % len(_SERIES)] for index in range(len(parts))]
    if budget > total:
        parts, colours = [*parts, ("left of the budget", budget - total)], [*colours, _LINE]

    figure = _figure(_WIDTH, 1.0 + 0.27 * len(parts))
    bar, key = _grid(figure, 2, 1, height_ratios=[0.45, 0.27 * len(parts)])
    _draw_stack(bar, parts, colours, budget if 0 < budget < total else None)
    key.set(xlim=(0, 1), ylim=(len(parts) - 0.5, -0.5))
    key.axis("off")
    for row, ((name, hours), colour) in enumerate(zip(parts, colours, strict=True)):
        key.plot(0.012, row, "s", ms=8, color=colour)
        for x, text, side in ((0.045, name, "left"), (0.78, _report.format_hours(hours), "right")):
            key.text(x, row, text, ha=side, va="center", color=_INK)
        key.text(0.995, row, f"{hours / scale:.1%}", ha="right", va="center", color=_MUTED)
    whole = f" of {_report.format_hours(budget)}" if budget else ""
    bar.set_title(f"GPU-hours: {_report.format_hours(total)}{whole}", loc="left")
    told = ", ".join(f"{name} {_report.format_hours(hours)}" for name, hours in parts)
    return _svg(figure, f"GPU-hours by stage: {told}.")


def _draw_stack(axes: Axes, parts: Sequence[tuple[str, float]], colours: Sequence[str], budget: float | None) -> None:
    """The stacked bar; a budget that was passed is marked on it."""
    start = 0.0
    for (_, hours), colour in zip(parts, colours, strict=True):
        axes.barh(0, hours, 1.0, left=start, color=colour)
        start += hours
    axes.set(xlim=(0, start), ylim=(-0.5, 0.5))
    axes.axis("off")
    if budget is not None:
        axes.axvline(budget, color=_INK, lw=2)
        side = "right" if budget > start / 2 else "left"
        place = {"textcoords": "offset points", "ha": side, "va": "center", "color": "#ffffff", "fontsize": 9}
        axes.annotate("budget", (budget, 0), (-5 if side == "right" else 5, 0), **place)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _grid(figure: Figure, rows: int, columns: int, **ratios: Any) -> list[Axes]:
    return list(figure.subplots(rows, columns, squeeze=False, gridspec_kw=ratios or None).flat)


def _svg(figure: Figure, description: str) -> str:
    """The figure as one `<svg>` element that scales with the page and shares no id with any other."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    digest = "f" + hashlib.sha256(text.encode()).hexdigest()[:10]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{digest}-", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", _FONT, text)
    for colour, variable in _THEMED.items():
        text = text.replace(colour, f"var({variable}, {colour})")
    label = f'role="img" aria-label="{escape(description)}" stroke-linejoin="round"'
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg {label} \1 xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )
