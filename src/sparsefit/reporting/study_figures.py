"""The figures of a pruning study: a metric against sparsity, by score and by granularity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsefit.reporting import formats
from sparsefit.reporting import report as reading
from sparsefit.reporting.drawing import CARD, INK, MUTED, SERIES, WIDTH, figure_of, metric_axis, standalone, styled, svg
from sparsefit.reporting.study_results import PRUNED, Point, Results, headline, is_log, per, read_results, share
from sparsefit.reporting.tables import unique

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OFF_SCALE = 30  # perplexities above this multiple of the dense model's are drawn at the edge
_ORDERS = (("-", "o"), ((0, (1.2, 1.2)), "s"), ((0, (7, 1.5, 1.5, 1.5)), "v"), ((0, (10, 2)), "P"))
_PATTERNS = ("D", "h", "*", "X")


class Line(NamedTuple):
    """Values by sparsity, joined by a line; those of N:M patterns are single marks."""

    name: str
    colour: str
    stage: str = PRUNED
    order: str = ""
    pattern: str = ""
    points: Sequence[tuple[float, float]] = ()  # (sparsity, value)
    spreads: Mapping[float, float] = {}  # by sparsity, for values with several runs


class Panel(NamedTuple):
    """One plot of a metric against sparsity."""

    title: str
    subtitle: str
    metric: str
    better: str
    dense: float | None
    lines: list[Line]


def study_figures(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The figures of a study by the stem of their files; those with nothing to draw are left out.

    `scores` is the first metric of each model against sparsity, `granularities` has a panel for each model and score
    with several granularities. Each is a standalone SVG with a light and a dark theme.
    """
    results = read_results(study, rows)
    panels = {"scores": score_panels(results), "granularities": granularity_panels(results)}
    drawn = {stem: draw_panels(own) for stem, own in panels.items() if own}
    return {stem: standalone(figure) for stem, figure in drawn.items() if figure is not None}


def score_panels(results: Results, metric: str | None = None) -> list[Panel]:
    """A panel for each model: a line for each score, order and stage, marks for the N:M patterns.

    Each score is shown with its `headline` granularity. If `metric` is None, it is the first one measured on each
    model.
    """
    panels = []
    for model in results.models:
        own = [point for point in results.points if point.model == model]
        heads = {score: headline(results, model, score) for score in unique(point.way.score for point in own)}
        own = [point for point in own if point.pattern or point.way.granularity == heads[point.way.score].granularity]
        groups: dict[str, list[str]] = {}
        for score, way in heads.items():
            groups.setdefault(per(way.granularity) if way else "", []).append(score)
        subtitles = [f"{how}: {', '.join(scores)}" for how, scores in groups.items()] if len(groups) > 1 else groups
        panels.append(
            _panel(results, metric or results.metric_of(model), "; ".join(subtitles), own, attrgetter("way.score"))
        )
    return [panel for panel in panels if panel.lines]


def granularity_panels(results: Results) -> list[Panel]:
    """A panel for each model and score with more than one granularity: a line for each granularity."""
    points = [point for point in results.points if not point.pattern]
    panels = []
    for model, score in unique((point.model, point.way.score) for point in points):
        own = [point for point in points if (point.model, point.way.score) == (model, score)]
        if len({point.way.granularity for point in own}) > 1:
            panels.append(_panel(results, results.metric_of(model), score, own, lambda p: per(p.way.granularity), 3))
    return [panel for panel in panels if panel.lines]


def _panel(
    results: Results, metric: str, subtitle: str, points: Sequence[Point], name: Callable[[Point], str], colour: int = 0
) -> Panel:
    """Lines by name, then by stage and order; a name has the same colour in all panels of a study."""
    names, stages = unique(map(name, results.points)), results.stages()
    found: dict[tuple[str, ...], list[Point]] = {}
    for point in sorted(
        points, key=lambda point: (names.index(name(point)), stages.index(point.stage), point.sparsity)
    ):
        if point.values.get(metric, -math.inf) > -math.inf:
            found.setdefault((name(point), point.stage, point.order, point.pattern), []).append(point)
    lines = []
    for key, own in found.items():
        values = [(point.sparsity, point.values[metric]) for point in own]
        spreads = {p.sparsity: p.spreads[metric] for p in own if p.runs > 1 and metric in p.spreads}
        lines.append(Line(key[0], SERIES[(names.index(key[0]) + colour) % len(SERIES)], *key[1:], values, spreads))
    model = points[0].model if points else ""
    dense = reading.number(results.dense.get(model, {}).get(metric))
    title = model if len(model) <= 40 else f"{model[:39]}…"
    return Panel(title, subtitle, metric, results.metrics.get(metric, "higher"), dense, lines)


