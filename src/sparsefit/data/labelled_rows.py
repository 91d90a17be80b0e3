"""Reading rows of labelled text from files or the hub, and numbering their classes."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsefit.data.image_readers import from_split
from sparsefit.data.source_slices import split_slice
from sparsefit.errors import ConfigError, DataError
from sparsefit.modules.lookup_hints import nearest_path

if TYPE_CHECKING:
    from datasets import Dataset

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_SHOWN = 5


def open_rows(source: str, columns: Iterable[str]) -> Dataset:
    """Read the rows of a source.

    Args:
        source: a file of JSON lines, CSV, TSV or parquet, or a pattern of such files; or NAME:SPLIT, a split of a data
            set on the hub (NAME:CONFIGURATION:SPLIT if it has several) or in a folder with the hub's layout.
            `SOURCE[start:stop]` takes a part of the rows.
        columns: columns that the rows must have.

    Raises:
        DataError: for a source that is missing, cannot be read, or has no rows.
        ConfigError: for an invalid source, or a missing column.
    """
    name, start, stop = split_slice(source, "row")
    table = _open(name)
    if lacking := [column for column in columns if column not in table.column_names]:
        raise ConfigError(
            f"{name} has no column {lacking[0]!r}; its columns are {', '.join(table.column_names)}. Name those that "
            "hold the text and its label"
        )
    rows = table.select(range(start, min(len(table), stop if stop is not None else len(table))))
    if not len(rows):
        raise DataError(f"{source} takes no row: {name} has {len(table)}")
    return rows


def _open(name: str) -> Dataset:
    from datasets import load_dataset

    path = Path(name).expanduser()
    files = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    kinds = {Path(file).suffix.lower() for file in files}
    if files and kinds <= _FORMATS.keys() and len({_FORMATS[kind] for kind in kinds}) == 1:
        options = {"delimiter": "\t"} if kinds == {".tsv"} else {}
        try:
            return load_dataset(_FORMATS[kinds.pop()], data_files=files, split="train", **options)
        except Exception as error:  # each format fails in its own way
            cause = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
            raise DataError(f"{name} cannot be read: {cause[0].rstrip('.')}. Check the file") from error
    place, colon, split = name.rpartition(":")
    if not colon or not place or not split:
        known = ", ".join(sorted(_FORMATS))
        raise DataError(
            f"{name} names no labelled text: give a file ({known}), or NAME:SPLIT of a data set.{nearest_path(path)}"
        )
    place, _, configuration = place.partition(":")
    return from_split(place, split, streaming=False, configuration=configuration or None)


def names_of_classes(rows: Dataset, column: str) -> list[str] | None:
    """The names of the classes 0, 1, ... in a column of labels, or of lists of labels; None if labels are numbers.

    Labels that are plain text are numbered alphabetically.
    """
    from datasets import ClassLabel

    feature = rows.features[column]
    feature = getattr(feature, "feature", feature)  # the element of a list
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    found = {name for value in rows[column] for name in (value if isinstance(value, list) else [value])}
    return sorted(found) if found and all(isinstance(name, str) for name in found) else None


def number_of(label: Any, names: list[str] | None, what: str) -> int:
    """The number of a class.

    Raises:
        DataError: for a label that is not one of the names or, without names, not a number.
    """
    if isinstance(label, str):
        if names is None or label not in names:
            known = ", ".join((names or [])[:_SHOWN]) + (", ..." if len(names or []) > _SHOWN else "")
            raise DataError(f"{what} has the label {label!r}, which is none of the classes ({known}): give class_names")
        return names.index(label)
    if not isinstance(label, int) or (isinstance(label, bool) and names is not None):
        raise DataError(f"{what} has the label {label!r}: a class is a whole number or a name")
    return int(label)
