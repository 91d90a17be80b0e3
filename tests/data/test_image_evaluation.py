"""The images that `ImageDataModule` gives for validation and testing, decoded once and real ones among them."""

from __future__ import annotations

import warnings

import torch
from image_files import _own_cache, _twenty, class_folders  # noqa: F401
from image_runs import PLAIN, QUIET, SETTINGS, Model, all_pixels, joined, seen
from lightning.pytorch import Trainer

from sparsefit.data import ImageDataModule


def test_images_are_decoded_once(tmp_path):
    folder = class_folders(tmp_path / "images", {"cat": 3, "dog": 2})
    data = ImageDataModule(None, folder, test_source=folder, num_workers=2, **SETTINGS)
    first = all_pixels(data.test_dataloader())
    for file in tmp_path.rglob("*.png"):
        file.unlink()
    assert torch.equal(all_pixels(data.test_dataloader()), first)
    assert sorted(joined(seen(data.train_dataloader()))) == list(range(5))


def test_limits_draw_from_the_whole_source(tmp_path):
    folder = class_folders(tmp_path / "images", {"cat": 20, "dog": 20})
    data = ImageDataModule(None, None, None, folder, folder, val_images=10, test_images=99, **SETTINGS)
    drawn = joined(seen(data.val_dataloader()))
    assert len(set(drawn)) == 10
    assert min(drawn) < 20 <= max(drawn)
    assert drawn == joined(seen(data.val_dataloader()))
    assert sorted(joined(seen(data.test_dataloader()))) == list(range(40))


def test_batches_of_evaluation_have_their_own_size(twenty):
    data = ImageDataModule(None, None, None, twenty, twenty, evaluation_batch_size=15, **SETTINGS)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert [len(batch) for batch in seen(loader)] == [15, 5]
    assert ImageDataModule(None, twenty, **SETTINGS).val_dataloader() == []


def test_the_trainer_may_put_its_own_sampler_into_a_loader(twenty):
    data = ImageDataModule(None, test_source=twenty, **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        labels = Trainer(**QUIET).predict(Model(), data.test_dataloader())
    assert torch.cat(labels).tolist() == [number % 3 for number in range(20)]


def test_real_images(shared_data, tmp_path):
    file = f"{shared_data}/cifar10/test.parquet"
    data = ImageDataModule(None, f"{file}[:600]", test_source=f"{file}[9000:]", calibration_samples=256, **PLAIN)
    assert " ".join(data.class_names) == "airplane automobile bird cat deer dog frog horse ship truck"
    images = all_pixels(data.calibration_dataloader())
    assert images.shape == (256, 3, 8, 8)
    assert 0.3 < images.mean() < 0.6
    assert sum(len(batch["labels"]) for batch in data.test_dataloader()) == 1000
