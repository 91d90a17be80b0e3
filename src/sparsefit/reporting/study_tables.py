"""The tables of a pruning study, for its page and the terminal, and its summary as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sparsefit.reporting import formats
from sparsefit.reporting import study_results as reading
from sparsefit.reporting.study_results import Point, Results, headline, is_log, joint_spread, per
from sparsefit.reporting.tables import Cell, Row, Table, unique

TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"


def results_tables(results: Results, metric: str | None = None) -> list[Table]:
    """For each model and stage, a table of a metric by sparsity and by way of pruning.

    N:M patterns have no granularity: they are listed with the sparsities if each score of the model has only one
    granularity, else in a separate table. If `metric` is None, it is the first one measured on each model.
    """
    tables = []
    for model in results.models:
        points = [point for point in results.points if point.model == model]
        name = metric or results.metric_of(model)
        if metric and not any(metric in point.values for point in points):
            continue
        for stage in results.stages():
            for group in _groups(points):
                own = [point for point in group if point.stage == stage]
                tables += [_table(results, model, name, own)] if own else []
    return tables


def _groups(points: Sequence[Point]) -> list[list[Point]]:
    """The points of each table: all points in one, with patterns in the columns of their scores, or patterns apart."""
    scores = unique(point.way.score for point in points)
    found = {s: unique(p.way.granularity for p in points if p.way.score == s and p.way.granularity) for s in scores}
    if any(len(granularities) > 1 for granularities in found.values()):
        return [[p for p in points if not p.pattern], [p for p in points if p.pattern]]
    return [[p._replace(way=p.way._replace(granularity="".join(found[p.way.score]))) for p in points]]


def _table(results: Results, model: str, metric: str, points: Sequence[Point]) -> Table:
    dense = results.dense.get(model, {}).get(metric)
    scores = unique(point.way.score for point in points)
    ways = sorted(unique((p.way.score, p.detail) for p in points), key=lambda way: scores.index(way[0]))
    found = {(point.amount, point.way.score, point.detail): point for point in points}
    rows = []
    for amount in unique(p.amount for p in sorted(points, key=lambda p: (p.sparsity, p.pattern))):
        row = [found.get((amount, *way)) for way in ways]
        best = _best(row, metric, results.metrics.get(metric, "higher"))
        rows.append([amount, *(_cell(point, metric, dense, point in best) for point in row)])
    reference = f", dense {formats.metric(metric, dense)}" if dense is not None else ""
    title = f"{model}: {metric.replace('_', ' ')}, {points[0].stage}{reference}"
    return Table(title, ["sparsity", *(Cell(*way) for way in ways)], rows)


def _cell(point: Point | None, metric: str, dense: float | None, best: bool) -> Cell:
    """The value with its spread; below it the change from the dense model and the number of seeds."""
    value = point.values.get(metric) if point else None
    if point is None or value is None:
        return Cell("failed", kind="failed") if point and point.error else Cell(formats.MISSING)
    spread, text = point.spreads.get(metric), formats.metric(metric, value)
    if point.runs > 1 and spread is not None:
        text += f" ± {100 * spread:.2f}" if "accuracy" in metric else f" ± {spread:.{'2f' if is_log(metric) else '2g'}}"
    small = [change(metric, value, dense), f"{point.runs} seeds" if point.runs > 1 else ""]
    return Cell(text, ", ".join(filter(None, small)), "best" if best else "")


def _best(row: Sequence[Point | None], metric: str, better: str) -> list[Point]:
    """The best points of a row: the best one and all within the spread of it; none if that is the whole row."""
    own = [point for point in row if point and metric in point.values]
    best = (max if better == "higher" else min)(own, key=lambda point: point.values[metric], default=None)

    def as_good(point: Point) -> bool:
        value, top = point.values[metric], best.values[metric]
        return value == top or abs(value - top) <= (joint_spread(point, best, metric) or 0.0)

    good = [point for point in own if as_good(point)]
    return good if len(good) < len(own) else []


def change(metric: str, value: float | None, dense: float | None) -> str:
    """The change of a value from the dense model's: in points for accuracies, as a factor if a perplexity exploded."""
    if value is None or dense is None or not math.isfinite(value):
        return ""
    if "accuracy" in metric:
        text = f"{100 * (value - dense):+.2f}"
    elif is_log(metric) and dense > 0 and value > 10 * dense:
        text = f"{TIMES}{value / dense:,.0f}"
    else:
        text = f"{value - dense:+.{'2f' if is_log(metric) else '3g'}}"
    return text.replace("-", MINUS)


