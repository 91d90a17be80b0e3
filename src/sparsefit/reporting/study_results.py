"""The results of a pruning study: its rows, read into points.

A study prunes one or more models in many ways: each *point* is one way (score, granularity, order, sparsity or
pattern), measured right after pruning and optionally after fine-tuning, once or with several seeds. Any part may be
missing: a study may have been stopped, a point may have failed, a perplexity may be infinite.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sparsefit.reporting import report as reading
from sparsefit.reporting.tables import unique

DENSE, PRUNED = "dense", "pruned"
# A study that was killed could not record it: its status is still "running".
_STOPPED = {"interrupted": "interrupted", "failed": "ended by an error", "running": "not finished"}
KINDS = {"finetuning": "fine-tuning", "selection": "choosing weights"}


class Way(NamedTuple):
    """How a model was pruned, apart from the sparsity."""

    score: str
    granularity: str
    update: str

    @property
    def order(self) -> str:
        """`update block`; empty for the order "none"."""
        return f"update {self.update}" if self.update not in ("", "none") else ""

    @property
    def detail(self) -> str:
        """The granularity and the order: `per layer, update block`."""
        return ", ".join(filter(None, (per(self.granularity), self.order)))

    @property
    def name(self) -> str:
        """The score, the granularity and the order: `wanda per layer`."""
        return f"{self.score} {self.detail}".strip()


class Point(NamedTuple):
    """A model pruned in one way, at one stage: right after pruning, or after some epochs of fine-tuning.

    `values` are means over `runs` with different seeds; `spreads` are their standard deviations: 0 if the point does
    not depend on a seed, and missing if it does and there is a single run.
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
    used: str  # the order that was used, if not the requested one
    seeds: tuple[str, str] = ("", "")  # the calibration seed and the training seed of a single run
    runs: int = 1
    spreads: Mapping[str, float] = {}

    @property
    def amount(self) -> str:
        """How much was pruned, as text: 50%, or 2:4."""
        return self.pattern or share(self.sparsity)

    @property
    def order(self) -> str:
        """The requested order, and the one that was used if it differs."""
        return ", ".join(filter(None, (self.way.order, self.used and f"pruned in the order {self.used}")))

    @property
    def detail(self) -> str:
        """`Way.detail`, with the order that was used if it differs."""
        return ", ".join(filter(None, (per(self.way.granularity), self.order)))


class Results(NamedTuple):
    """All that a study measured."""

    metrics: dict[str, str]
    models: list[str]
    dense: dict[str, Mapping[str, float]]
    points: list[Point]
    failures: list[tuple[Point, str]]

    def metric_of(self, model: str) -> str:
        """The first metric that was measured on a model."""
        known = [self.dense.get(model, {}), *(point.values for point in self.points if point.model == model)]
        return next((m for m in self.metrics if any(m in values for values in known)), next(iter(self.metrics), ""))

    def stages(self) -> list[str]:
        """The stages of the points, the pruned model first."""
        return sorted(unique(point.stage for point in self.points), key=lambda stage: stage != PRUNED)

    def gap(self) -> float | None:
        """The largest difference between the counted and the requested sparsity."""
        return max((abs(p.counted - p.sparsity) for p in self.points if p.counted is not None), default=None)


def share(sparsity: float) -> str:
    """A sparsity as text: 50%, 62.5%."""
    return f"{100 * sparsity:.4g}%"


def per(granularity: str) -> str:
    """A granularity as text: `per layer`, `per 128 outputs`."""
    if group := re.fullmatch(r"\(?(\w+)[,:] ?(\d+)\)?", granularity):
        return f"per {group[2]} {group[1]}s"
    return granularity if granularity in ("", "variant") else f"per {granularity}"


def seconds_by_kind(study: Mapping[str, Any]) -> dict[str, float]:
    """The seconds of a study by kind of work, without kinds that took no time."""
    spent = {str(kind): reading.number(value) for kind, value in reading.section(study, "seconds").items()}
    return {KINDS.get(kind, kind): value for kind, value in spent.items() if value and value > 0}


def joint_spread(first: Point, second: Point, metric: str) -> float | None:
    """The sum of the standard deviations of two points; smaller differences are not reported. None if unknown."""
    spreads = [point.spreads.get(metric) for point in (first, second)]
    return None if None in spreads or first.runs == second.runs == 1 else sum(spreads)


def headline(results: Results, model: str, score: str) -> Way | None:
    """The way that represents a score on a model: for image classifiers per layer, if measured, as in the paper.

    Otherwise it is the first granularity of the score; None if the score was only used with N:M patterns.
    """
    ways = [p.way for p in results.points if p.model == model and p.way.score == score and not p.pattern]
    layer = [way for way in ways if way.granularity == "layer" and not is_log(results.metric_of(model))]
    return next(iter(layer or ways), None)


def is_log(metric: str) -> bool:
    """Whether a metric is the exponential of a loss, so that it is compared by ratios, not differences."""
    return "perplexity" in metric


