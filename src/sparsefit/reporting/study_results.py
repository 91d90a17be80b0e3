"""What a pruning study measured: its rows, read into points.

A study prunes one or more models in many ways: each *point* is one way (score, granularity, order, sparsity or
pattern), measured right after pruning and, if asked for, after fine-tuning, once or with several seeds. Any part of it
may be missing: a study may have been stopped, a point may have failed, a perplexity may be infinite.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sparsefit.reporting import report as _report

DENSE, PRUNED = "dense", "pruned"
_KINDS = {"finetuning": "fine-tuning", "selection": "choosing weights"}


class Way(NamedTuple):
    """How a model was pruned, but for how much of it."""

    score: str
    granularity: str
    update: str


class Point(NamedTuple):
    """A model pruned in one way, at one stage: right after pruning, or after so many epochs of fine-tuning.

    `values` are means over `runs` with other seeds; `spreads` their standard deviations, 0 where no seed has a part in
    the point, and nothing where one has and there is a single run.
    """

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
    seeds: tuple[str, str] = ("", "")  # of the calibration and of the training, of a single run
    runs: int = 1
    spreads: Mapping[str, float] = {}

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


def joint_spread(first: float | None, second: float | None, first_runs: int, second_runs: int) -> float | None:
    """The sum of two standard deviations, within which a difference is not told; None where one is not known."""
    return None if first is None or second is None or max(first_runs, second_runs) == 1 else first + second


def headline(results: Results, model: str, score: str) -> Way | None:
    """The way that stands for a score where scores are compared on a model.

    Image classifiers are compared per layer where that was tried, as in the paper; else, and for perplexities, it is
    the first granularity of the score. None where the score was used with N:M patterns alone.
    """
    ways = [p.way for p in results.points if p.model == model and p.way.score == score and not p.pattern]
    layer = [way for way in ways if way.granularity == "layer" and not is_log(results.metric_of(model))]
    return next(iter(layer or ways), None)


def is_log(metric: str) -> bool:
    """Whether a metric is the exponential of a loss, so that its ratios count and not its differences."""
    return "perplexity" in metric


def read_results(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Results:
    """Read the rows of a study; of rows of the same point and seeds the last one counts."""
    declared = _report.metrics(study)
    if not declared:
        known = {"accuracy": "higher", "perplexity": "lower"}
        declared = {name: way for name, way in known.items() if any(name in row for row in rows)}
    points = [_point(study, row, declared) for row in rows]
    latest = {(p.model, p.stage, p.way, p.pattern, p.sparsity, p.seeds): p for p in points}.values()
    runs: dict[tuple[Any, ...], list[Point]] = {}
    for p in latest:
        runs.setdefault((p.model, p.stage, p.way, p.pattern, p.sparsity), []).append(p)
    return Results(
        declared,
        unique([*map(str, _report.section(study, "models")), *(point.model for point in points)]),
        {point.model: point.values for point in latest if point.stage == DENSE},
        [_mean(own) for own in runs.values() if own[0].stage != DENSE and own[0].way.score],
        [(point, point.error) for point in latest if point.error],
    )


def _mean(points: Sequence[Point]) -> Point:
    """One point of several runs that differ in their seeds; those that failed count for nothing but their error."""
    done = [point for point in points if not point.error] or points[:1]
    error = next((point.error for point in points if point.error), "")
    values, spreads, seconds = {}, {}, {}
    for metric in done[0].values:
        found = [point.values[metric] for point in done if metric in point.values]
        values[metric] = sum(found) / len(found)
        if len(found) > 1 and math.isfinite(values[metric]):
            spreads[metric] = statistics.stdev(found)
        elif not any(done[0].seeds):
            spreads[metric] = 0.0
    for kind in done[0].seconds:
        seconds[kind] = statistics.mean(point.seconds[kind] for point in done if kind in point.seconds)
    counted = [point.counted for point in done if point.counted is not None]
    return done[0]._replace(
        counted=max(counted, key=lambda share: abs(share - done[0].sparsity), default=None),
        values=values,
        seconds=seconds,
        error=error,
        runs=len(done),
        spreads=spreads,
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
        (text("calibration_seed"), text("training_seed")),
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
