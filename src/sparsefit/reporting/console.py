"""Terminal output of a run or a study: the final summary and the progress of its stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.errors import LiveError
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sparsefit.reporting import formats, run_tables, sentences, tables
from sparsefit.reporting import report as reading
from sparsefit.reporting.study_results import progress, read_results, seconds_by_kind
from sparsefit.reporting.study_tables import differences, results_tables

console = Console()
"""The console to which all output of a run is printed."""

_SOON = 10.0  # seconds after which a log gets its first estimate, even if less than a quarter is done
_STYLES = {"finished": "bold green", "interrupted": "bold yellow", "failed": "bold red", "best": "bold"}


def summary(report: Mapping[str, Any]) -> Group:
    """The final tables of a run, to be printed with `console.print(summary(report))`."""
    status = str(report.get("status") or "unknown")
    head = Text.assemble((str(report.get("name") or "run"), "bold"), ": ", (status, _STYLES.get(status, "bold")))
    shown = [run_tables.quality(report), *run_tables.timelines(report)]
    shown += [run_tables.layer_types(report), run_tables.costs(report)]
    lines = [Text(line, overflow="fold") for line in _closing_lines(report)]
    return Group(head, *(part for table in shown for part in _printed(table)), *lines)


def control_summary(report: Mapping[str, Any]) -> Group:
    """The final output of a control: its quality next to that of its run, and its cost."""
    title = Text("control: the dense model, trained by the same recipe", "bold")
    return Group(title, *_printed(run_tables.quality(report)), Text(sentences.control(report), overflow="fold"))


def study_summary(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Group:
    """The final output of a study: how much was measured, the tables of results and differences, time and folder."""
    results = read_results(study, rows)
    state, spent = progress(study, results), sum(seconds_by_kind(study).values())
    parts: list[RenderableType] = [Text.assemble((str(study.get("name") or "study"), "bold"), ": ", state.text)]
    parts += [Text(state.reason)] if state.reason else []
    for table in [*results_tables(results), differences(results)]:
        parts += _printed(table)
    parts += [Text(f"time: {formats.seconds(spent)}")] if spent else []
    parts += [Text(f"study folder: {study['folder']}", overflow="fold")] if study.get("folder") else []
    return Group(*parts)


def _printed(table: tables.Table) -> list[RenderableType]:
    """A table with its title above and its notes below; nothing if it has no rows."""
    if not table.rows and not table.total:
        return []
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, head in enumerate(table.columns):
        shown.add_column(_cell(head), justify="right" if index else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(_cell, row))
    if table.total:
        shown.add_section()
        shown.add_row(*map(_cell, table.total), style="bold")
    return [Text(f"\n{table.title}", "bold"), shown, *map(Text, table.notes)]


def _cell(cell: str | tables.Cell) -> Text:
    cell = cell if isinstance(cell, tables.Cell) else tables.Cell(cell)
    return Text.assemble((cell.text, _STYLES.get(cell.kind, "")), (f" {cell.small}".rstrip(), "dim"))


def _closing_lines(report: Mapping[str, Any]) -> Iterator[str]:
    memory = reading.section(report, "memory")
    yield from sentences.recovery(report)
    if reading.number(memory.get("peak_bytes")) is not None:
        yield f"peak memory: {formats.size(memory['peak_bytes'])} {memory.get('kind') or ''}".rstrip()
    if report.get("folder"):
        yield f"run folder: {report['folder']}"


@contextmanager
def stage_progress(
    description: str, total: int | None = None, *, visible: bool = True
) -> Iterator[Callable[..., None]]:
    """Show the progress of one stage and the time left: a bar on a terminal, at most six plain lines elsewhere.

    `total` is None if the number of units is not known yet; `visible` is False on ranks that print nothing. Yields
    `advance(n=1, total=None)`, to be called when `n` more units are done; it can also set the total.
    """
    if not visible:
        yield lambda n=1, total=None: None
        return
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    try:
        if console.is_terminal:
            bar.start()
    except LiveError:  # another live display holds the terminal
        pass
    if not bar.live.is_started:
        yield from _plain_lines(description, total)
        return
    task = bar.add_task(escape(description), total=total)
    try:
        yield lambda n=1, total=None: bar.update(task, advance=n, total=total)
    finally:
        bar.stop()


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
            rest = spent * (whole - done) / max(1, done)  # at the same rate
            left = f", about {formats.seconds(rest)} left" if spent >= 1 else ""
            say(f"{done} of {whole}, {formats.seconds(spent)}{left}")

    say(f"started, {total} to do" if total else "started")
    try:
        yield advance
        ended = "done"
    finally:
        count = f"{done} of {whole}, " if whole else f"{done}, " if done else ""
        say(f"{ended}, {count}{formats.seconds(time.monotonic() - start)}")