@styled
def draw_panels(panels: Sequence[Panel]) -> str | None:
    """Draw the panels next to each other in one figure, with one legend below."""
    from matplotlib.lines import Line2D

    lines = [line for panel in panels for line in panel.lines]
    names = unique((line.name, line.colour) for line in lines)
    stages, patterns = unique(line.stage for line in lines), unique(line.pattern for line in lines if line.pattern)
    orders = dict(zip(unique(["", *(line.order for line in lines)]), cycle(_ORDERS), strict=False))
    marks = dict(zip(patterns, cycle(_PATTERNS), strict=False))

    def style(line: Line) -> dict[str, Any]:
        """Filled marks right after pruning, hollow marks and dashed lines after fine-tuning; no line for patterns."""
        dashes, mark = orders[line.order]
        tuned = {"ls": (0, (4, 2)), "mfc": CARD, "mec": line.colour, "mew": 1.4} if line.stage != PRUNED else {}
        joined = {"ls": "", "marker": marks[line.pattern], "ms": 7} if line.pattern else {}
        return {"color": line.colour, "ls": dashes, "lw": 1.8, "marker": mark, "ms": 5.5, "mec": CARD} | tuned | joined

    key = [Line(*named) for named in names]
    key += [Line(order, INK, order=order) for order in orders if order]
    key += [Line(stage, INK, stage) for stage in stages if stages != [PRUNED]]
    key += [Line(pattern, INK, pattern=pattern) for pattern in patterns]
    wide = min(2, len(panels))
    width, rows = (WIDTH, 8.8)[wide - 1], math.ceil(len(panels) / wide)
    columns = max(1, int(width / (0.6 + 0.075 * max(len(line.name) for line in key))))  # inches of handle and letters
    figure = figure_of(width, 3.2 * rows + 0.2 + 0.2 * math.ceil(len(key) / columns))
    plots = figure.subplots(rows, wide, squeeze=False).flat
    for axes, panel in zip(plots, panels, strict=False):
        _draw(axes, panel, style)
    for axes in plots[len(panels) :]:
        axes.remove()
    handles = [Line2D([], [], **style(line), label=line.name) for line in key]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return svg(figure, "; ".join(f"{p.title}, {p.subtitle}: {p.metric} against sparsity" for p in panels))


def _draw(axes: Axes, panel: Panel, style: Callable[[Line], Mapping[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter

    scale = metric_axis(axes, panel.metric, _on_scale(panel))
    top = axes.get_ylim()[1]
    for line in panel.lines:
        _draw_line(axes, line, style(line), top)
    sparsities = unique(sorted(x for line in panel.lines for x, _ in line.points))
    axes.margins(x=0.06)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: share(value)))
    if len(sparsities) <= 8:
        axes.set_xticks(sparsities)
    off = [(line.pattern or share(x), y) for line in panel.lines for x, y in line.points if y > top]
    values = ", ".join(f"{formats.metric(panel.metric, y)} at {amount}" for amount, y in off)
    if len(off) > 3:
        values = f"{len(off)} points, up to {formats.metric(panel.metric, max(y for _, y in off))}"
    axes.set_xlabel(f"sparsity\n▲ off the scale: {values}" if off else "sparsity", fontsize=9)
    if panel.dense is not None:
        axes.axhline(panel.dense, color=MUTED, lw=1.1, zorder=2)
        place = {"ha": "right", "va": "bottom" if panel.better == "higher" else "top", "fontsize": 9, "color": MUTED}
        text = f"dense {formats.metric(panel.metric, panel.dense)}"
        axes.text(1, panel.dense, text, transform=axes.get_yaxis_transform(), **place)
    axes.set_title(f"{panel.title}\n{panel.subtitle}")
    axes.set_ylabel(f"{panel.metric.replace('_', ' ')} ({scale}{panel.better} is better)", fontsize=9)


def _on_scale(panel: Panel) -> list[float]:
    """The values that the axis must cover; for perplexities without those that exploded."""
    values = [panel.dense, *(y for line in panel.lines for _, y in line.points)]
    finite = [y for y in values if y is not None and math.isfinite(y)] or [1.0]
    low, high = min(finite), max(finite)
    if is_log(panel.metric) and low > 0:
        return [y for y in finite if y <= _OFF_SCALE * (panel.dense or low)] + [low, min(2 * low, high)]
    return finite


def _draw_line(axes: Axes, line: Line, style: Mapping[str, Any], top: float) -> None:
    """Draw a line with bars of one standard deviation; points off the scale are triangles at the upper edge."""
    axes.plot([x for x, _ in line.points], [y for _, y in line.points], **style | {"marker": ""}, zorder=2.5)
    for x, y in line.points:
        mark = {"marker": "^", "ms": 7} if y > top else {}
        axes.plot(x, min(y, top), **style | {"ls": ""} | mark, clip_on=False, zorder=3 + bool(line.pattern))
        if y <= top and x in line.spreads:
            axes.errorbar(x, y, line.spreads[x], fmt="none", ecolor=line.colour, elinewidth=1.2, capsize=3, zorder=2.6)
