"""The figures of a pruning study: a metric against sparsity, by score and by granularity; the time by kind of work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsefit.reporting import formats as _formats
from sparsefit.reporting import report as _report
from sparsefit.reporting.drawing import CARD, INK, LINE, MUTED, SERIES, WIDTH, figure_of, grid, standalone, styled, svg
from sparsefit.reporting.figures import time_by_kind
from sparsefit.reporting.study_results import (
    PRUNED,
    Point,
    Results,
    headline,
    is_log,
    per,
    read_results,
    seconds_by_kind,
    share,
    unique,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OFF_SCALE = 30  # a perplexity that is more than so many times the dense model's is drawn at the edge
_ORDERS = ("-", (0, (1.2, 1.2)), (0, (7, 1.5, 1.5, 1.5)), (0, (10, 2)))
_MARKS = ("o", "s", "v", "P")
_PATTERN_MARKS = ("D", "h", "*", "X")
_TUNED = (0, (4, 2))
_LONGEST_NAME = 40


class Line(NamedTuple):
    """Values by sparsity, joined by a line; those of N:M patterns are marks that are joined to nothing."""

    name: str
    colour: str
    stage: str
    order: str
    pattern: str
    points: list[tuple[float, float]]  # (sparsity, value)
    spreads: Mapping[float, float] = {}  # by sparsity, of the values that have several runs


class Kinds(NamedTuple):
    """What the lines of a figure differ in beside their colours."""

    stages: list[str]
    orders: list[str]
    patterns: list[str]


class Panel(NamedTuple):
    """One plot of a metric against sparsity."""

    title: str
    subtitle: str
    metric: str
    better: str
    dense: float | None
    lines: list[Line]


def study_figures(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The figures of a study as SVG files that stand alone, in light and in dark.

    Args:
        study: The study: its metrics, its models, its seconds.
        rows: Its rows, one for each point and stage.

    Returns:
        The text of each file by its stem: `scores` (the first metric of each model against sparsity, a line for each
        score), `granularities` (a panel for each model and score with more than one) and `time`, so far as there is
        anything to draw.
    """
    found = {
        "scores": draw_panels(score_panels(study, rows)),
        "granularities": draw_panels(granularity_panels(study, rows)),
        "time": time_by_kind(seconds_by_kind(study)),
    }
    return {stem: standalone(figure) for stem, figure in found.items() if figure}


def score_panels(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], metric: str | None = None) -> list[Panel]:
    """A panel for each model: a line for each score, order and stage, marks for the N:M patterns.

    Each score is shown with its `headline` granularity. `metric` None takes the first that was measured on each model.
    """
    results = read_results(study, rows)
    colours = _colours(unique(point.way.score for point in results.points))
    panels = []
    for model in results.models:
        shown = {score: way.granularity for score in colours if (way := headline(results, model, score))}
        points = [
            point
            for point in results.points
            if point.model == model and (point.pattern or point.way.granularity == shown[point.way.score])
        ]
        found = _panel(results, model, metric or results.metric_of(model), _granularities(shown))
        panels.append(found._replace(lines=_lines(results, found.metric, points, colours)))
    return [panel for panel in panels if panel.lines]


