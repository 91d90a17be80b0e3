"""How much of a pruning study has been measured, of how much that was asked for, and what ended it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sparsefit.reporting import report as _report
from sparsefit.reporting.study_results import DENSE, Results, unique

# A study that was killed had no time to say so: it stands as running.
_STOPPED = {"interrupted": "interrupted", "failed": "ended by an error", "running": "not finished"}


class Progress(NamedTuple):
    """What was measured: points, or rows of the table (a point at one stage, a dense model) where some are missing.

    Attributes:
        unit: "points" or "rows".
        done: How many of them were measured.
        asked: How many there are in all; None where nobody knows.
        failed: How many of them failed.
        status: The status of the study where it was stopped: "interrupted", "failed", "running"; else "".
        failure: The error that ended it, if one did.
    """

    unit: str
    done: int
    asked: int | None
    failed: int
    status: str
    failure: str

    @property
    def whole(self) -> bool:
        """Whether nothing that was asked for is left to be tried."""
        return self.unit == "points" and not self.status

    @property
    def count(self) -> str:
        """`24 of 48`, or `24` where nobody knows of how many."""
        return str(self.done) if self.asked is None else f"{self.done} of {self.asked}"

    @property
    def notes(self) -> list[str]:
        """What else there is to say: how many failed, what ended the study."""
        failed = [f"{self.failed} failed"] if self.failed else []
        return [*failed, *([_STOPPED[self.status]] if self.status else [])]

    @property
    def told(self) -> str:
        """`24 of 48 rows measured, 2 failed, interrupted`."""
        unit = self.unit.removesuffix("s") if self.count == "1" else self.unit
        return ", ".join([f"{self.count} {unit}{'' if self.whole else ' measured'}", *self.notes])

    @property
    def reason(self) -> str:
        """A sentence on what ended the study, and what there is to do; empty where it went to its end."""
        if self.status == "interrupted":
            return "The study was interrupted; started again with the same command, it goes on from there."
        return f"The study ended with an error: {self.failure}" if self.status == "failed" and self.failure else ""


def progress(study: Mapping[str, Any], results: Results) -> Progress:
    """How far a study got.

    Args:
        study: The study; `planned` is the number of rows that a whole table has, `status` is "finished",
            "interrupted", "failed" or "running", `failure` the error that ended it. Without them, what was tried
            counts as all there is.
        results: What it measured.
    """
    status = status if isinstance(status := study.get("status"), str) else ""
    stopped, failure = (status, str(study.get("failure") or "")) if status in _STOPPED else ("", "")
    planned = _report.number(study.get("planned")) or 0
    rows = _count_rows(results)
    # A point that fails has no rows of its later stages: those of a finished study are not missing.
    if rows < planned and not (status == "finished" and results.failures):
        return Progress("rows", rows, int(planned), len(results.failures), stopped, failure)
    done, failed = count_points(results)
    # The table may hold more than was asked for, rows of an earlier grid: so its size proves nothing.
    return Progress("points", done, None if stopped else done + failed, failed, stopped, failure)


def count_points(results: Results) -> tuple[int, int]:
    """How many ways of pruning a model were measured, and how many failed at any stage."""
    points = unique((point.model, point.way, point.amount) for point in results.points)
    failed = unique((point.model, point.way, point.amount) for point in results.points if point.error)
    return len(points) - len(failed), len(failed)


def _count_rows(results: Results) -> int:
    """How many rows hold a measurement; a dense model is one."""
    dense = len(results.dense) - sum(point.stage == DENSE for point, _ in results.failures)
    return dense + sum(point.runs for point in results.points if point.values)
