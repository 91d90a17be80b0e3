"""The figure of a report that shows quality against the GPU-hours spent, for the whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsefit.reporting import formats as _formats
from sparsefit.reporting import report as _report
from sparsefit.reporting.drawing import (
    CARD,
    INK,
    LINE,
    MUTED,
    STAGE_COLOURS,
    WIDTH,
    figure_of,
    grid,
    mark_budget,
    styled,
    svg,
    time_unit,
)
from sparsefit.reporting.report import Moment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOG_FROM = 2.5  # a metric that spans more than this factor is drawn on a log scale


@styled
def timeline(report: Mapping[str, Any]) -> str | None:
    """Each metric over the whole run; None where the report holds no timeline.

    The stages, measured on the test data, are joined by one line; validations, measured on other data, by a thinner
    one. The dense model is a horizontal line.
    """
    measured = {name: moments for name in _report.metrics(report) if (moments := _report.timeline(report, name))}
    if not measured:
        return None
    factor, unit = time_unit(max(moments[-1].hours for moments in measured.values()))
    budget = _report.number(_report.section(report, "gpu_hours").get("budget"))
    figure = figure_of(WIDTH, 3.3 * len(measured))
    figure.get_layout_engine().set(h_pad=0.1)
    for axes, (metric, moments) in zip(grid(figure, len(measured), 1), measured.items(), strict=True):
        better = _report.metrics(report)[metric]
        moments = [moment._replace(hours=factor * moment.hours) for moment in moments]
        scale = _scale(axes, metric, [moment.value for moment in moments])
        mark_budget(axes, moments[-1].hours, None if budget is None else factor * budget)
        _draw(axes, metric, moments, better)
        axes.set_title(f"{metric} over the run{scale} ({better} is better)", loc="left")
        axes.set_xlabel(f"{unit} spent, all stages")
    told = "; ".join(
        f"{name}: " + ", ".join(f"{m.stage} {m.value:.4g} after {m.hours * factor:.3g}" for m in moments)
        for name, moments in measured.items()
    )
    return svg(figure, f"Quality against {unit} spent. {told}")


def _scale(axes: Axes, metric: str, values: Sequence[float]) -> str:
    """Room for the labels above and below the values; a log scale for positive values that lie far apart."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    low, high = min(values), max(values)
    share = "accuracy" in metric and low >= 0 and high <= 1
    plain = FuncFormatter(lambda value, _: f"{100 * value:g}%" if share else f"{value:g}")
    log = low > 0 and high > _LOG_FROM * low
    if log:
        axes.set_yscale("log")
        room = (high / low) ** 0.16
        axes.set_ylim(low / room, high * room)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    else:
        room = 0.16 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(plain)
    axes.grid(axis="y", color=LINE, lw=0.7)
    axes.set_axisbelow(True)
    return ", log scale" if log else ""


def _draw(axes: Axes, metric: str, moments: Sequence[Moment], better: str) -> None:
    validations = [moment for moment in moments if moment.stage == "validation"]
    stages = [moment for moment in moments if moment.stage != "validation"]
    dense = next((moment for moment in stages if moment.stage == "dense"), None)
    if dense is not None:
        axes.axhline(dense.value, color=STAGE_COLOURS["dense"], lw=1.4, ls=(0, (5, 3)))
    sparse = [moment for moment in stages if moment.stage != "dense"]
    axes.plot([m.hours for m in sparse], [m.value for m in sparse], color=MUTED, lw=1.6)
    if validations:
        line = {"color": STAGE_COLOURS["merged"], "lw": 1.0, "alpha": 0.75}
        shown = {"marker": "o", "ms": 3, "mew": 0} if len(validations) <= 60 else {}
        axes.plot([m.hours for m in validations], [m.value for m in validations], **line, **shown)
    for moment in stages:
        colour = STAGE_COLOURS.get(moment.stage, INK)
        axes.plot(moment.hours, moment.value, "o", ms=7, color=colour, mec=CARD, mew=1, clip_on=False, zorder=4)
    if validations:
        among = validations[len(validations) // 3]
        _text(axes, among, "validation data", "center", better == "higher", STAGE_COLOURS["merged"], 9)
    for group in _groups(axes, stages):
        _label(axes, metric, group, better)


def _groups(axes: Axes, moments: Sequence[Moment]) -> list[list[Moment]]:
    """Stages whose marks fall together share a label."""
    groups: list[list[Moment]] = []
    for moment in moments:
        place = axes.transAxes.inverted().transform(axes.transData.transform((moment.hours, moment.value)))
        if groups:
            before = groups[-1][-1]
            other = axes.transAxes.inverted().transform(axes.transData.transform((before.hours, before.value)))
            if abs(place[0] - other[0]) < 0.3 and abs(place[1] - other[1]) < 0.06:
                groups[-1].append(moment)
                continue
        groups.append([moment])
    return groups


def _label(axes: Axes, metric: str, group: Sequence[Moment], better: str) -> None:
    """Names and values, on the side of the marks that the line to the next one leaves free."""
    first, last = group[0], group[-1]
    left, right = axes.get_xlim()
    early = last.hours < (left + right) / 2
    values = [_formats.metric(metric, moment.value) for moment in group]
    if len(set(values)) == 1:
        text = f"{', '.join(moment.stage for moment in group)} {values[0]}"
    else:
        text = ", ".join(f"{moment.stage} {value}" for moment, value in zip(group, values, strict=True))
    above = (better == "lower") == (early and first.stage != "dense")
    _text(axes, first if early else last, text, "left" if early else "right", above)


def _text(axes: Axes, moment: Moment, text: str, side: str, above: bool, colour: str = INK, size: int = 10) -> None:
    box = {"boxstyle": "square,pad=0.15", "fc": CARD, "ec": "none", "alpha": 0.8}
    place = {"textcoords": "offset points", "ha": side, "va": "bottom" if above else "top", "bbox": box, "zorder": 3}
    axes.annotate(text, (moment.hours, moment.value), (0, 7 if above else -7), fontsize=size, color=colour, **place)
