"""Readers of images: each returns a table of the library `datasets`, with its columns as they are stored."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn

from sparsefit.errors import DataError, SparsefitError
from sparsefit.extras import need
from sparsefit.modules.lookup_hints import hub_problem, nearest_path

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_DIGITS_TESTED = 450
_DIGITS_SEED = 0
_SHOWN = 3


def from_parquet(files: list[str], streaming: bool) -> Dataset | IterableDataset:
    """The rows of parquet files.

    Raises:
        DataError: for files that are damaged.
    """
    from datasets import load_dataset

    with _reading(", ".join(files[:_SHOWN]), "Fetch the file again."):
        return load_dataset("parquet", data_files=files, split="train", streaming=streaming)


def from_split(name: str, split: str, streaming: bool, configuration: str | None = None) -> Dataset | IterableDataset:
    """A split of a data set (or of one of its configurations) on the hub, or in a folder with the hub's layout.

    Raises:
        DataError: if it cannot be found, fetched or read; says what to do without a network.
    """
    from datasets import load_dataset
    from huggingface_hub.constants import is_offline_mode

    settings = {"split": split, "streaming": streaming} | ({} if configuration is None else {"name": configuration})
    if Path(name).expanduser().is_dir():
        with _reading(name, "Check that the folder is complete, and that it has this split."):
            return load_dataset(str(Path(name).expanduser()), **settings)
    near = nearest_path(Path(name).expanduser())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"there is no folder {name} to read from.{near}")
    # offline, the library uses its cache; with a hub that does not answer it would retry for a long time
    if not is_offline_mode() and (problem := hub_problem()):
        raise DataError(
            f"cannot fetch the split {split} of the data set {name!r}: there is no such folder, and {problem}.{near} "
            "If it was fetched before on this machine, set HF_HUB_OFFLINE=1 to use that. " + _without_network(name)
        )
    with _reading(
        f"the split {split} of the data set {name!r}",
        "A gated data set needs its terms accepted on its page and `hf auth login`. " + _without_network(name),
    ):
        return load_dataset(name, **settings)


def from_folder(folder: Path, skip_corrupt: bool) -> Dataset:
    """The images of class folders: `folder/CLASS/IMAGE`, with the classes in the order of their names.

    The library's own reader of such folders is not used: it would mistake a class called "test" for a split, and
    silently leave out empty classes and files that are not images.

    Raises:
        DataError: for a class without images, and for files that are not images or not in a class folder.
    """
    from datasets import ClassLabel, Dataset, Features, Image, Value

    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    classes = [entry for entry in entries if entry.is_dir()]
    if len(classes) < len(entries) or not classes:
        loose = next((entry.name for entry in entries if not entry.is_dir()), "nothing")
        raise DataError(f"{folder} must hold one folder for each class and nothing else, but it holds {loose}")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = _images_in(name, skip_corrupt)
        paths += files
        labels += [label] * len(files)
    features = Features({"path": Value("string"), "label": ClassLabel(names=[entry.name for entry in classes])})
    table = Dataset.from_dict({"path": paths, "label": labels}, features=features)
    return table.rename_column("path", "image").cast_column("image", Image(decode=False))


def digits(split: str) -> Dataset:
    """The digits of scikit-learn (Alpaydin and Kaynak 1998), 8 x 8, as PNG, in a fixed split stratified by digit.

    Their 17 levels 0, 1, ..., 16 are scaled to 0 ... 255 and rounded: an error of at most 0.002 of level / 16.
    """
    need("sklearn", "the source digits")
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Pillow
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    levels, labels = load_digits(return_X_y=True)  # (1797, 64), (1797,)
    places = train_test_split(
        np.arange(len(labels)), test_size=_DIGITS_TESTED, random_state=_DIGITS_SEED, stratify=labels
    )
    chosen = places[("train", "test").index(split)]
    pixels = np.rint(levels.reshape(-1, 8, 8)[chosen] * (255 / 16)).astype(np.uint8)
    images = []
    for array in pixels:
        file = io.BytesIO()
        Pillow.fromarray(array).save(file, "png")
        images.append({"bytes": file.getvalue(), "path": None})
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    return Dataset.from_dict({"image": images, "label": labels[chosen].tolist()}, features=features)


def _images_in(folder: Path, skip_corrupt: bool) -> list[str]:
    from PIL import Image as Pillow

    known = Pillow.registered_extensions()
    files = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    images = [str(file) for file in files if file.is_file() and file.suffix.lower() in known]
    others = [file for file in files if not file.is_file() or file.suffix.lower() not in known]
    if others:
        what = f"{len(others)} in the class folder {folder} are no image files: {_listed(others)}"
        if not skip_corrupt:
            raise DataError(f"{what}. Move them elsewhere, or set skip_corrupt to leave them out")
        rank_zero_warn(f"{what}. They are skipped")
    if not images:
        raise DataError(
            f"the class folder {folder} holds no image: fill it, or remove it (the classes after it then get other "
            "numbers, which must be those of the model)"
        )
    return images


def _listed(files: list[Path]) -> str:
    return ", ".join(file.name for file in files[:_SHOWN]) + (", ..." if len(files) > _SHOWN else "")


@contextmanager
def _reading(what: str, way_out: str) -> Iterator[None]:
    """Turns errors of the library into a DataError that names the source."""
    try:
        yield
    except SparsefitError:
        raise
    except Exception as error:  # errors of files, formats, the hub and the network have no common base class
        cause = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{what} cannot be read: {cause[0].rstrip('.')}. {way_out}") from error


def _without_network(name: str) -> str:
    return (
        f"Without a network: on a connected machine run `hf download {name} --repo-type dataset --local-dir FOLDER`, "
        "copy the folder here, and name FOLDER:SPLIT as the source."
    )
