"""Augmentation of the training images of `ImageDataModule`, and of calibration images where that is asked for."""

from __future__ import annotations

import warnings

import pytest
import torch
from image_files import _own_cache, _twenty  # noqa: F401
from image_runs import SETTINGS, all_pixels, fit, joined
from kornia.augmentation import RandomBrightness, RandomCrop, RandomHorizontalFlip
from lightning.pytorch import seed_everything
from torch import nn

from sparsefit.data import ImageDataModule


@pytest.mark.parametrize("prefix", ["", "stream:"])
def test_augmentation_that_changes_nothing_leaves_the_processors_values(twenty, tmp_path, prefix):
    settings = SETTINGS | {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "image_size": 12}
    plain = fit(ImageDataModule(None, prefix + twenty, **settings), tmp_path, max_epochs=1)
    data = ImageDataModule(None, prefix + twenty, augmentation=[nn.Identity()], **settings)
    augmented = fit(data, tmp_path, max_epochs=1)
    for batch, expected in zip(augmented.train, plain.train, strict=True):
        assert batch.dtype == torch.float32
        torch.testing.assert_close(batch, expected, atol=1e-5, rtol=0)


def flips(batch, originals):
    """Which pictures came out flipped; raises where one is neither itself nor its mirror image."""
    result = []
    for image in batch:
        same = [torch.allclose(image, one, atol=1e-5) for one in originals]
        mirrored = [torch.allclose(image.flip(-1), one, atol=1e-5) for one in originals]
        assert sum(same) + sum(mirrored) == 1
        result.append(any(mirrored))
    return result


def test_training_images_are_augmented_and_no_others(twenty, tmp_path):
    def run(seed):
        seed_everything(seed, verbose=False)
        data = ImageDataModule(
            None, twenty, None, twenty, augmentation=[RandomHorizontalFlip(p=0.5)], **SETTINGS | {"std": [0.5] * 3}
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*share images")
            return data, fit(data, tmp_path, max_epochs=2)

    data, callback = run(1)
    originals = all_pixels(data.val_dataloader())
    flipped = joined([flips(batch, originals) for batch in callback.train])
    assert 10 <= sum(flipped) <= 30  # of 40
    assert all(not any(flips(batch, originals)) for batch in callback.val)
    assert not any(flips(all_pixels(data.calibration_dataloader()), originals))
    again, other = run(1)[1].train, run(2)[1].train
    assert all(map(torch.equal, callback.train, again))
    assert not all(map(torch.equal, callback.train, other))


def test_a_resumed_run_of_augmented_images_sees_the_same_pictures(twenty, tmp_path):
    def run(folder, checkpoint=None):
        data = ImageDataModule(None, twenty, augmentation=[RandomHorizontalFlip(p=1.0)], **SETTINGS)
        return fit(data, folder, checkpoint, max_epochs=2).train

    whole, resumed = run(tmp_path), run(tmp_path / "more", tmp_path / "step=4.ckpt")
    assert len(resumed) == 6
    assert all(map(torch.equal, resumed, whole[4:]))


def test_modules_see_values_between_0_and_1_in_their_order(twenty, tmp_path):
    class Spy(nn.Module):
        def forward(self, images):
            assert images.dtype == torch.float32
            assert 0 <= images.min() < 0.01
            assert 0.99 < images.max() <= 1
            assert images.shape[1:] == (3, 6, 6)
            return torch.ones_like(images)

    augmentation = [RandomCrop((6, 6)), Spy(), RandomBrightness((0.5, 0.5), p=1.0)]
    settings = SETTINGS | {"batch_size": 20, "mean": [0.5] * 3, "std": [2.0] * 3}
    callback = fit(ImageDataModule(None, twenty, augmentation=augmentation, **settings), tmp_path, max_epochs=1)
    torch.testing.assert_close(callback.train[0], torch.zeros(20, 3, 6, 6))  # (1 - 0.5 - 0.5) / 2


def test_augmented_images_take_the_precision_of_the_training(twenty, tmp_path):
    data = ImageDataModule(None, twenty, augmentation=[nn.Identity()], **SETTINGS)
    callback = fit(data, tmp_path, max_epochs=1, precision="bf16-true")
    assert {batch.dtype for batch in callback.train} == {torch.bfloat16}


def test_calibration_is_augmented_only_if_asked_for_and_then_always_alike(twenty):
    plain = ImageDataModule(None, twenty, **SETTINGS)
    data = ImageDataModule(
        None, twenty, augmentation=[RandomHorizontalFlip(p=0.5)], calibration_augmented=True, **SETTINGS
    )
    originals = all_pixels(plain.calibration_dataloader())
    torch.manual_seed(5)
    list(plain.calibration_dataloader())
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = all_pixels(data.calibration_dataloader())
    assert torch.equal(torch.rand(3), expected)  # no draw is taken from the training
    assert torch.equal(all_pixels(data.calibration_dataloader()), first)
    assert 0 < sum(flips(first, originals)) < 5


def test_a_configuration_file_lists_the_augmentation(twenty, tmp_path):
    from jsonargparse import ArgumentParser

    file = tmp_path / "data.yaml"
    file.write_text(
        f"""
data:
  class_path: sparsefit.data.ImageDataModule
  init_args:
    train_source: {twenty}
    image_size: 8
    mean: [0.5, 0.5, 0.5]
    std: [0.5, 0.5, 0.5]
    calibration_samples: 5
    augmentation:
      - class_path: kornia.augmentation.RandomHorizontalFlip
        init_args: {{p: 1.0}}
      - class_path: kornia.augmentation.RandomCrop
        init_args: {{size: [8, 8], padding: 2}}
"""
    )
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(ImageDataModule, "data")
    data = parser.instantiate_classes(parser.parse_args(["--config", str(file)])).data
    assert [type(module) for module in data.augmentation] == [RandomHorizontalFlip, RandomCrop]
    assert "RandomHorizontalFlip(p=1.0" in data.hparams.augmentation[0]
    assert len(fit(data, tmp_path, max_epochs=1).train) == 1
