"""Sources of images: a string names a source, which gives encoded images and their labels.

| source | images |
|---|---|
| `cifar10:SPLIT` | CIFAR-10 on the hub (`uoft-cs/cifar10`): `train` or `test` |
| `imagenet-1k:SPLIT` | ImageNet on the hub, streamed: short for `stream:ILSVRC/imagenet-1k:SPLIT` |
| `NAME:SPLIT` | a split of a data set on the hub, downloaded |
| `FOLDER:SPLIT` | a split of a data set in a folder with the hub's layout (`data/train-00000-of-00001.parquet`) |
| a `.parquet` file or a pattern (`cifar10/train-*.parquet`) | its rows: images as bytes, with labels |
| any other folder | its subfolders are the classes, sorted by name |
| `digits:train`, `digits:test` | the 8 x 8 grey digits of scikit-learn: 1,347 and 450 |
| `stream:` before a parquet file or a split | the same, streamed instead of downloaded |

`SOURCE[start:stop]` takes a part of the images: `train.parquet[:45000]` to train on, `train.parquet[45000:]` to
validate on. The images are taken in the order of the files; check that they are not sorted by class.

The image column is the one of type Image; the label column is the one of type ClassLabel, or the one called `label`,
`labels` or `fine_label`.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsefit.data.image_readers import digits, from_folder, from_parquet, from_split
from sparsefit.data.source_slices import split_slice
from sparsefit.errors import ConfigError, DataError
from sparsefit.modules.lookup_hints import nearest_path

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, IterableDataset

_SHORT = {"cifar10": "uoft-cs/cifar10", "imagenet-1k": "stream:ILSVRC/imagenet-1k"}
_DIGITS = ("train", "test")
_LABELS = ("label", "labels", "fine_label")
_SHOWN = 3


class Row(NamedTuple):
    """An image as it is stored: its name in error messages, its bytes or its file, its label."""

    name: str
    content: bytes | str | None
    label: int


@dataclass(frozen=True)
class Images:
    """An opened source.

    Args:
        source: the string that names it.
        table: a table with the columns `image` ({"bytes", "path"}, still encoded) and `label` (int).
        class_names: the names of the labels 0, 1, ...; None if the source has none.
        start: the number of its first row, if the source is a slice.
        stop: the number after its last row; None for no end.
    """

    source: str
    table: Dataset | IterableDataset
    class_names: list[str] | None
    start: int = 0
    stop: int | None = None

    @property
    def streamed(self) -> bool:
        """Whether the images can only be read in order."""
        return not hasattr(self.table, "__len__")

    def rows(self, places: list[int]) -> list[Row]:
        """The rows at these indices; not for streams."""
        table = self.table[places]
        records = zip(places, table["image"], table["label"], strict=True)
        return [self._row(place, image, label) for place, image, label in records]

    def row(self, place: int | None, record: Mapping[str, Any]) -> Row:
        """The row of a record of a stream; checks its label."""
        row = self._row(place, record["image"], record["label"])
        _check_label(row.name, row.label)
        return row

    def _row(self, place: int | None, image: Mapping[str, Any] | None, label: int) -> Row:
        image = image or {}
        content, path = image.get("bytes"), image.get("path")
        if content is None and path is not None:
            return Row(path, path, label)
        number = "" if place is None else f" {self.start + place}"
        return Row(f"image{number} of {self.source}" + (f" ({path})" if path else ""), content, label)


def open_images(
    source: str, image_column: str | None = None, label_column: str | None = None, skip_corrupt: bool = False
) -> Images:
    """Opens a source.

    Args:
        source: see the module's table.
        image_column: column of the images; None finds it.
        label_column: column of the labels; None finds it.
        skip_corrupt: leave out files of class folders that are not images, with a warning.

    Raises:
        DataError: for data that are missing, cannot be read, or have missing or negative labels; names them.
        ConfigError: for an invalid source, or ambiguous columns.
    """
    name, start, stop = split_slice(source, "image")
    table = _columns(_table(name, skip_corrupt), source, image_column, label_column)
    class_names = getattr(table.features["label"], "names", None)
    if not hasattr(table, "__len__"):
        table = table.skip(start) if start else table
        return Images(source, table.take(stop - start) if stop else table, class_names, start, stop)
    if start or stop:
        if start >= len(table):
            raise DataError(f"{source} takes no image: there are {len(table)}")
        table = table.select(range(start, min(stop or len(table), len(table))))
    if not len(table):
        raise DataError(f"{source} holds no image: fetch it again, or name another source")
    images = Images(source, table, class_names, start, stop)
    _check_labels(images)
    return images


def overlap(some: Images, others: Images) -> bool:
    """Whether two sources share images, judged by their names and slices."""
    if split_slice(some.source, "image")[0] != split_slice(others.source, "image")[0]:
        return False
    return (some.stop is None or others.start < some.stop) and (others.stop is None or some.start < others.stop)


def labels_of(images: Images) -> np.ndarray:
    """All labels of a source that is not streamed: int64 array (images,)."""
    column = images.table.select_columns(["label"]).with_format("arrow")[:].column("label")
    return column.to_numpy()


def _table(name: str, skip_corrupt: bool) -> Dataset | IterableDataset:
    name, streaming = name.removeprefix("stream:"), name.startswith("stream:")
    kind, _, split = name.rpartition(":")
    if kind in _SHORT:
        long = _SHORT[kind]
        kind, streaming = long.removeprefix("stream:"), streaming or long.startswith("stream:")
    elif kind == "digits":
        if split not in _DIGITS or streaming:
            raise ConfigError(f"unknown source {name!r}: use digits:train or digits:test")
        return digits(split)
    if name.endswith(".parquet"):
        return from_parquet(_files_of(name), streaming)
    path = Path(name).expanduser()
    if path.is_dir():
        if streaming or any(path.rglob("*.parquet")):
            raise ConfigError(
                f"{name} is a folder without a split: name one ({name}:train), or the files ({name}/*.parquet)"
                if any(path.rglob("*.parquet"))
                else f"class folders such as {name} are not streamed: leave stream: out, they are read as needed"
            )
        return from_folder(path, skip_corrupt)
    if path.exists():
        raise ConfigError(f"{name} is a file, but no .parquet file: see sparsefit.data.images for what can be read")
    if not kind or not split or (("/" in split or "\\" in split) and not Path(kind).is_dir()):
        raise DataError(
            f"there is no file or folder {name} to read images from.{nearest_path(path)} "
            "A data set on the hub is named with its split: cifar10:train"
        )
    return from_split(kind, split, streaming)


def _files_of(name: str) -> list[str]:
    path = Path(name).expanduser()
    files = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
    if not files:
        raise DataError(f"there is no file {path} to read images from.{nearest_path(path)}")
    return files


def _columns(
    table: Dataset | IterableDataset, source: str, image_column: str | None, label_column: str | None
) -> Dataset | IterableDataset:
    from datasets import Image

    if table.features is None:
        raise DataError(f"{source} does not say what its columns are: fetch it, and name its parquet files")
    features = dict(table.features)
    image = image_column or _image_column(features, source)
    label = label_column or _label_column(features, source)
    for setting, column in (("image_column", image), ("label_column", label)):
        if column not in features:
            raise ConfigError(f"{source} has no column {column!r}: set {setting} to one of {', '.join(features)}")
    if not str(getattr(features[label], "dtype", "")).startswith(("int", "uint")):
        raise DataError(
            f"the labels of {source} (column {label!r}) are {features[label]}, not whole numbers: number the classes "
            "(`dataset.class_encode_column` of the library `datasets` does), or set label_column"
        )
    table = table.select_columns([image, label])
    table = table.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})
    return table.cast_column("image", Image(decode=False))


def _image_column(features: dict[str, Any], source: str) -> str:
    from datasets import Image

    found = [name for name, feature in features.items() if isinstance(feature, Image)]
    # without Hugging Face's own schema, an image is a struct of these two, or its bytes
    found = found or [name for name, feature in features.items() if _names(feature) >= {"bytes", "path"}]
    found = found or [name for name, feature in features.items() if "binary" in str(getattr(feature, "dtype", ""))]
    if len(found) == 1:
        return found[0]
    what = f"several columns of images ({', '.join(found)})" if found else f"no image among {', '.join(features)}"
    raise ConfigError(f"{source} has {what}: set image_column to the one to use")


def _label_column(features: dict[str, Any], source: str) -> str:
    from datasets import ClassLabel

    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    named = [name for name in _LABELS if name in (classes or features)]
    found = classes if len(classes) == 1 else named
    if len(found) == 1:
        return found[0]
    what = f"several columns of labels ({', '.join(found or classes)})" if found or classes else "no column of labels"
    raise ConfigError(f"{source} has {what} among {', '.join(features)}: set label_column to the one to use")


def _names(feature: Any) -> set[str]:
    return set(feature) if isinstance(feature, Mapping) else set()


def _check_labels(images: Images) -> None:
    column = images.table.select_columns(["label"]).with_format("arrow")[:].column("label")
    missing = column.is_null().to_numpy()
    # Nulls are filled with a number that unsigned labels can also hold.
    labels = column.fill_null(0).to_numpy()
    if (wrong := (missing | (labels < 0)).nonzero()[0]).size:
        names = ", ".join(row.name for row in images.rows(wrong[:_SHOWN].tolist()))
        raise DataError(f"{wrong.size} of {len(labels)} images have a label that is missing or negative: {names}{_WAY}")


def _check_label(name: str, label: int | None) -> None:
    if label is None or label < 0:
        raise DataError(f"the label of {name} is {label}{_WAY}")


_WAY = ". Such images are often a test set without labels: name another split, or leave them out"
