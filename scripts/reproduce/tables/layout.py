"""What a table is, and how its lines are written."""

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
        points: what has to be measured for it; nothing where the options leave nothing of it.
        render: its text in Markdown, once all points are there.
        draw: writes the figure's files into a folder, once all points are there.
        problem: why it cannot be made here, or None if it can.
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
