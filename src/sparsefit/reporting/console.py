"""What a run or a study says on the terminal: the closing summary and the progress of its stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.errors import LiveError
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from sparsefit.reporting import formats as _formats
from sparsefit.reporting import report as _report
from sparsefit.reporting.study_differences import Differences, differences
from sparsefit.reporting.study_progress import progress
from sparsefit.reporting.study_results import in_order, read_results, seconds_by_kind, unique
from sparsefit.reporting.study_table import Table as StudyTable
from sparsefit.reporting.study_table import results_table
from sparsefit.reporting.task_table import task_rows

console = Console()
"""The console that everything of a run prints to."""

_MISSING = "-"
_SOON = 10.0  # seconds after which a log gets a first estimate, before a quarter is done
_STATUS_STYLE = {"finished": "bold green", "interrupted": "bold yellow", "failed": "bold red"}


def summary(report: Mapping[str, Any]) -> Group:
    """The tables a run ends with, to be printed with `console.print(summary(report))`.

    Dense, pruned and recovered quality with the share won back, quality against GPU-hours, sparsity per layer type,
    seconds and GPU-hours of each stage and of the budget, what reconstruction and merging did, peak memory and the run
    folder. What the report does not hold is left out.
    """
    status = str(report.get("status") or "unknown")
    head = Text.assemble((str(report.get("name") or "run"), "bold"), ": ", (status, _STATUS_STYLE.get(status, "bold")))
    tables = [_quality(report), *_timelines(report), _sparsity(report), _stages(report)]
    parts: list[RenderableType] = [head, *(table for table in tables if table.row_count), *_closing_lines(report)]
    return Group(*parts)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def _row(table: Table, *cells: str, style: str | None = None) -> None:
    table.add_row(*(Text(cell) for cell in cells), style=style)


def _quality(report: Mapping[str, Any]) -> Table:
    measured = {metric: _report.metric_values(report, metric) for metric in _report.metrics(report)}
    tasks = task_rows(report)
    found = set(_report.STAGES).union(*measured.values(), *(row.values for row in tasks))
    stages = [stage for stage in _report.ALL_STAGES if stage in found]
    against = ["above control"] if _report.CONTROL in found else []
    table = _table("", *stages, "won back", *against)
    for metric, values in measured.items():
        cells = [_formats.metric(metric, values.get(stage), _MISSING) for stage in stages]
        cells.append(_formats.percent(_report.won_back(report, metric), 1, _MISSING))
        distance = _report.distance_from_control(report, metric)
        if values:
            _row(table, metric, *cells, *(_formats.distance(metric, distance, _MISSING) for _ in against))
    for row in tasks:
        cells = [_formats.percent(row.values.get(stage), missing=_MISSING) for stage in stages]
        share = _report.share_won_back(*map(row.values.get, _report.STAGES), row.metric, "higher")
        _row(table, f"{row.task} {row.metric}", *cells, _formats.percent(share, 1, _MISSING), *("" for _ in against))
    return table


def control_summary(report: Mapping[str, Any]) -> Group:
    """What a control ends with: quality beside that of its run, and what it took."""
    return Group(
        Text("control: the dense model, trained by the same recipe", "bold"), _quality(report), _control(report)
    )


def _control(report: Mapping[str, Any]) -> Text:
    control = _report.section(report, "control")
    steps, hours = (
        _formats.count(control.get("steps"), _MISSING),
        _formats.hours(_report.number(control.get("gpu_hours"))),
    )
    known = [str(control.get("status")), f"{steps} steps", f"{hours} GPU-hours, which are no part of the run's"]
    known += ["without the teacher"] if control.get("without_teacher") else []
    text = f"control: {', '.join(known)}"
    if harmed := _report.control_harmed(report):
        text += f"; this recipe makes the dense model worse in {', '.join(harmed)}: hold recovery against dense"
    return Text(text, overflow="fold")


def _timelines(report: Mapping[str, Any]) -> list[Table]:
    """Quality against GPU-hours, a table for each metric; validations are left to the page."""
    tables = []
    for metric in _report.metrics(report):
        with_nats = "perplexity" in metric
        table = _table("after", "GPU-hours", "step", metric, *(["nats lost"] if with_nats else []))
        for moment in _report.timeline(report, metric):
            if moment.stage == "validation":
                continue
            lost = _report.nats_lost(report, metric, moment)
            nats = [f"{lost:+.3f}" if lost is not None else _MISSING] if with_nats else []
            spent, step = _formats.hours(moment.hours, _MISSING), _formats.count(moment.step, _MISSING)
            _row(table, moment.stage, spent, step, _formats.metric(metric, moment.value), *nats)
        tables.append(table)
    return tables


def _sparsity(report: Mapping[str, Any]) -> Table:
    table = _table("layers", "weights", "zeros", "sparsity")
    for name, entry in _report.sparsity_by_type(report).items():
        counts = (_formats.count(entry.get(key), _MISSING) for key in ("weights", "zeros"))
        _row(table, name, *counts, _formats.percent(_report.layer_sparsity(entry), missing=_MISSING))
    total = _report.section(report, "sparsity")
    if _report.number(total.get("total")) is not None:
        table.add_section()
        counts = (_formats.count(total.get(key), _MISSING) for key in ("weights", "zeros"))
        _row(table, "all pruned", *counts, _formats.percent(_report.number(total["total"])), style="bold")
        if (overall := _report.number(total.get("overall_sparsity"))) is not None:
            _row(table, "all matrices of the model", "", "", _formats.percent(overall))
    return table


def _stages(report: Mapping[str, Any]) -> Table:
    spent = _report.section(report, "gpu_hours")
    budget, total = _report.number(spent.get("budget")), _report.number(spent.get("total"))
    table = _table("stage", "time", "GPU-hours", *(["of budget"] if budget else []))

    def add(name: str, seconds: float | None, hours: float | None, style: str | None = None) -> None:
        share = [_formats.percent(None if hours is None else hours / budget, 1, _MISSING)] if budget else []
        time_spent = _formats.seconds(seconds, _MISSING)
        _row(table, name, time_spent, _formats.hours(hours, _MISSING), *share, style=style)

    for name, seconds, hours in _report.stages(report):
        add(name, seconds, hours)
    seconds = _report.number(_report.section(report, "seconds").get("total"))
    if seconds is not None or total is not None:
        table.add_section()
        add("total", seconds, total, "bold")
    if budget:
        add("budget", None, budget)
    return table


def _closing_lines(report: Mapping[str, Any]) -> list[Text]:
    lines = []
    training, memory = _report.section(report, "training"), _report.section(report, "memory")
    errors = _report.block_errors(report)
    if errors:
        before, after = (sum(side) / len(errors) for side in zip(*errors, strict=True))
        text = f"reconstruction: {len(errors)} blocks, mean error of their outputs {before:.3%} -> {after:.3%}"
        lines.append(Text(text))
    if training.get("stop_reason"):
        steps = _formats.count(training.get("steps"), _MISSING)
        lines.append(Text(f"training: {steps} steps, stopped because: {training['stop_reason']}"))
    merged = _report.section(report, "merge")
    if merged:
        title = "merged model" if merged.get("folder") else "not merged"
        lines.append(Text(f"{title}: {_merged(report, merged)}", overflow="fold"))
    if _report.section(report, "control"):
        lines.append(_control(report))
    peak = _report.number(memory.get("peak_bytes"))
    if peak is not None:
        lines.append(Text(f"peak memory: {_formats.size(peak)} {memory.get('kind') or ''}".rstrip()))
    if report.get("folder"):
        lines.append(Text(f"run folder: {report['folder']}", overflow="fold"))
    return lines


def _merged(report: Mapping[str, Any], merged: Mapping[str, Any]) -> str:
    known = [str(merged["form"])] if merged.get("form") else []
    if merged.get("lossless") is True:
        known.append("without loss")
    elif merged.get("reason"):
        known.append(f"kept apart: {merged['reason']}")
    elif merged.get("folder"):
        known.append("masks re-applied, with loss")
    if _report.number(merged.get("sparsity")) is not None:
        known.append(f"sparsity {_formats.percent(_report.number(merged['sparsity']))}")
    for metric in _report.metrics(report):
        if _report.number(merged.get(metric)) is not None:
            known.append(f"{metric} {_formats.metric(metric, _report.number(merged[metric]))}")
    return ", ".join([*known, *([f"in {merged['folder']}"] if merged.get("folder") else [])])


def study_summary(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Group:
    """The tables a study ends with: each model's metric by sparsity and way of pruning, right after pruning and tuned.

    Above them how much was measured and what ended the study, below them the differences between the ways of pruning,
    the time and the folder.
    """
    state = progress(study, read_results(study, rows))
    parts: list[RenderableType] = [Text.assemble((str(study.get("name") or "study"), "bold"), ": ", state.told)]
    parts += [Text(state.reason)] if state.reason else []
    for table in results_table(study, rows):
        for stage in unique(column.stage for column in table.columns):
            parts += _study_table(table, stage)
    parts += _study_differences(differences(study, rows))
    spent = sum(seconds_by_kind(study).values())
    parts += [Text(f"time: {_formats.seconds(spent)}")] if spent else []
    parts += [Text(f"study folder: {study['folder']}", overflow="fold")] if study.get("folder") else []
    return Group(*parts)


def _study_table(study: StudyTable, stage: str) -> list[RenderableType]:
    """One stage of a study's table below its title; the best of a row is bold."""
    shown = [index for index, column in enumerate(study.columns) if column.stage == stage]
    heads = [f"{study.columns[index].score}\n{study.columns[index].detail.replace(', ', chr(10))}" for index in shown]
    table, marks = _table("sparsity", *(escape(head.rstrip()) for head in heads)), study.marks()
    for amount, cells in study.rows:
        texts = [
            Text("failed" if cell.failed else _MISSING)
            if cell.value is None
            else Text.assemble((told[0], "bold" if cell.best else ""), (f" {told[1]}", "dim"))
            for cell in (cells[index] for index in shown)
            for told in [cell.told(study.metric, marks.get(cell.used, ""))]
        ]
        table.add_row(Text(amount), *texts)
    dense = f", dense {_formats.metric(study.metric, study.dense)}" if study.dense is not None else ""
    used = {cells[index].used for _, cells in study.rows for index in shown}
    notes = [
        Text(f"{mark} {in_order(order)}, not in the one asked for") for order, mark in marks.items() if order in used
    ]
    return [Text(f"\n{study.model}: {study.metric.replace('_', ' ')}, {stage}{dense}", "bold"), table, *notes]


