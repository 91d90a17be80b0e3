"""A table of plain text, without markup, which both the page and the terminal show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias


class Cell(NamedTuple):
    """A cell with an optional second line in small print; `kind` "best" or "failed" highlights it."""

    text: str
    small: str = ""
    kind: str = ""


Row: TypeAlias = Sequence[str | Cell]


class Table(NamedTuple):
    """A table with column heads, rows, notes below, and optionally a last row with totals."""

    title: str
    columns: Row
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    total: Row = ()


def unique(values: Iterable[Any]) -> list[Any]:
    """The distinct values in order of first appearance."""
    return list(dict.fromkeys(values))