def granularity_panels(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """A panel for each model and score that was used with more than one granularity: a line for each of them."""
    results = read_results(study, rows)
    points = [point for point in results.points if not point.pattern]
    colours = _colours(unique(per(point.way.granularity) for point in points), 3)
    panels = []
    for model in results.models:
        for score in unique(point.way.score for point in points):
            own = [point for point in points if point.model == model and point.way.score == score]
            if len({point.way.granularity for point in own}) > 1:
                found = _panel(results, model, results.metric_of(model), score)
                panels.append(found._replace(lines=_lines(results, found.metric, own, colours, by_score=False)))
    return [panel for panel in panels if panel.lines]


def _colours(names: Sequence[str], start: int = 0) -> dict[str, str]:
    """The same colour for a score, or a granularity, in all panels of a study."""
    return {name: SERIES[(start + index) % len(SERIES)] for index, name in enumerate(names)}


def _granularities(shown: Mapping[str, str]) -> str:
    """Which granularity the scores are shown with: `per layer`, or `per layer: magnitude; per output: wanda`."""
    groups: dict[str, list[str]] = {}
    for score, granularity in shown.items():
        groups.setdefault(per(granularity), []).append(score)
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{granularity}: {', '.join(scores)}" for granularity, scores in groups.items())


def _panel(results: Results, model: str, metric: str, subtitle: str) -> Panel:
    dense = _report.number(results.dense.get(model, {}).get(metric))
    title = model if len(model) <= _LONGEST_NAME else f"{model[: _LONGEST_NAME - 1]}…"
    return Panel(title, subtitle, metric, results.metrics.get(metric, "higher"), dense, [])


def _lines(
    results: Results, metric: str, points: Iterable[Point], colours: Mapping[str, str], by_score: bool = True
) -> list[Line]:
    """Lines by score or by granularity, then by stage and order; the marks of patterns are lines of their own."""
    found: dict[tuple[str, str, str, str], list[tuple[float, float]]] = {}
    spreads: dict[tuple[str, str, str, str], dict[float, float]] = {}
    for point in points:
        value = point.values.get(metric, -math.inf)
        name = point.way.score if by_score else per(point.way.granularity)
        key = (name, point.stage, results.order(point), point.pattern)
        if value > -math.inf:
            found.setdefault(key, []).append((point.sparsity, value))
            if point.runs > 1 and metric in point.spreads:
                spreads.setdefault(key, {})[point.sparsity] = point.spreads[metric]
    ranks, stages = list(colours), results.stages()
    keys = sorted(found, key=lambda key: (ranks.index(key[0]), stages.index(key[1])))
    return [Line(key[0], colours[key[0]], *key[1:], sorted(found[key]), spreads.get(key, {})) for key in keys]


@styled
def draw_panels(panels: Sequence[Panel]) -> str | None:
    """The panels side by side in one figure with one key below them; None where there are none."""
    if not panels:
        return None
    columns = 1 if len(panels) == 1 else 2 if len(panels) <= 4 else 3
    lines = [line for panel in panels for line in panel.lines]
    kinds = Kinds(
        *(unique(getattr(line, of) for line in lines if getattr(line, of)) for of in ("stage", "order", "pattern"))
    )
    figure = figure_of((WIDTH, 8.8, 10.8)[columns - 1], 3.2 * math.ceil(len(panels) / columns) + 0.4)
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    plots = grid(figure, math.ceil(len(panels) / columns), columns)
    for axes, panel in zip(plots, panels, strict=False):
        _draw(axes, panel, kinds)
    for axes in plots[len(panels) :]:
        axes.axis("off")
    _draw_key(figure, lines, kinds, 4 if columns == 1 else 3 * columns)
    return svg(figure, " ".join(map(_told, panels)))


def _draw(axes: Axes, panel: Panel, kinds: Kinds) -> None:
    top = _scale(axes, panel)
    for line in panel.lines:
        _draw_line(axes, line, _style(line, kinds), top)
    off = [(line.pattern or share(x), y) for line in panel.lines for x, y in line.points if y > top]
    if off:
        told = ", ".join(f"{_formats.metric(panel.metric, y)} at {amount}" for amount, y in off)
        if len(off) > 3:
            told = f"{len(off)} points, to {_formats.metric(panel.metric, max(y for _, y in off))}"
        axes.set_xlabel("sparsity", loc="left", fontsize=9)
        place = {"xycoords": ("axes fraction", axes.xaxis.label), "ha": "right", "fontsize": 9, "color": MUTED}
        axes.annotate(f"▲ off the scale: {told}", (1, 0), **place)
    else:
        axes.set_xlabel("sparsity", fontsize=9)
    if panel.dense is not None:
        axes.axhline(panel.dense, color=MUTED, lw=1.1, zorder=2)
        above = panel.better == "higher"
        place = {"xycoords": axes.get_yaxis_transform(), "ha": "right", "va": "bottom" if above else "top"}
        text = f"dense {_formats.metric(panel.metric, panel.dense)}"
        offset = {"textcoords": "offset points", "fontsize": 9, "color": MUTED}
        axes.annotate(text, (1, panel.dense), (-2, 3 if above else -3), **offset, **place)
    axes.set_title(panel.title, loc="left", fontweight="bold", pad=18)
    axes.annotate(panel.subtitle, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", color=MUTED)
    scale = "log scale, " if axes.get_yscale() == "log" else ""
    axes.set_ylabel(f"{panel.metric.replace('_', ' ')} ({scale}{panel.better} is better)", fontsize=9)


def _scale(axes: Axes, panel: Panel) -> float:
    """Set limits and ticks; returns the highest value that is drawn where it belongs."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    sparsities = unique(sorted(x for line in panel.lines for x, _ in line.points))
    room = 0.06 * (sparsities[-1] - sparsities[0]) or 0.05
    axes.set_xlim(sparsities[0] - room, sparsities[-1] + room)
    if len(sparsities) <= 8:
        axes.set_xticks(sparsities)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: share(value)))
    values = [y for line in panel.lines for _, y in line.points]
    finite = [y for y in [*values, panel.dense] if y is not None and math.isfinite(y)] or [1.0]
    low, high = min(finite), max(finite)
    log = is_log(panel.metric) and low > 0
    if log:
        least = _OFF_SCALE * (panel.dense or low)
        high = max([y for y in finite if y <= least] + [min(2 * low, high)])
        axes.set_yscale("log")
        spread = max(high / low, 1.05)
        axes.set_ylim(low / spread**0.14, high * spread**0.14)
        axes.yaxis.set_major_locator(
            MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)) if spread < 4 else LogLocator(subs=(1, 2, 5))
        )
    else:
        spread = (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - 0.08 * spread, high + 0.12 * spread)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    shares = "accuracy" in panel.metric and 0 <= low <= high <= 1
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: share(value) if shares else f"{value:,.5g}"))
    axes.minorticks_off()
    axes.grid(axis="y", color=LINE, lw=0.7)
    axes.set_axisbelow(True)
    return axes.get_ylim()[1]


def _draw_line(axes: Axes, line: Line, style: Mapping[str, Any], top: float) -> None:
    """A line with bars of a standard deviation, cut between points that are both off the scale; those points are
    triangles at the upper edge."""
    path: list[tuple[float, float]] = []
    for (x, y), before in zip(line.points, [None, *line.points], strict=False):
        if before is not None and min(y, before[1]) > top:
            path.append((x, math.nan))
        path.append((x, min(y, top)))
        mark = {"marker": "^", "ms": 7} if y > top else {}
        axes.plot(x, min(y, top), **style | {"ls": ""} | mark, clip_on=False, zorder=3 + bool(line.pattern))
        if y <= top and x in line.spreads:
            axes.errorbar(x, y, line.spreads[x], fmt="none", ecolor=line.colour, elinewidth=1.2, capsize=3, zorder=2.6)
    axes.plot(*zip(*path, strict=True), **style | {"marker": ""}, zorder=2.5)


def _style(line: Line, kinds: Kinds) -> dict[str, Any]:
    """Filled marks right after pruning, hollow ones on dashes after fine-tuning; a pattern has marks and no line."""
    tuned = line.stage != PRUNED
    order = kinds.orders.index(line.order) % len(_ORDERS) if line.order else 0
    pattern = kinds.patterns.index(line.pattern) % len(_PATTERN_MARKS) if line.pattern else 0
    return {
        "color": line.colour,
        "ls": "" if line.pattern else _TUNED if tuned else _ORDERS[order],
        "lw": 1.5 if tuned else 1.9,
        "marker": _PATTERN_MARKS[pattern] if line.pattern else _MARKS[order],
        "ms": 7 if line.pattern else 5.5,
        "mfc": CARD if tuned else line.colour,
        "mec": line.colour if tuned else CARD,
        "mew": 1.4 if tuned else 0.8,
    }


def _draw_key(figure: Figure, lines: Sequence[Line], kinds: Kinds, columns: int) -> None:
    from matplotlib.lines import Line2D

    stages = kinds.stages if kinds.stages != [PRUNED] else []
    entries = [Line(*named, PRUNED, "", "", []) for named in unique((line.name, line.colour) for line in lines)]
    entries += [Line(f"update {order}", INK, PRUNED, order, "", []) for order in kinds.orders]
    entries += [Line(stage, INK, stage, "", "", []) for stage in stages]
    entries += [Line(pattern, INK, PRUNED, "", pattern, []) for pattern in kinds.patterns]
    handles = [Line2D([], [], **_style(line, kinds), label=line.name) for line in entries]
    columns = _columns([line.name for line in entries], columns, figure.get_figwidth())
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _columns(names: Sequence[str], most: int, width: float) -> int:
    """As many columns as a key of these names may have in so many inches; it is filled column by column."""

    def needs(columns: int) -> float:
        rows, longer = divmod(len(names), columns)
        starts = [column * rows + min(column, longer) for column in range(columns + 1)]
        widest = (max(map(len, names[start:end])) for start, end in pairwise(starts))
        return sum(0.6 + 0.068 * count for count in widest)  # inches of a handle and of a letter

    return next((count for count in range(min(most, len(names)), 1, -1) if needs(count) <= width), 1)


def _told(panel: Panel) -> str:
    """A panel in words."""
    parts = [f"dense {panel.dense:.4g}"] if panel.dense is not None else []
    for line in panel.lines:
        spreads = {x: f" ± {spread:.2g}" for x, spread in line.spreads.items()}
        values = ", ".join(f"{line.pattern or share(x)} {y:.4g}{spreads.get(x, '')}" for x, y in line.points)
        order = f", update {line.order}" if line.order else ""
        parts.append(f"{line.name}{order}, {line.stage}: {values}")
    return f"{panel.title}, {panel.subtitle}: {panel.metric} against sparsity; {'; '.join(parts)}."
