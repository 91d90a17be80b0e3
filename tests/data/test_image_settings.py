"""The classes of `ImageDataModule`, and sources and settings that cannot work."""

from __future__ import annotations

import warnings

import pytest
from image_files import CLASSES, _own_cache, _twenty, parquet, rows  # noqa: F401
from image_runs import PLAIN, SETTINGS

from sparsefit.data import ImageDataModule
from sparsefit.errors import ConfigError, DataError


def test_classes_are_named_and_counted(tmp_path, twenty):
    data = ImageDataModule(None, twenty, **SETTINGS)
    assert data.class_names == CLASSES
    assert data.num_classes == 3
    plain = parquet(tmp_path, rows(4), "plain.parquet", labels=[0, 6, 2, 1], names=None)
    data = ImageDataModule(None, plain, **SETTINGS)
    assert data.class_names is None
    assert data.num_classes == 7
    assert ImageDataModule(None, f"stream:{plain}", **SETTINGS).num_classes is None


def test_sources_of_other_classes_are_reported(tmp_path, twenty):
    for names, message in ((["cat", "dog", "emu"], "they differ in emu, owl"), (CLASSES[::-1], "their order differs")):
        other = parquet(tmp_path, rows(5), "other.parquet", names=names)
        with pytest.raises(DataError, match=f"3 classes and .* 3, so the same label means another class; {message}"):
            ImageDataModule(None, twenty, test_source=other, **SETTINGS).setup("fit")


def test_training_and_testing_on_the_same_images_is_reported(twenty):
    with pytest.warns(UserWarning, match="train_source and test_source share images"):
        ImageDataModule(None, f"{twenty}[:15]", test_source=f"{twenty}[14:]", **SETTINGS).setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageDataModule(None, f"{twenty}[:15]", test_source=f"{twenty}[15:]", **SETTINGS).setup("fit")


def test_a_missing_source_is_named(twenty):
    with pytest.raises(ConfigError, match="ImageDataModule has no test_source: name the images"):
        ImageDataModule(None, twenty, **SETTINGS).setup("test")
    with pytest.raises(DataError, match="there is no file"):
        ImageDataModule(None, twenty, test_source="no.parquet", **SETTINGS).setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"val_images": -1}, "val_images is -1"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"channels": "grey"}, 'use "auto", "RGB" or "L"'),
        ({"mean": None}, "all of image_size, mean and std"),
        ({"mean": [0.5]}, "give 3 numbers each"),
        ({"std": [1.0, 0.0, 1.0]}, "no std of 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"processor": "some/model"}, "processor and image_size are both set"),
        ({"calibration_augmented": True}, "there is no augmentation"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        ImageDataModule(**{"train_source": "images.parquet"} | PLAIN | settings)
