"""`ImageDataModule` names images that it cannot read, or skips and counts them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from image_files import _own_cache, _twenty, class_folders, corrupt, parquet, rows  # noqa: F401
from image_runs import SETTINGS, joined, numbers, seen

from sparsefit.data import ImageDataModule
from sparsefit.errors import CalibrationError, DataError


@pytest.fixture
def damaged(tmp_path):
    """Twenty images, of which 3, 7, 8 and 19 cannot be read."""
    images = rows(20)
    images[3] = {"bytes": corrupt("truncated"), "path": "cats/three.jpg"}
    images[7], images[8], images[19] = corrupt("garbage"), None, corrupt("empty")
    return parquet(tmp_path, images)


GOOD = sorted(set(range(20)) - {3, 7, 8, 19})


@pytest.mark.parametrize("prefix", ["", "stream:"])
@pytest.mark.parametrize("loader", ["train", "calibration", "val", "test"])
def test_a_corrupt_image_is_an_error_that_names_it(damaged, loader, prefix):
    source = f"{prefix}{damaged}[1:4]"
    data = ImageDataModule(None, source, None, source, source, **SETTINGS | {"calibration_samples": 3})
    name = r"image( 3)? of .*parquet\[1:4\] \(cats/three.jpg\) cannot be read: .*truncated.*set skip_corrupt"
    with pytest.raises(DataError, match=name):
        list(getattr(data, f"{loader}_dataloader")())


def test_a_corrupt_file_of_a_class_folder_is_named_in_a_worker_too(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsefit.data.image_batches._KEPT_BYTES", 0)
    folder = class_folders(tmp_path / "images", {"cat": 3, "dog": 3})
    Path(folder, "dog/4.png").write_bytes(corrupt("broken"))
    for workers in (0, 1):
        data = ImageDataModule(None, test_source=folder, num_workers=workers, **SETTINGS)
        with pytest.raises(DataError, match=r"images/dog/4.png cannot be read: "):
            list(data.test_dataloader())


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "stream:"])
@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (2, 2), (6, 0)])
@pytest.mark.filterwarnings("ignore:[1-4] images of")
def test_corrupt_images_are_skipped_and_counted_where_that_is_asked_for(
    damaged, prefix, batch_size, workers, monkeypatch
):
    monkeypatch.setattr("sparsefit.data.image_batches._KEPT_BYTES", 0 if workers else 2**30)
    data = ImageDataModule(
        None,
        prefix + damaged,
        test_source=prefix + damaged,
        skip_corrupt=True,
        num_workers=workers,
        **SETTINGS | {"batch_size": batch_size, "calibration_samples": 16},
    )
    names = r"4 images of .* cannot be read: image.* of .*; they were skipped"
    with pytest.warns(UserWarning, match=names):
        batches = list(data.test_dataloader())
    assert joined(map(numbers, batches)) == GOOD
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [number % 3 for number in GOOD]
    assert all(len(batch["labels"]) for batch in batches)
    with pytest.warns(UserWarning, match=names):
        assert set(joined(seen(data.train_dataloader()))) == set(GOOD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sorted(joined(seen(data.calibration_dataloader()))) == GOOD  # exactly as many as asked for
    data.hparams.calibration_samples = 17
    with pytest.raises(CalibrationError, match=r"draws 17 images .* has 16 that can be read"):
        list(data.calibration_dataloader())


def test_ranks_of_a_training_have_equally_many_batches_whatever_is_corrupt(damaged, monkeypatch):
    counts = []
    for rank in range(4):
        data = ImageDataModule(None, damaged, skip_corrupt=True, **SETTINGS | {"batch_size": 1})
        monkeypatch.setattr(data, "rank_and_world_size", lambda rank=rank: (rank, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batches = seen(data.train_dataloader())
        assert set(joined(batches)) <= set(GOOD)
        counts.append(len(batches))
    assert counts == [5] * 4


@pytest.mark.parametrize("prefix", ["", "stream:"])
def test_where_no_image_can_be_read_skipping_is_no_way_out(tmp_path, prefix):
    file = parquet(tmp_path, [corrupt("garbage")] * 5)
    data = ImageDataModule(None, prefix + file, test_source=prefix + file, skip_corrupt=True, **SETTINGS)
    with pytest.raises(DataError, match=r"none of the 5 images|5 images of .* cannot be read: .*no other"):
        list(data.test_dataloader())


@pytest.mark.parametrize("prefix", ["", "stream:"])
@pytest.mark.parametrize("how", ["garbage", "empty"])
def test_what_is_wrong_with_an_image_is_said_in_words(tmp_path, how, prefix):
    source = prefix + parquet(tmp_path, [*rows(2), corrupt(how)])
    with pytest.raises(
        DataError, match=r"image 2 of .* cannot be read: it is empty, or no image of a kind that Pillow"
    ):
        list(ImageDataModule(None, test_source=source, **SETTINGS).test_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", ["train", "test"])
def test_a_stream_sliced_behind_its_end_is_reported(twenty, loader, workers):
    source = f"stream:{twenty}[20:]"
    data = ImageDataModule(None, source, test_source=source, num_workers=workers, **SETTINGS)
    with pytest.raises(DataError, match=r"\[20:\] takes no image"):
        list(getattr(data, f"{loader}_dataloader")())
