"""Small image files of every kind, written by Pillow, and data sets of them, for tests."""

from __future__ import annotations

import io

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def pixels(number, height=8, width=8, channels=3):
    """The picture of a number, uint8 (height, width, channels): noise, but for its first pixel, the number itself."""
    array = np.random.default_rng(number).integers(0, 256, (height, width, channels), dtype=np.uint8)
    array[0, 0] = number
    return array


def encoded(array, kind="png", **settings):
    file = io.BytesIO()
    image = array if isinstance(array, Pillow.Image) else Pillow.fromarray(array.squeeze())
    image.save(file, kind, **settings)
    return file.getvalue()


def corrupt(how):
    """Bytes that are not a valid image: "garbage", "empty", "truncated" (JPEG) or "broken" (PNG)."""
    if how == "truncated":
        return encoded(pixels(1, 64, 64), "jpeg")[:-400]
    if how == "broken":
        good = bytearray(encoded(pixels(1, 64, 64)))
        good[60:90] = bytes(30)
        return bytes(good)
    return b"" if how == "empty" else b"this is no image" * 9


def rows(count, **size):
    return [encoded(pixels(number, **size)) for number in range(count)]


def table(images, labels=None, image="image", label="label", names=CLASSES):
    """A data set of encoded images (bytes, None, or {"bytes", "path"}), labelled 0, 1, 2, 0, ... unless given."""
    labels = [number % 3 for number in range(len(images))] if labels is None else labels
    records = [one if isinstance(one, dict) or one is None else {"bytes": one, "path": None} for one in images]
    features = Features({image: Image(decode=False), label: ClassLabel(names=names) if names else Value("int64")})
    return Dataset.from_dict({image: records, label: labels}, features=features)


def parquet(folder, images, name="images.parquet", **columns):
    """A function that writes a parquet file of images and returns its path."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    table(images, **columns).to_parquet(str(file))
    return str(file)


def class_folders(folder, counts):
    """A function that writes a folder of images for each class and returns the path of their folder."""
    number = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for _ in range(count):
            (folder / name / f"{number}.png").write_bytes(encoded(pixels(number)))
            number += 1
    return str(folder)


@pytest.fixture(name="twenty")
def _twenty(tmp_path):
    """A parquet file of the numbers 0 to 19."""
    return parquet(tmp_path, rows(20))
