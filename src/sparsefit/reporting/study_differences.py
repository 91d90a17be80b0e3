"""How the ways of pruning in a study differ, beside the spread of their seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sparsefit.reporting.study_results import Point, Results, headline, is_log, joint_spread, per, read_results, unique
from sparsefit.reporting.study_table import MINUS


class Difference(NamedTuple):
    """Two ways of pruning a model, compared at each sparsity or pattern at which both were measured.

    `cells` holds what to show for each amount: a difference, or `within` the spread.
    """

    model: str
    stage: str
    compared: str
    cells: dict[str, str]


class Differences(NamedTuple):
    """The comparisons of a study, their amounts in order, a title and what there is to know in reading them."""

    title: str
    note: str
    amounts: list[str]
    rows: list[Difference]


def differences(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Differences:
    """Each score, granularity and order against the first of the study, by the first metric of each model."""
    results = read_results(study, rows)
    several = any(point.runs > 1 for point in results.points)
    found: list[Difference] = []
    for model in results.models:
        metric = results.metric_of(model)
        points = [p for p in results.points if p.model == model and math.isfinite(p.values.get(metric, math.nan))]
        for stage in results.stages():
            for compared, pairs in _pairs(results, [point for point in points if point.stage == stage]):
                better = results.metrics.get(metric, "higher")
                cells = {first.amount: _told(metric, better, first, second, several) for first, second in pairs}
                found.append(Difference(model, stage, compared, cells))
    ordered = sorted(results.points, key=lambda point: (point.sparsity, point.pattern))
    amounts = [amount for amount in unique(p.amount for p in ordered) if any(amount in d.cells for d in found)]
    return Differences("Differences" if several else "Single-run differences", _note(results, several), amounts, found)


def _note(results: Results, several: bool) -> str:
    logs = {is_log(results.metric_of(model)) for model in results.models}
    note = "Above zero the first is better. " * (False in logs) + "Of a perplexity, below zero. " * (True in logs)
    if not several:
        return f"{note}Each point was measured once, so there is no spread: small differences may be chance."
    return (
        f"{note}Means over seeds. Behind ±: the sum of both standard deviations; a difference within it is not told. "
        "The choice of the dense model and of the test data is in no spread."
    )


def _pairs(results: Results, points: Sequence[Point]) -> Iterator[tuple[str, list[tuple[Point, Point]]]]:
    """What is compared, and the points of both sides, for scores, then granularities, then orders."""
    heads = {p.way.score: headline(results, p.model, p.way.score) or p.way for p in points}
    standing = [p for p in points if p.way == heads[p.way.score]]
    standing += [p for p in points if p.pattern and p.way.update == heads[p.way.score].update and p not in standing]
    alike = len({results.detail(way) for way in heads.values()}) == 1
    how = results.detail(next(iter(heads.values()))) if alike and heads else ""
    yield from _against_first(standing, lambda p: p.way.score if alike else results.name(heads[p.way.score]), how)
    free = [p for p in points if not p.pattern]
    for way in unique(p.way._replace(granularity="") for p in free):
        own = [p for p in free if p.way._replace(granularity="") == way]
        yield from _against_first(own, lambda p: per(p.way.granularity), results.name(way))
    for way in unique(p.way._replace(update="") for p in free):
        own = [p for p in free if p.way._replace(update="") == way and not p.used]
        how = f"{way.score} {per(way.granularity)}".rstrip()
        yield from _against_first(own, lambda p: f"update {p.way.update or 'none'}", how)


def _against_first(
    points: Sequence[Point], name: Callable[[Point], str], how: str
) -> Iterator[tuple[str, list[tuple[Point, Point]]]]:
    names = unique(map(name, points))
    for other in names[1:]:
        reference = {p.amount: p for p in points if name(p) == names[0]}
        pairs = [(p, reference[p.amount]) for p in points if name(p) == other and p.amount in reference]
        if pairs:
            yield f"{other} against {names[0]}{', ' if how else ''}{how}", pairs


def _told(metric: str, better: str, first: Point, second: Point, several: bool) -> str:
    """A difference for people: points of an accuracy, per cent of a perplexity, else the metric's own unit."""
    a, b = first.values[metric], second.values[metric]
    scale, unit, digits = (100.0, "", ".2f") if "accuracy" in metric else (1.0, "", ".3g")
    difference = b - a if better == "lower" else a - b
    if is_log(metric) and b > 0:
        scale, unit, digits, difference = 100.0 / b, "%", ".1f", a - b
    spread = joint_spread(first.spreads.get(metric), second.spreads.get(metric), first.runs, second.runs)
    if spread is not None and abs(difference) <= spread:
        return f"within {scale * spread:{digits}}{unit}"
    told = f"{scale * difference:+{digits}}{unit}".replace("-", MINUS)
    if spread is None:
        return f"{told} (one run)" if several else told
    return f"{told} ± {scale * spread:{digits}}{unit}"
