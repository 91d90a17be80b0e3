"""The description of a table, and its text in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tables.setup import Point, Setup
from tables.store import Store


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper.

    Attributes:
        title: what it shows.
        points: the points to measure for it; none if the options exclude the whole table.
        render: its text in Markdown, after all points were measured.
        draw: writes the figure's files into a folder, after all points were measured.
        problem: why the table cannot be made on this machine, or None if it can.
    """

    title: str
    points: Callable[[Setup], list[Point]]
    render: Callable[[Setup, Store], str]
    draw: Callable[[Setup, Store, Path], None] | None = None
    problem: Callable[[Setup], str | None] = lambda _: None


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
