"""The figures of a report: quality by stage and over the run, training loss, GPU-hours, seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsefit.reporting import formats as _formats
from sparsefit.reporting import report as _report
from sparsefit.reporting.drawing import (
    INK,
    LINE,
    MUTED,
    SERIES,
    STAGE_COLOURS,
    WIDTH,
    figure_of,
    grid,
    mark_budget,
    note,
    styled,
    svg,
    time_unit,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def quality(report: Mapping[str, Any]) -> str | None:
    """Bars of each metric for the dense, the pruned, the recovered model; None where nothing was measured."""
    measured = {name: values for name in _report.metrics(report) if (values := _report.metric_values(report, name))}
    if not measured:
        return None
    figure = figure_of(WIDTH, 3.0)
    for axes, (metric, values) in zip(grid(figure, 1, len(measured)), measured.items(), strict=True):
        bars = axes.bar(range(len(values)), list(values.values()), 0.62, color=[STAGE_COLOURS[s] for s in values])
        labels = [_formats.metric(metric, value) for value in values.values()]
        axes.bar_label(bars, labels, padding=3, color=INK, fontsize=11, fontweight="bold")
        crowded = len(values) * len(measured) > 5
        turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axes.set_xticks(range(len(values)), list(values), fontsize=9 if len(values) > 4 else 10, **turned)
        axes.set_xlim(-0.6, max(len(values), 3) - 0.4)
        scale = _scale_of_bars(axes, list(values.values()))
        axes.set_title(f"{metric}{scale} ({_report.metrics(report)[metric]} is better)", loc="left")
        axes.set_yticks([])
        axes.minorticks_off()
        axes.spines["left"].set_visible(False)
    told = "; ".join(
        f"{name}: " + ", ".join(f"{s} {v:.4g}" for s, v in values.items()) for name, values in measured.items()
    )
    return svg(figure, f"Quality by stage. {told}")


def _scale_of_bars(axes: Axes, values: Sequence[float]) -> str:
    """Linear from zero, unless the smallest bar would vanish beside the largest."""
    if min(values) > 0 and max(values) > 40 * min(values):
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 2, max(values) * 3)
        return ", log scale"
    axes.set_ylim(min(0.0, min(values)), max(*values, 0.0) * 1.15 or 1.0)
    return ""


@styled
def loss(report: Mapping[str, Any]) -> str | None:
    """Training loss against the GPU-hours spent: raw points and a smoothed line; None where nothing was trained."""
    history = [entry for entry in _report.items(report, "training", "history") if isinstance(entry, Mapping)]
    spent = [(_report.number(entry.get("gpu_hours")), _report.number(entry.get("loss"))) for entry in history]
    points = [(x, y) for x, y in spent if x is not None and y is not None]
    if not points:
        return None
    budget = _report.number(_report.section(report, "gpu_hours").get("budget"))
    factor, unit = time_unit(points[-1][0])
    hours, losses = [x * factor for x, _ in points], [y for _, y in points]
    smooth, step = _smooth(losses), max(1, len(points) // 500)
    figure = figure_of(WIDTH, 3.0)
    axes = grid(figure, 1, 1)[0]
    axes.plot(hours[::step], losses[::step], "o", ms=2.6, mew=0, color=SERIES[0], alpha=0.45)
    axes.plot([*hours[::step], hours[-1]], [*smooth[::step], smooth[-1]], color=SERIES[0], lw=1.8)
    axes.set_title(f"training loss, {smooth[-1]:.3g} at the end (smoothed)", loc="left")
    axes.set_xlabel(f"{unit} spent, all stages")
    axes.grid(axis="y", color=LINE, lw=0.7)
    axes.set_axisbelow(True)
    mark_budget(axes, hours[-1], None if budget is None else budget * factor)
    if hours[0] > 0.01 * hours[-1]:
        axes.axvspan(0, hours[0], color=LINE, alpha=0.6, lw=0)
        note(axes, hours[0], "first step logged", "left")
    return svg(
        figure, f"Training loss against {unit} spent, {len(points)} points, smoothed {smooth[-1]:.4g} at the end."
    )


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential average without the pull of its start, over about a fifteenth of the points."""
    keep = 1 - 1 / max(1.0, len(values) / 15)
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


@styled
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
    colours = [SERIES[index % len(SERIES)] for index in range(len(parts))]
    if budget > total:
        parts, colours = [*parts, ("left of the budget", budget - total)], [*colours, LINE]
    whole = f" of {_formats.hours(budget)}" if budget else ""
    title = f"GPU-hours: {_formats.hours(total)}{whole}"
    figure = stacked_bar(title, parts, colours, _formats.hours, budget if 0 < budget < total else None)
    told = ", ".join(f"{name} {_formats.hours(hours)}" for name, hours in parts)
    return svg(figure, f"GPU-hours by stage: {told}.")


@styled
def time_by_kind(spent: Mapping[str, float]) -> str | None:
    """One bar of the seconds spent on each kind of work; None where there are none."""
    if not spent:
        return None
    colours = [SERIES[index % len(SERIES)] for index in range(len(spent))]
    title = f"Time: {_formats.seconds(sum(spent.values()))}"
    told = ", ".join(f"{kind} {_formats.seconds(seconds)}" for kind, seconds in spent.items())
    return svg(stacked_bar(title, list(spent.items()), colours, _formats.seconds), f"Time by kind of work: {told}.")


def stacked_bar(
    title: str,
    parts: Sequence[tuple[str, float]],
    colours: Sequence[str],
    shown: Callable[[float], str],
    budget: float | None = None,
) -> Figure:
    """A bar of the parts of a whole, and below it the name, the amount as `shown` writes it and the share of each."""
    figure = figure_of(WIDTH, 1.0 + 0.27 * len(parts))
    bar, key = grid(figure, 2, 1, height_ratios=[0.45, 0.27 * len(parts)])
    _draw_stack(bar, parts, colours, budget)
    key.set(xlim=(0, 1), ylim=(len(parts) - 0.5, -0.5))
    key.axis("off")
    whole = sum(amount for _, amount in parts)
    for row, ((name, amount), colour) in enumerate(zip(parts, colours, strict=True)):
        key.plot(0.012, row, "s", ms=8, color=colour)
        for x, text, side in ((0.045, name, "left"), (0.78, shown(amount), "right")):
            key.text(x, row, text, ha=side, va="center", color=INK)
        key.text(0.995, row, f"{amount / whole:.1%}", ha="right", va="center", color=MUTED)
    bar.set_title(title, loc="left")
    return figure


def _draw_stack(axes: Axes, parts: Sequence[tuple[str, float]], colours: Sequence[str], budget: float | None) -> None:
    """The stacked bar; a budget that was passed is marked on it."""
    start = 0.0
    for (_, hours), colour in zip(parts, colours, strict=True):
        axes.barh(0, hours, 1.0, left=start, color=colour)
        start += hours
    axes.set(xlim=(0, start), ylim=(-0.5, 0.5))
    axes.axis("off")
    if budget is not None:
        axes.axvline(budget, color=INK, lw=2)
        side = "right" if budget > start / 2 else "left"
        place = {"textcoords": "offset points", "ha": side, "va": "center", "color": "#ffffff", "fontsize": 9}
        axes.annotate("budget", (budget, 0), (-5 if side == "right" else 5, 0), **place)
