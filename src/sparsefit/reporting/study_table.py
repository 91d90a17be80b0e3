"""The tables of a pruning study that page and terminal show: a metric by sparsity and way of pruning."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sparsefit.reporting import formats as _formats
from sparsefit.reporting.study_results import Point, Results, is_log, joint_spread, read_results, unique

TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"


class Column(NamedTuple):
    """A column of a table: one way of pruning at one stage; `detail` stands below the name of the score."""

    stage: str
    score: str
    detail: str


class Cell(NamedTuple):
    """One value, its spread and number of runs; what it differs by from the dense model; whether it is the best of
    its row and stage, or within the spread of the best."""

    value: float | None
    spread: float | None
    runs: int
    change: str
    best: bool
    failed: bool
    used: str  # the order that it was pruned in, where that is not the one asked for

    def told(self, metric: str, mark: str = "") -> tuple[str, str]:
        """The value with its spread, and the change with the number of runs, for people."""
        value = _formats.metric(metric, self.value) + mark
        if self.runs == 1:
            return value, self.change
        spread = f" ± {spread_text(metric, self.spread)}" if self.spread is not None else ""
        return value + spread, ", ".join(part for part in (self.change, f"{self.runs} seeds") if part)


class Table(NamedTuple):
    """The values of one metric on one model; each row is a sparsity or a pattern with a cell for each column."""

    model: str
    metric: str
    better: str
    dense: float | None
    columns: list[Column]
    rows: list[tuple[str, list[Cell]]]

    def marks(self) -> dict[str, str]:
        """The mark of each order that was used in the place of the one asked for."""
        used = unique(cell.used for _, cells in self.rows for cell in cells if cell.used)
        return {order: "*" * index for index, order in enumerate(used, 1)}


def spread_text(metric: str, spread: float) -> str:
    """A standard deviation for people: in points of an accuracy."""
    return f"{100 * spread:.2f}" if "accuracy" in metric else f"{spread:.2f}" if is_log(metric) else f"{spread:.2g}"


def results_table(
    study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], metric: str | None = None
) -> list[Table]:
    """The short tables of a study: for each model its metric by sparsity and by way of pruning.

    N:M patterns have no granularity: they stand among the sparsities where each score of the model has only one
    granularity, and in a table of their own elsewhere.

    Args:
        study: The study.
        rows: Its rows, one for each point and stage.
        metric: The metric; None takes the first that was measured on each model.
    """
    results = read_results(study, rows)
    tables = []
    for model in results.models:
        points = [point for point in results.points if point.model == model]
        name = metric or results.metric_of(model)
        if metric and not any(metric in point.values for point in points):
            continue
        granularities = {
            score: {p.way.granularity for p in points if p.way.score == score} - {""}
            for score in unique(p.way.score for p in points)
        }
        if all(len(found) <= 1 for found in granularities.values()):
            alone = {score: next(iter(found), "") for score, found in granularities.items()}
            groups = [[p._replace(way=p.way._replace(granularity=alone[p.way.score])) for p in points]]
        else:
            groups = [[p for p in points if not p.pattern], [p for p in points if p.pattern]]
        tables += [_table(results, model, name, group) for group in groups if group]
    return tables


def summary_csv(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The points of a study as CSV: the mean of each metric, its standard deviation and the number of seeds."""
    results = read_results(study, rows)
    lines = []
    for point in results.points:
        line = {"model": point.model, "stage": point.stage, **point.way._asdict(), "pattern": point.pattern}
        line |= {"sparsity": point.sparsity, "seeds": point.runs}
        for metric in results.metrics:
            spread = point.spreads.get(metric) if point.runs > 1 else None
            line |= {metric: point.values.get(metric), f"{metric}_deviation": spread}
        lines.append(line)
    buffer = io.StringIO()
    table = csv.DictWriter(buffer, list(lines[0]) if lines else [], lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    return buffer.getvalue()


def _table(results: Results, model: str, metric: str, points: Sequence[Point]) -> Table:
    dense = results.dense.get(model, {}).get(metric)
    better = results.metrics.get(metric, "higher")
    scores = unique(point.way.score for point in points)
    used = {(point.stage, point.way) for point in points}
    ways = sorted(unique(point.way for point in points), key=lambda way: scores.index(way.score))
    keys = [(stage, way) for stage in results.stages() for way in ways if (stage, way) in used]
    found = {(point.amount, point.stage, point.way): point for point in points}
    rows = []
    for amount in unique(p.amount for p in sorted(points, key=lambda p: (p.sparsity, p.pattern))):
        cells = [_cell(metric, found.get((amount, *key)), dense) for key in keys]
        rows.append((amount, _mark_best(cells, [stage for stage, _ in keys], better)))
    columns = [Column(stage, way.score, results.detail(way)) for stage, way in keys]
    return Table(model, metric, better, dense, columns, rows)


def _cell(metric: str, point: Point | None, dense: float | None) -> Cell:
    value = point.values.get(metric) if point else None
    failed, used = bool(point and point.error and value is None), point.used if point and value is not None else ""
    spread, runs = (point.spreads.get(metric), point.runs) if point else (None, 1)
    return Cell(value, spread, runs, change(metric, value, dense), False, failed, used)


def _mark_best(cells: Sequence[Cell], stages: Sequence[str], better: str) -> list[Cell]:
    """Mark the best of the cells of each stage, and all that are as good or within the spread, unless all are."""
    pick = max if better == "higher" else min
    marked = list(cells)
    for stage in unique(stages):
        own = [place for place, of in enumerate(stages) if of == stage and cells[place].value is not None]
        best = pick((cells[place] for place in own), key=lambda cell: cell.value, default=None)
        good = [place for place in own if _as_good(cells[place], best)]
        if len(good) < len(own):
            for place in good:
                marked[place] = cells[place]._replace(best=True)
    return marked


def _as_good(cell: Cell, best: Cell) -> bool:
    spread = joint_spread(cell.spread, best.spread, cell.runs, best.runs) or 0.0
    return cell.value == best.value or abs(cell.value - best.value) <= spread


def change(metric: str, value: float | None, dense: float | None) -> str:
    """By how much a value lies above or below the dense model's: points of an accuracy, or a factor if it exploded."""
    if value is None or dense is None or not math.isfinite(value):
        return ""
    if "accuracy" in metric:
        text = f"{100 * (value - dense):+.2f}"
    elif is_log(metric) and dense > 0 and value > 10 * dense:
        text = f"{TIMES}{value / dense:,.0f}"
    else:
        text = f"{value - dense:+.{2 if is_log(metric) else 3}{'f' if is_log(metric) else 'g'}}"
    return text.replace("-", MINUS)
