"""The results of a study: a tidy table in a CSV file that is written atomically."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparsefit.errors import ConfigError, RunFolderError
from sparsefit.files import write_text
from sparsefit.study.grid import AXES

SEEDS = ("calibration_seed", "training_seed")
KEY = ("model", "stage", *AXES, "epochs", *SEEDS)
NUMBERS = ("sparsity", "counted", "selection_seconds", "evaluation_seconds", "finetuning_seconds")
_TEXTS = ("score", "granularity", "update", "pattern", *SEEDS, "used_update", "digest", "error")
_FIRST, _LAST = (*KEY, "used_update", "counted"), (*NUMBERS[2:], "digest", "error")
Row = dict[str, Any]


class Results:
    """The rows of a study, saved in a file: each is a point at one stage ("dense", "pruned" or "finetuned").

    The seeds of a row are empty if it does not depend on them, and in tables of earlier versions without seeds.

    Args:
        file: The CSV file; existing rows are read. The whole file is rewritten after each new row.
        metrics: Names of the metric columns.

    Raises:
        ConfigError: If a metric has the name of another column.
        RunFolderError: If the file exists and is not such a table.
    """

    def __init__(self, file: Path, metrics: Iterable[str]) -> None:
        self.file, self.metrics = file, tuple(metrics)
        taken = sorted({*self.metrics} & {*_FIRST, *_LAST})
        if taken:
            raise ConfigError(f"a metric is called {taken[0]!r}, as another column of the results is: rename it")
        self.columns = (*_FIRST, *self.metrics, *_LAST)
        self.rows: list[Row] = self._read() if file.exists() else []

    def find(self, **key: Any) -> Row | None:
        """The first row with these values that did not fail, or None."""
        return next((row for row in self.rows if not row["error"] and self._has(row, key)), None)

    def add(self, row: Mapping[str, Any]) -> Row:
        """Add a row, or replace the one with the same key, and write the file; returns it with all columns filled."""
        full = dict.fromkeys(self.columns) | dict.fromkeys(_TEXTS, "") | {"sparsity": 0.0, "epochs": 0} | dict(row)
        key = {name: full[name] for name in KEY}
        places = [place for place, other in enumerate(self.rows) if self._has(other, key)]
        place = places[0] if places else len(self.rows)
        rows = [*self.rows[:place], full, *self.rows[place + 1 :]]
        self._write(rows)
        self.rows = rows
        return full

    def adopt(self, keys: Iterable[Mapping[str, Any]]) -> None:
        """Fill in the seeds of rows from an older table without seeds."""
        for key in keys:
            if self.find(**key) is None and (row := self.find(**{**key, **dict.fromkeys(SEEDS, "")})):
                row.update({name: key[name] for name in SEEDS})

    def forget(self, model: str, keys: Iterable[Mapping[str, Any]]) -> None:
        """Drop failed rows of a model that are not among these keys, as they are no longer part of the study."""
        asked = list(keys)
        rows = [
            row
            for row in self.rows
            if row["model"] != model or not row["error"] or any(self._has(row, key) for key in asked)
        ]
        if len(rows) < len(self.rows):
            self._write(rows)
            self.rows = rows

    def _has(self, row: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
        return all(row[name] == value for name, value in key.items())

    def _read(self) -> list[Row]:
        try:
            with self.file.open(newline="", encoding="utf-8") as lines:
                table = csv.DictReader(lines)
                found = {*(table.fieldnames or ()), *SEEDS}
                missing = [name for name in self.columns if name not in found]
                if missing:
                    raise RunFolderError(
                        f"{self.file} is no table of this study: it has no column {missing[0]!r}. Move it away, or "
                        "give the study another folder"
                    )
                seedless = dict.fromkeys(SEEDS, "")
                return [{name: self._value(name, (seedless | row)[name]) for name in self.columns} for row in table]
        except (UnicodeDecodeError, csv.Error, ValueError, TypeError) as error:
            raise RunFolderError(
                f"{self.file} is damaged ({error}). Move it away, or give the study another folder"
            ) from error

    def _value(self, name: str, text: str) -> Any:
        if name == "epochs" or (name in SEEDS and text):
            return int(text)
        if name in self.metrics or name in NUMBERS:
            return float(text) if text else None
        return text

    def _write(self, rows: Iterable[Row]) -> None:
        buffer = io.StringIO()
        table = csv.DictWriter(buffer, self.columns, lineterminator="\n")
        table.writeheader()
        table.writerows({name: _text(row[name]) for name in self.columns} for row in rows)
        write_text(buffer.getvalue(), self.file)


def _text(value: Any) -> Any:
    """A value as CSV text: floats are read back exactly, and None is empty."""
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    return "" if value is None else value
