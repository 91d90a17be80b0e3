"""The tables of a run's report, for its page and the terminal. Missing parts of a report have no rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sparsefit.reporting import formats
from sparsefit.reporting import report as reading
from sparsefit.reporting.tables import Row, Table, unique


def quality(report: Mapping[str, Any]) -> Table:
    """Each metric, and each accuracy of a task, by stage; the share won back and the distance from the control."""
    measured = {metric: reading.metric_values(report, metric) for metric in reading.metrics(report)}
    tasks = task_rows(report)
    found = set(reading.STAGES).union(*measured.values(), *(row.values for row in tasks))
    stages = [stage for stage in reading.ALL_STAGES if stage in found]
    columns, rows, notes = ["", *stages, "won back"], [], []
    for metric, values in measured.items():
        texts = [formats.metric(metric, values.get(stage)) for stage in stages]
        distance = formats.distance(metric, reading.distance_from_control(report, metric))
        row = [metric, *texts, formats.percent(reading.won_back(report, metric), 1), distance]
        rows += [row] if values else []
    for task in tasks:
        texts = [formats.percent(task.values.get(stage)) for stage in stages]
        share = reading.share_won_back(*map(task.values.get, reading.STAGES), task.metric, "higher")
        rows.append([f"{task.task} {task.metric}", *texts, formats.percent(share, 1), formats.MISSING])
    if text := reading.section(report, "evaluation").get("text"):
        notes.append(f"Measured on {text}.")
    notes.append("Won back: the share of the lost quality that recovery regained (perplexities: by their logarithms).")
    if reading.CONTROL in found:
        notes.append("Control: the dense model, trained by the same recipe.")
        notes.append("Distance from control: recovered - control; in nats, ln(recovered) - ln(control).")
        return Table("Quality", [*columns, "distance from control"], rows, notes)
    return Table("Quality", columns, [row[:-1] for row in rows], notes)


def timelines(report: Mapping[str, Any]) -> list[Table]:
    """Quality against GPU-hours, a table for each metric; validations are only in the figure."""
    tables = []
    for metric in reading.metrics(report):
        rows = []
        for moment in reading.timeline(report, metric):
            lost = reading.nats_lost(report, metric, moment)
            nats = formats.MISSING if lost is None else f"{lost:+.3f}"
            row = [moment.stage, formats.hours(moment.hours), formats.count(moment.step)]
            rows += [[*row, formats.metric(metric, moment.value), nats]] if moment.stage != "validation" else []
        columns, notes = ["after", "GPU-hours", "step", metric, "nats lost"], []
        if "perplexity" in metric:
            notes = ["Nats lost: ln(perplexity) - ln(perplexity of the dense model)."]
        else:
            columns, rows = columns[:-1], [row[:-1] for row in rows]
        tables.append(Table("Quality against GPU-hours", columns, rows, notes))
    return tables


def layer_types(report: Mapping[str, Any]) -> Table:
    """Zeros of each layer type, and of all pruned layers."""
    whole = reading.section(report, "sparsity")
    types = reading.sparsity_by_type(report)
    rows = [_zeros(name, entry, formats.count(entry["layers"])) for name, entry in types.items()]
    counted = reading.number(whole.get("total")) is not None
    layers = formats.count(len(reading.items(report, "sparsity", "layers")) or None)
    total = _zeros("all pruned", {**whole, "sparsity": whole["total"]}, layers) if counted else []
    overall = formats.percent(whole.get("overall_sparsity"))
    notes = [f"{overall} of the elements of all matrices of the model are zero."] if overall != formats.MISSING else []
    notes += [f"Counted in {whole['counted_on']}."] if whole.get("counted_on") else []
    return Table("Sparsity by layer type", ["layers", "weights", "zeros", "sparsity", "count"], rows, notes, total)


def layers(report: Mapping[str, Any]) -> Table:
    """Zeros of each layer."""
    rows = []
    for layer in reading.entries(report, "sparsity", "layers"):
        shape = " x ".join(map(str, reading.items(layer, "shape"))) or formats.MISSING
        rows.append(_zeros(formats.value(layer.get("name")), layer, shape))
    return Table(f"All {len(rows)} layers", ["layer", "weights", "zeros", "sparsity", "shape (out x in)"], rows)


def _zeros(name: str, entry: Mapping[str, Any], last: str) -> Row:
    counts = (formats.count(entry.get(key)) for key in ("weights", "zeros"))
    return [name, *counts, formats.percent(reading.layer_sparsity(entry)), last]


def costs(report: Mapping[str, Any]) -> Table:
    """Time and GPU-hours of each stage, their share of the budget (or of the total), and what is left of the budget."""
    spent = reading.section(report, "gpu_hours")
    budget, total = reading.number(spent.get("budget")), reading.number(spent.get("total"))
    seconds = reading.number(reading.section(report, "seconds").get("total"))
    stages = reading.stages(report)
    counted = sum(hours or 0.0 for _, _, hours in stages)
    if total is not None and total > 1.005 * counted > 0:
        stages.append(("other", None, total - counted))
    whole = budget or total or counted

    def row(name: str, seconds: float | None, hours: float | None) -> Row:
        share = hours / whole if hours is not None and whole else None
        return [name, formats.seconds(seconds), formats.hours(hours), formats.percent(share, 1)]

    last = row("total", seconds, total) if seconds is not None or total is not None else []
    notes = [f"Budget: {formats.hours(budget)} GPU-hours."] if budget else []
    if budget and total is not None:
        notes.append(f"{'Left' if budget >= total else 'Exceeded by'}: {formats.hours(abs(budget - total))}.")
    columns = ["stage", "time", "GPU-hours", "of budget" if budget else "share"]
    return Table("Time and GPU-hours", columns, [row(*stage) for stage in stages], notes, last)


def blocks(report: Mapping[str, Any]) -> Table:
    """The error of each block's outputs before and after it was tuned."""

    def row(name: str, before: Any, after: Any, steps: str = "", seconds: str = "") -> Row:
        left = after / before if reading.number(before) and reading.number(after) is not None else None
        errors = (formats.percent(before, 3), formats.percent(after, 3), formats.percent(left, 1))
        return [name, *errors, steps, seconds]

    rows = []
    for block in reading.entries(report, "reconstruction", "blocks"):
        steps, seconds = formats.count(block.get("steps")), formats.seconds(block.get("seconds"))
        rows.append(row(formats.value(block.get("block")), block.get("before"), block.get("after"), steps, seconds))
    pairs = reading.block_errors(report)
    total = row("mean", *(sum(side) / len(pairs) for side in zip(*pairs, strict=True))) if pairs else []
    notes = ["Error: squared distance of a block's outputs from the dense model's, divided by their square."]
    return Table("Blocks", ["block", "error before", "after", "after / before", "steps", "time"], rows, notes, total)


