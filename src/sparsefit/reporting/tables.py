"""A table as page and terminal both show it: it is built once, of text, and knows no markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias


class Cell(NamedTuple):
    """A cell with something small below its text; `kind` "best" or "failed" makes it stand out."""

    text: str
    small: str = ""
    kind: str = ""


Row: TypeAlias = Sequence[str | Cell]


class Table(NamedTuple):
    """Rows below the heads of their columns, with notes below and perhaps a last row that sums up."""

    title: str
    columns: Row
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    total: Row = ()


def unique(values: Iterable[Any]) -> list[Any]:
    """The distinct values in the order in which they come."""
    return list(dict.fromkeys(values))
