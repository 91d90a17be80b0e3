"""What a pruning study measured: its rows, read into points, and the short table that page and terminal show.

A study prunes one or more models in many ways: each *point* is one way (score, granularity, order, sparsity or
pattern), measured right after pruning and, if asked for, after fine-tuning. Any part of it may be missing: a study may
have been stopped, a point may have failed, a perplexity may be infinite.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sparsefit.reporting import report as _report

DENSE, PRUNED = "dense", "pruned"
_KINDS = {"finetuning": "fine-tuning", "selection": "choosing weights"}
TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"


class Way(NamedTuple):
    """How a model was pruned, but for how much of it."""

    score: str
    granularity: str
    update: str


class Point(NamedTuple):
    """A model pruned in one way, at one stage: right after pruning, or after so many epochs of fine-tuning."""

    model: str
    stage: str
    way: Way
    pattern: str
    sparsity: float
    counted: float | None
    values: Mapping[str, float]
    seconds: Mapping[str, float]
    error: str
    used: str  # the order that it was pruned in, where that is not the one asked for

    @property
    def amount(self) -> str:
        """How much was pruned, for people: 50%, or 2:4."""
        return self.pattern or share(self.sparsity)


class Results(NamedTuple):
    """All that a study measured."""

    metrics: dict[str, str]
    models: list[str]
    dense: dict[str, Mapping[str, float]]
    points: list[Point]
    failures: list[tuple[Point, str]]

    def metric_of(self, model: str) -> str:
        """The first of the metrics that was measured on a model."""
        known = [self.dense.get(model, {}), *(point.values for point in self.points if point.model == model)]
        return next((m for m in self.metrics if any(m in values for values in known)), next(iter(self.metrics), ""))

    def stages(self) -> list[str]:
        """The stages of the points, the pruned model first."""
        return sorted(unique(point.stage for point in self.points), key=lambda stage: stage != PRUNED)

    def updates(self, score: str) -> list[str]:
        """The orders in which a score was used."""
        return unique(point.way.update for point in self.points if point.way.score == score)

    def order(self, point: Point) -> str:
        """The order of a point, where others of its score have another or one of them fell back to another."""
        used = any(other.used for other in self.points if other.way.score == point.way.score)
        if len(self.updates(point.way.score)) <= 1 and not used:
            return ""
        return ", ".join([point.way.update or "none", *([in_order(point.used)] if point.used else [])])

    def detail(self, way: Way) -> str:
        """What beside its score tells a way of pruning from others: its granularity, its order where that varies."""
        order = f"update {way.update or 'none'}" if len(self.updates(way.score)) > 1 else ""
        return ", ".join(part for part in (per(way.granularity), order) if part)

    def name(self, way: Way) -> str:
        """A way of pruning for people: `wanda per layer`."""
        return " ".join(part for part in (way.score, self.detail(way)) if part)


class Column(NamedTuple):
    """A column of a table: one way of pruning at one stage; `detail` stands below the name of the score."""

    stage: str
    score: str
    detail: str


class Cell(NamedTuple):
    """One value; what it differs by from the dense model; whether it is the best of its row and stage."""

    value: float | None
    change: str
    best: bool
    failed: bool
    used: str  # the order that it was pruned in, where that is not the one asked for


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


def unique(values: Iterable[Any]) -> list[Any]:
    """The distinct values in the order in which they come."""
    return list(dict.fromkeys(values))


def share(sparsity: float) -> str:
    """A sparsity for people: 50%, 62.5%."""
    return f"{100 * sparsity:.4g}%"


def per(granularity: str) -> str:
    """A granularity for people: `per layer`, `per 128 outputs`."""
    group = re.fullmatch(r"\(?(\w+)[,:] ?(\d+)\)?", granularity)
    if group:
        return f"per {group[2]} {group[1]}s"
    return granularity if granularity in ("", "variant") else f"per {granularity}"


def in_order(used: str) -> str:
    """What marks a point that was not pruned in the order asked for."""
    return f"pruned in the order {used}"


def seconds_by_kind(study: Mapping[str, Any]) -> dict[str, float]:
    """The seconds of a study by kind of work, without those that took none."""
    spent = {str(kind): _report.number(value) for kind, value in _report.section(study, "seconds").items()}
    return {_KINDS.get(kind, kind): value for kind, value in spent.items() if value and value > 0}


def is_log(metric: str) -> bool:
    """Whether a metric is the exponential of a loss, so that its ratios count and not its differences."""
    return "perplexity" in metric


def read_results(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Results:
    """Read the rows of a study; of rows of the same point the last one counts."""
    declared = _report.metrics(study)
    if not declared:
        known = {"accuracy": "higher", "perplexity": "lower"}
        declared = {name: way for name, way in known.items() if any(name in row for row in rows)}
    points = [_point(study, row, declared) for row in rows]
    latest = {(p.model, p.stage, p.way, p.pattern, p.sparsity): p for p in points}.values()
    return Results(
        declared,
        unique([*map(str, _report.section(study, "models")), *(point.model for point in points)]),
        {point.model: point.values for point in latest if point.stage == DENSE},
        [point for point in latest if point.stage != DENSE and point.way.score],
        [(point, point.error) for point in latest if point.error],
    )


def _point(study: Mapping[str, Any], row: Mapping[str, Any], metrics: Mapping[str, str]) -> Point:
    def text(key: str) -> str:
        return "" if row.get(key) is None else str(row[key])

    seconds = {key: _report.number(row.get(f"{key}_seconds")) for key in ("selection", "evaluation", "finetuning")}
    values = {metric: _value(row.get(metric), better) for metric, better in metrics.items()}
    used = text("used_update")
    return Point(
        text("model"),
        _stage(study, text("stage") or (PRUNED if text("score") else DENSE), row.get("epochs")),
        Way(text("score"), text("granularity"), text("update")),
        text("pattern"),
        _report.number(row.get("sparsity")) or 0.0,
        _report.number(row.get("counted")),
        {metric: value for metric, value in values.items() if value is not None},
        {key: value for key, value in seconds.items() if value is not None},
        text("error"),
        used if used != (text("update") or "none") else "",
    )


def _stage(study: Mapping[str, Any], stage: str, epochs: Any) -> str:
    """The stage for people: dense, pruned, after 2 epochs."""
    if stage != "finetuned":
        return stage
    epochs = _report.number(epochs) or _report.number(_report.section(study, "finetuning").get("epochs"))
    return f"after {epochs:g} epoch{'s' if epochs != 1 else ''}" if epochs else "fine-tuned"


def _value(value: Any, better: str) -> float | None:
    """The value as a float; an infinity only where it stands for the worst value there is."""
    worst = math.inf if better == "lower" else -math.inf
    return worst if isinstance(value, float) and value == worst else _report.number(value)


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
    return Cell(value, change(metric, value, dense), False, failed, used)


def _mark_best(cells: Sequence[Cell], stages: Sequence[str], better: str) -> list[Cell]:
    """Mark the best of the cells of each stage, and all that are as good, where there is something to compare."""
    pick = max if better == "higher" else min
    best = {}
    for stage in unique(stages):
        values = [cell.value for cell, of in zip(cells, stages, strict=True) if of == stage and cell.value is not None]
        best[stage] = pick(values) if len(set(values)) > 1 else None
    return [
        cell._replace(best=cell.value is not None and cell.value == best[stage])
        for cell, stage in zip(cells, stages, strict=True)
    ]


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
