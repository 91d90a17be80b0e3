"""Keeps measured points in a file, and estimates the time of the others."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tables.setup import Figures, Point

_SIZES = ("sparsity", "pattern", "granularity")  # settings that hardly change how long a pruning takes


class Store:
    """Points and their figures in a file, a line of JSON each, written as soon as they are measured.

    Args:
        path: The file. The point of an incomplete line is measured again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, Figures] = {}
        self._seconds: dict[str, float] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._keep(entry["point"], entry["figures"], entry["seconds"])
        if text and not text.endswith("\n"):
            path.write_text(text + "\n", encoding="utf-8")

    def __contains__(self, point: Point) -> bool:
        return _key(point) in self._found

    def __getitem__(self, point: Point) -> Figures:
        return self._found[_key(point)]

    def add(self, point: Point, figures: Figures, seconds: float) -> None:
        """Save a point, its figures, and the seconds that it took."""
        self._keep(point, figures, seconds)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"point": point, "figures": figures, "seconds": seconds}) + "\n")

    def seconds_for(self, points: Iterable[Point]) -> float | None:
        """The estimated seconds of some points, from the last one of the same method, or else from the mean of all.

        None if no point was measured yet.
        """
        if not self._seconds:
            return None
        mean = sum(self._seconds.values()) / len(self._seconds)
        return sum(self._seconds.get(_method(point), mean) for point in points)

    def _keep(self, point: Point, figures: Figures, seconds: float) -> None:
        self._found[_key(point)] = figures
        self._seconds[_method(point)] = seconds


def _key(point: Point) -> str:
    return json.dumps(point, sort_keys=True)


def _method(point: Point) -> str:
    """The settings that the duration of a point depends on."""
    pruning = {name: value for name, value in (point["pruning"] or {}).items() if name not in _SIZES}
    names = ("kind", "model", "task", "form", "samples", "length", "windows")
    return _key({name: point.get(name) for name in names} | {"pruning": pruning})