def read_results(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Results:
    """Read the rows of a study; of several rows for the same point and seeds the last one is used."""
    declared = reading.metrics(study)
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
        unique([*map(str, reading.section(study, "models")), *(point.model for point in points)]),
        {point.model: point.values for point in latest if point.stage == DENSE},
        [_mean(own) for own in runs.values() if own[0].stage != DENSE and own[0].way.score],
        [(point, point.error) for point in latest if point.error],
    )


def _mean(points: Sequence[Point]) -> Point:
    """The mean of runs of a point that differ in their seeds; failed runs only contribute their error."""
    done = [point for point in points if not point.error] or points[:1]
    first = done[0]
    found = {metric: [p.values[metric] for p in done if metric in p.values] for metric in first.values}
    values = {metric: sum(own) / len(own) for metric, own in found.items()}
    spreads = {m: statistics.stdev(own) for m, own in found.items() if len(own) > 1 and math.isfinite(values[m])}
    if not any(first.seeds):
        spreads = dict.fromkeys(values, 0.0) | spreads
    counted = [point.counted for point in done if point.counted is not None]
    return first._replace(
        counted=max(counted, key=lambda share: abs(share - first.sparsity), default=None),
        values=values,
        seconds={k: statistics.mean(p.seconds[k] for p in done if k in p.seconds) for k in first.seconds},
        error=next((point.error for point in points if point.error), ""),
        runs=len(done),
        spreads=spreads,
    )


def _point(study: Mapping[str, Any], row: Mapping[str, Any], metrics: Mapping[str, str]) -> Point:
    def text(key: str) -> str:
        return "" if row.get(key) is None else str(row[key])

    seconds = {key: reading.number(row.get(f"{key}_seconds")) for key in ("selection", "evaluation", "finetuning")}
    values = {metric: _value(row.get(metric), better) for metric, better in metrics.items()}
    stage, used = text("stage") or (PRUNED if text("score") else DENSE), text("used_update")
    if stage == "finetuned":  # shown as "after 2 epochs"
        epochs = reading.number(row.get("epochs")) or reading.number(reading.section(study, "finetuning").get("epochs"))
        stage = f"after {epochs:g} epoch{'s' if epochs != 1 else ''}" if epochs else "fine-tuned"
    return Point(
        text("model"),
        stage,
        Way(text("score"), text("granularity"), text("update")),
        text("pattern"),
        reading.number(row.get("sparsity")) or 0.0,
        reading.number(row.get("counted")),
        {metric: value for metric, value in values.items() if value is not None},
        {key: value for key, value in seconds.items() if value is not None},
        text("error"),
        used if used != (text("update") or "none") else "",
        (text("calibration_seed"), text("training_seed")),
    )


def _value(value: Any, better: str) -> float | None:
    """The value as a float; infinite only if that is the worst possible value of the metric."""
    worst = math.inf if better == "lower" else -math.inf
    return worst if isinstance(value, float) and value == worst else reading.number(value)


class Progress(NamedTuple):
    """How much of a study was measured: in points, or in rows of the table if some of the planned ones are missing."""

    text: str  # `24 of 48 rows measured, 2 failed, interrupted`
    whole: bool  # everything that was planned has been tried
    reason: str  # a sentence on what ended the study; empty if it completed


def progress(study: Mapping[str, Any], results: Results) -> Progress:
    """How much of a study was measured, from its `planned` number of rows, its `status`, and the `failure` that ended
    it. Without these, the study is taken to have had no other points than those it tried.
    """
    status = str(study.get("status") or "")
    reason = {
        "interrupted": "The study was interrupted; started again with the same command, it continues where it stopped."
    }
    reason |= {"failed": f"The study ended with an error: {study['failure']}"} if study.get("failure") else {}
    ended = [_STOPPED[status]] if status in _STOPPED else []
    planned = int(reading.number(study.get("planned")) or 0)
    dense = len(results.dense) - sum(point.stage == DENSE for point, _ in results.failures)
    rows = dense + sum(point.runs for point in results.points if point.values)
    # A failed point has no rows for its later stages: in a finished study these are not missing.
    if rows < planned and not (status == "finished" and results.failures):
        count, failed, whole = f"{rows} of {planned} rows measured", len(results.failures), False
    else:
        done, failed = count_points(results)
        # The table may also hold rows of an earlier grid, so its size does not prove that the study is complete.
        whole, count = not ended, f"{done} points measured" if ended else f"{done} of {done + failed} points"
    notes = [f"{failed} failed"] * bool(failed) + ended
    return Progress(", ".join([count, *notes]), whole, reason.get(status, ""))


def count_points(results: Results) -> tuple[int, int]:
    """How many ways of pruning a model were measured, and how many failed at any stage."""
    points = unique((point.model, point.way, point.amount) for point in results.points)
    failed = unique((point.model, point.way, point.amount) for point in results.points if point.error)
    return len(points) - len(failed), len(failed)
