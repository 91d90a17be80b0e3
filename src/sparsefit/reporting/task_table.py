"""Zero-shot tasks in a report: each task's accuracies by stage, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from sparsefit.reporting import report as _report
from sparsefit.reporting.markup import MISSING, as_table, card

_METRICS = ("acc", "acc_norm")


class Accuracy(NamedTuple):
    """One accuracy of a task: a share, and its standard error where it is known."""

    value: float
    error: float | None


class TaskRow(NamedTuple):
    """One metric of a task, by stage in the order of a run."""

    task: str
    metric: str
    accuracies: dict[str, Accuracy]
    items: float | None
    version: Any
    truncated: float | None

    @property
    def values(self) -> dict[str, float]:
        """The accuracies alone."""
        return {stage: accuracy.value for stage, accuracy in self.accuracies.items()}


def task_rows(report: Mapping[str, Any]) -> list[TaskRow]:
    """The rows of a report's `tasks`, which are {stage: {task: {metric: value, ...}}}; empty where there are none."""
    stages = {stage: found for stage in _report.ALL_STAGES if (found := _report.section(report, "tasks", stage))}
    rows = []
    for task in dict.fromkeys(task for results in stages.values() for task in results):
        told = {stage: _report.section(results, task) for stage, results in stages.items()}
        first = next((known for known in told.values() if known), {})
        for metric in _METRICS:
            found = {
                stage: Accuracy(value, _report.number(known.get(f"{metric}_stderr")))
                for stage, known in told.items()
                if (value := _report.number(known.get(metric))) is not None
            }
            if found:
                items, truncated = (_report.number(first.get(key)) for key in ("items", "truncated"))
                rows.append(TaskRow(task, metric, found, items, first.get("version"), truncated))
    return rows


def with_error(accuracy: Accuracy | None, missing: str = MISSING) -> str:
    """An accuracy for people: 52.00% ± 7.14."""
    if accuracy is None:
        return missing
    return f"{accuracy.value:.2%}" + (f" ± {100 * accuracy.error:.2f}" if accuracy.error is not None else "")


def tasks(report: Mapping[str, Any]) -> str:
    """The card of a report's page: a row for each accuracy of each task."""
    rows = task_rows(report)
    if not rows:
        return ""
    stages = [stage for stage in _report.ALL_STAGES if any(stage in row.accuracies for row in rows)]
    cells = [
        (
            f"{escape(row.task)} {escape(row.metric)}",
            *(with_error(row.accuracies.get(stage)) for stage in stages),
            MISSING if row.items is None else f"{row.items:,.0f}",
            escape(str(row.version)),
        )
        for row in rows
    ]
    notes = ["By lm-eval; ± is one standard error. zero_shot_accuracy is the mean of acc over the tasks."]
    notes += [f"{note}." for note in truncated_notes(rows)]
    note = f'<p class="muted small">{escape(" ".join(notes))}</p>'
    return card("Zero-shot tasks", as_table(("task", *stages, "items", "version"), cells) + note)


def truncated_notes(rows: list[TaskRow]) -> list[str]:
    """A sentence for each task with requests that the model's context could not hold."""
    cut = {row.task: row.truncated for row in rows if row.truncated}
    return [
        f"{count:,.0f} requests of {task} lost their beginning, longer than the context" for task, count in cut.items()
    ]