def differences(results: Results) -> Table:
    """Each score, granularity and order compared with the first of the study, by the first metric of each model.

    A row has what is compared, at which sparsity or pattern, the difference, the spread over seeds, and whether the
    difference is larger than the spread. A smaller difference is not printed.
    """
    several = any(point.runs > 1 for point in results.points)
    rows: list[Row] = []
    for model in results.models:
        metric = results.metric_of(model)
        points = [p for p in results.points if p.model == model and math.isfinite(p.values.get(metric, math.nan))]
        for stage in results.stages():
            for compared, pairs in _pairs(results, [point for point in points if point.stage == stage]):
                where = ", ".join([model] * (len(results.models) > 1) + [stage] * (len(results.stages()) > 1))
                name = f"{where}: {compared}" if where else compared
                better = results.metrics.get(metric, "higher")
                ordered = sorted(pairs, key=lambda pair: (pair[0].sparsity, pair[0].pattern))
                rows += [[name, first.amount, *_difference(metric, better, first, second)] for first, second in ordered]
    logs = {is_log(results.metric_of(model)) for model in results.models}
    sign = "Negative" if logs == {True} else "Positive"
    notes = [f"{sign}: the first is better{' (for perplexity: negative)' if len(logs) > 1 else ''}."]
    if several:
        notes.append("Differences of means over seeds; spread: the sum of both standard deviations.")
        notes.append("The spread does not include variation from the dense model or the test data.")
    else:
        notes.append("Each point was measured once, so there is no spread: small differences may be chance.")
    columns = ["comparison", "sparsity", "difference", "spread over seeds", "larger than the spread"]
    return Table("Differences" if several else "Single-run differences", columns, rows, notes)


def _pairs(results: Results, points: Sequence[Point]) -> Iterator[tuple[str, list[tuple[Point, Point]]]]:
    """The comparisons, each with a description and pairs of points: scores, then granularities, then orders."""
    heads = {p.way.score: headline(results, p.model, p.way.score) or p.way for p in points}
    standing = [p for p in points if p.way == heads[p.way.score]]
    standing += [p for p in points if p.pattern and p.way.update == heads[p.way.score].update and p not in standing]
    details = unique(way.detail for way in heads.values())
    alike = len(details) == 1
    yield from _against_first(standing, lambda p: p.way.score if alike else heads[p.way.score].name, *details[:alike])
    free = [p for p in points if not p.pattern]
    for way in unique(p.way._replace(granularity="") for p in free):
        own = [p for p in free if p.way._replace(granularity="") == way]
        yield from _against_first(own, lambda p: per(p.way.granularity), way.name)
    for way in unique(p.way._replace(update="") for p in free):
        own = [p for p in free if p.way._replace(update="") == way and not p.used]
        how = f"{way.score} {per(way.granularity)}".rstrip()
        yield from _against_first(own, lambda p: f"update {p.way.update or 'none'}", how)


def _against_first(
    points: Sequence[Point], name: Callable[[Point], str], how: str = ""
) -> Iterator[tuple[str, list[tuple[Point, Point]]]]:
    names = unique(map(name, points))
    for other in names[1:]:
        reference = {p.amount: p for p in points if name(p) == names[0]}
        pairs = [(p, reference[p.amount]) for p in points if name(p) == other and p.amount in reference]
        if pairs:
            yield f"{other} against {names[0]}{', ' if how else ''}{how}", pairs


def _difference(metric: str, better: str, first: Point, second: Point) -> Row:
    """The difference, the spread, and whether the difference exceeds it: in points for accuracies, in percent for
    perplexities, else as a plain number."""
    a, b = first.values[metric], second.values[metric]
    scale, unit, digits = (100.0, "", ".2f") if "accuracy" in metric else (1.0, "", ".3g")
    difference = b - a if better == "lower" else a - b
    if is_log(metric) and b > 0:
        scale, unit, digits, difference = 100.0 / b, "%", ".1f", a - b
    text = f"{scale * difference:+{digits}}{unit}".replace("-", MINUS)
    if (spread := joint_spread(first, second, metric)) is None:
        return [text, "one run", "not known"]
    within = abs(difference) <= spread
    return [formats.MISSING if within else text, f"{scale * spread:{digits}}{unit}", "no" if within else "yes"]


def point_times(results: Results) -> Table:
    """The time that one point of each score takes."""
    kinds = unique(kind for point in results.points for kind in point.seconds)
    rows = []
    for score in unique(point.way.score for point in results.points) if kinds else []:
        points = [point.seconds for point in results.points if point.way.score == score]
        spent = ([seconds[kind] for seconds in points if kind in seconds] for kind in kinds)
        rows.append([score, *(formats.seconds(sum(took) / len(took) if took else None) for took in spent)])
    columns = ["score", *(reading.KINDS.get(kind, kind) for kind in kinds)]
    return Table("Time of one point", columns, rows, ["Means over all points of a score."])


def summary_csv(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The points of a study as CSV: the mean and the standard deviation of each metric, and the number of seeds."""
    results = reading.read_results(study, rows)
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    heads = [head for metric in results.metrics for head in (metric, f"{metric}_deviation")]
    table.writerow(["model", "stage", *reading.Way._fields, "pattern", "sparsity", "seeds", *heads])
    for point in results.points:
        spreads = point.spreads if point.runs > 1 else {}
        values = [value for metric in results.metrics for value in (point.values.get(metric), spreads.get(metric))]
        table.writerow([point.model, point.stage, *point.way, point.pattern, point.sparsity, point.runs, *values])
    return buffer.getvalue()