def _study_differences(found: Differences) -> list[RenderableType]:
    table = _table("", "stage", *map(escape, found.amounts))
    for row in found.rows:
        cells = (row.cells.get(amount, _MISSING) for amount in found.amounts)
        _row(table, f"{row.model}: {row.compared}", row.stage, *cells)
    return [Text(f"\n{found.title}", "bold"), table, Text(found.note)] if found.rows else []


@contextmanager
def stage_progress(
    description: str, total: int | None = None, *, visible: bool = True
) -> Iterator[Callable[..., None]]:
    """Show the progress of one stage and the time left: a bar on a terminal, at most six plain lines anywhere else.

    Args:
        description: What is being done, e.g. "calibration".
        total: How many units there are, or None where nobody knows yet.
        visible: False shows nothing, for the ranks that keep silent.

    Yields:
        `advance(n=1, total=None)`, to be called when `n` more units are done; it may bring a total that is known now.
    """
    if not visible:
        yield lambda n=1, total=None: None
        return
    bar = _start_bar() if console.is_terminal else None
    if bar is None:
        yield from _plain_lines(description, total)
        return
    task = bar.add_task(description, total=total)
    try:
        yield lambda n=1, total=None: bar.update(task, advance=n, total=total)
    finally:
        bar.stop()


def _start_bar() -> Progress | None:
    """A running progress bar, or None where another live display already holds the terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TextColumn("left:"), TimeRemainingColumn())
    bar = Progress(SpinnerColumn(), *columns, *left, console=console)
    try:
        bar.start()
    except LiveError:
        return None
    return bar


def _plain_lines(description: str, total: int | None) -> Iterator[Callable[..., None]]:
    start, whole, done, quarter, estimated, ended = time.monotonic(), total, 0, 0, False, "stopped"

    def say(text: str) -> None:
        console.print(Text(f"{description}: {text}"), soft_wrap=True)

    def advance(n: int = 1, total: int | None = None) -> None:
        nonlocal whole, done, quarter, estimated
        whole, done = whole if total is None else total, done + n
        reached, spent = 4 * done // whole if whole else 0, time.monotonic() - start
        soon = whole and not estimated and spent >= _SOON
        if (quarter < reached or soon) and reached < 4:
            quarter, estimated = reached, True
            left = f", about {_left(spent, done, whole)} left" if spent >= 1 else ""
            say(f"{done} of {whole}, {_formats.seconds(spent)}{left}")

    say(f"started, {total} to do" if total else "started")
    try:
        yield advance
        ended = "done"
    finally:
        count = f"{done} of {whole}, " if whole else f"{done}, " if done else ""
        say(f"{ended}, {count}{_formats.seconds(time.monotonic() - start)}")


def _left(spent: float, done: int, total: int) -> str:
    """The time that the rest takes if it goes on as it went."""
    return _formats.seconds(spent * (total - done) / max(1, done))
