"""The figures of a run's report: quality and training loss over GPU-hours, and the sparsity of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsefit.reporting import formats
from sparsefit.reporting import report as reading
from sparsefit.reporting.drawing import CARD, INK, MUTED, SERIES, WIDTH, figure_of, metric_axis, styled, svg
from sparsefit.reporting.tables import unique

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STAGE_COLOURS = {"dense": "#8492a6", "pruned": "#e8833a", "reconstructed": "#c9a227", "recovered": "#2a9d8f"}
_STAGE_COLOURS |= {"merged": "#4f83d6", "control": "#9b6bc4"}
_MOST_ROWS = 40


@styled
def timeline(report: Mapping[str, Any]) -> str | None:
    """Each metric over the whole run; None if the report has no timeline.

    The stages, measured on the test data, are joined by one line; validations, measured on other data, by a thinner
    one. The dense model is a horizontal line.
    """
    measured = {name: moments for name in reading.metrics(report) if (moments := reading.timeline(report, name))}
    if not measured:
        return None
    figure = figure_of(WIDTH, 3.6 * len(measured))
    plots = figure.subplots(len(measured), squeeze=False).flat
    for axes, (metric, moments) in zip(plots, measured.items(), strict=True):
        scale = metric_axis(axes, metric, [moment.value for moment in moments])
        axes.set_title(f"{metric} over the run ({scale}{reading.metrics(report)[metric]} is better)")
        _hours_axis(axes, report, moments[-1].hours)
        validations = [(m.hours, m.value) for m in moments if m.stage == "validation"]
        sparse = [(m.hours, m.value) for m in moments if m.stage not in ("dense", "validation")]
        axes.plot(*zip(*sparse, strict=True), color=MUTED, lw=1.6)
        if validations:
            look = {"color": SERIES[0], "lw": 1.0, "marker": "." if len(validations) <= 60 else ""}
            axes.plot(*zip(*validations, strict=True), **look, label="validation data")
        for moment in moments:
            if moment.stage != "validation":
                look = {"color": _STAGE_COLOURS.get(moment.stage, INK), "mec": CARD, "clip_on": False, "zorder": 4}
                label = f"{moment.stage} {formats.metric(metric, moment.value)}"
                axes.plot(moment.hours, moment.value, "o", ms=7, **look, label=label)
            if moment.stage == "dense":
                axes.axhline(moment.value, color=_STAGE_COLOURS["dense"], lw=1.4, ls=(0, (5, 3)))
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2)
    return svg(figure, f"{' and '.join(measured)} against GPU-hours spent")


@styled
def loss(report: Mapping[str, Any]) -> str | None:
    """Training loss against GPU-hours spent: raw points and a smoothed line; None if nothing was trained."""
    history = reading.entries(report, "training", "history")
    spent = [(reading.number(entry.get("gpu_hours")), reading.number(entry.get("loss"))) for entry in history]
    points = [(x, y) for x, y in spent if x is not None and y is not None]
    if not points:
        return None
    keep = 1 - 1 / max(1.0, len(points) / 15)
    total = weight = 0.0
    smooth = []
    for _, value in points:  # a bias-corrected exponential average
        total, weight = keep * total + value, keep * weight + 1
        smooth.append(total / weight)
    figure = figure_of(WIDTH, 3.0)
    axes = figure.subplots()
    _hours_axis(axes, report, points[-1][0])
    hours, losses = zip(*points, strict=True)
    step = max(1, len(points) // 500)
    axes.plot(hours[::step], losses[::step], "o", ms=2.6, mew=0, color=SERIES[0], alpha=0.45)
    axes.plot([*hours[::step], hours[-1]], [*smooth[::step], smooth[-1]], color=SERIES[0], lw=1.8)
    axes.set_title(f"training loss, {smooth[-1]:.3g} at the end (smoothed)")
    axes.grid(axis="y")
    return svg(figure, f"Training loss against GPU-hours spent, smoothed {smooth[-1]:.4g} at the end")


def _hours_axis(axes: Axes, report: Mapping[str, Any], last: float) -> None:
    """Scale the x axis from 0 to `last` GPU-hours, and to the budget if that is near."""
    budget = reading.number(reading.section(report, "gpu_hours").get("budget"))
    if budget is not None and 0.25 * budget < last < 1.25 * budget:
        axes.axvline(budget, color=SERIES[4], lw=1.2, ls="--", label=f"budget {formats.hours(budget)}")
        last = max(last, budget)
    axes.set_xlim(0, 1.02 * last or 1)
    axes.set_xlabel("GPU-hours spent, all stages")
    axes.locator_params(axis="x", nbins=6)


@styled
def sparsity(report: Mapping[str, Any]) -> str | None:
    """A map of sparsity by layer type and block; layers outside blocks have their own column."""
    import numpy as np

    layers = [e for e in reading.entries(report, "sparsity", "layers") if reading.layer_sparsity(e) is not None]
    if not layers:
        return None
    names = [str(layer.get("name", "?")) for layer in layers]
    types, inside = unique(map(reading.layer_type, names)), unique(map(reading.block_of, names))
    blocks, outside = sorted(filter(None, inside)), None in inside
    zeros, weights = np.zeros((2, len(types), len(blocks) + outside))
    for name, layer in zip(names, layers, strict=True):
        block, count = reading.block_of(name), reading.number(layer.get("weights")) or 1.0
        cell = types.index(reading.layer_type(name)), blocks.index(block) if block else -1
        zeros[cell] += reading.layer_sparsity(layer) * count
        weights[cell] += count
    shares = np.divide(100 * zeros, weights, out=np.full(zeros.shape, np.nan), where=weights > 0)[:_MOST_ROWS]
    types, more = types[:_MOST_ROWS], f", first {_MOST_ROWS} of {len(types)}" if len(types) > _MOST_ROWS else ""
    figure = figure_of(WIDTH, 0.85 + 0.29 * len(types))
    axes = figure.subplots()
    _draw_cells(axes, shares)
    labels = [*_block_labels(blocks), *["other"] * outside]
    ticks = [*range(0, len(blocks), -(-len(blocks) // 14) or 1), *[len(blocks)] * outside]
    axes.set_xticks([tick + 0.5 for tick in ticks], [labels[tick] for tick in ticks])
    names = [kind if len(kind) <= 28 else f"…{kind[-27:]}" for kind in types]
    axes.set_yticks([row + 0.5 for row in range(len(types))], names)
    axes.set_title(f"zeros per layer, in percent{more}")
    axes.set_xlabel("block (other: in no block)" if outside else "block")
    return svg(figure, f"Sparsity of {len(layers)} layers by block and type")


def _draw_cells(axes: Axes, shares: Any) -> None:
    """Draw coloured cells, with their values if there is room; the first row is at the top."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    known = shares[~np.isnan(shares)]
    spread = max(0.0, 20 - np.ptp(known)) / 2  # a narrower scale would exaggerate rounding
    low, high = max(0.0, known.min() - spread), min(100.0, known.max() + spread)
    colours = LinearSegmentedColormap.from_list("sparsity", ["#d9f0e6", "#4fb3a5", "#17566b", "#0d2a45"], N=48)
    look = {"edgecolors": "#ffffff", "linewidth": 0.8} if shares.shape[1] <= 40 else {}
    mesh = axes.pcolormesh(np.ma.masked_invalid(shares), cmap=colours, vmin=low, vmax=high, **look)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.02)
    bar.solids.set_edgecolor("face")
    bar.outline.set_visible(False)
    digits = 0 if np.allclose(known, known.round(), atol=0.05) else 1
    for (row, column), share in np.ndenumerate(shares) if shares.shape[1] <= 12 else ():
        if not np.isnan(share):
            ink = "#ffffff" if share > low + 0.45 * (high - low) else "#10202e"
            axes.text(column + 0.5, row + 0.5, f"{share:.{digits}f}", ha="center", va="center", color=ink, fontsize=9)


def _block_labels(blocks: list[tuple[str, tuple[int, ...]]]) -> list[str]:
    """ "3", or "1.3" for block 3 of stage 1; with several paths, preceded by the segments in which they differ."""
    shared = set.intersection(*({*path.split(".")} for path, _ in blocks)) if blocks else set()
    leads = (" ".join(part for part in path.split(".") if part not in shared) for path, _ in blocks)
    return [f"{lead} {'.'.join(map(str, index))}".strip() for lead, (_, index) in zip(leads, blocks, strict=True)]