class Accuracy(NamedTuple):
    """One accuracy of a task: a share, and its standard error if known."""

    value: float
    error: float | None


class TaskRow(NamedTuple):
    """One metric of a task at each stage, in the order of a run."""

    task: str
    metric: str
    accuracies: dict[str, Accuracy]
    items: float | None
    version: Any
    truncated: float | None

    @property
    def values(self) -> dict[str, float]:
        """The accuracies without their standard errors."""
        return {stage: accuracy.value for stage, accuracy in self.accuracies.items()}


def task_rows(report: Mapping[str, Any]) -> list[TaskRow]:
    """The rows of a report's `tasks`, {stage: {task: {metric: value, ...}}}; empty if there are none."""
    stages = {stage: found for stage in reading.ALL_STAGES if (found := reading.section(report, "tasks", stage))}
    rows = []
    for task in unique(task for results in stages.values() for task in results):
        measured = {stage: reading.section(results, task) for stage, results in stages.items()}
        first = next(filter(None, measured.values()), {})
        for metric in ("acc", "acc_norm"):
            found = {
                stage: Accuracy(value, reading.number(known.get(f"{metric}_stderr")))
                for stage, known in measured.items()
                if (value := reading.number(known.get(metric))) is not None
            }
            known = (reading.number(first.get("items")), first.get("version"), reading.number(first.get("truncated")))
            rows += [TaskRow(task, metric, found, *known)] if found else []
    return rows


def with_error(accuracy: Accuracy | None, missing: str = formats.MISSING) -> str:
    """An accuracy as text: 52.00% ± 7.14."""
    if accuracy is None:
        return missing
    return f"{accuracy.value:.2%}" + (f" ± {100 * accuracy.error:.2f}" if accuracy.error is not None else "")


def truncated_notes(rows: list[TaskRow]) -> list[str]:
    """A sentence for each task with requests that were longer than the model's context."""
    cut = {row.task: row.truncated for row in rows if row.truncated}
    return [
        f"{n:,.0f} requests of {task} were longer than the context and lost their beginning" for task, n in cut.items()
    ]


def tasks(report: Mapping[str, Any]) -> Table:
    """Each accuracy of each zero-shot task with its standard error, by stage."""
    found = task_rows(report)
    stages = [stage for stage in reading.ALL_STAGES if any(stage in row.accuracies for row in found)]
    rows = []
    for row in found:
        accuracies = (with_error(row.accuracies.get(stage)) for stage in stages)
        rows.append([f"{row.task} {row.metric}", *accuracies, formats.count(row.items), str(row.version)])
    notes = ["Measured by lm-eval; ± is one standard error. zero_shot_accuracy is the mean of acc over the tasks."]
    notes += [f"{note}." for note in truncated_notes(found)]
    return Table("Zero-shot tasks", ["task", *stages, "items", "version"], rows, notes)
