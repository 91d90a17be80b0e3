from __future__ import annotations

import warnings

import pytest
import torch
from image_files import _own_cache  # noqa: F401
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from transformers import ViTImageProcessorPil

from sparsefit.data import DigitsDataModule
from sparsefit.errors import CalibrationError


def whole(loader):
    batches = list(loader)
    return torch.cat([batch["pixel_values"] for batch in batches]), torch.cat([batch["labels"] for batch in batches])


PLAIN = {"image_size": 8, "mean": [0.0], "std": [1.0]}


def test_all_digits_are_there_once_with_their_labels():
    data = DigitsDataModule(**PLAIN)
    parts = [whole(loader) for loader in (data.train_dataloader(), data.test_dataloader())]
    assert [len(labels) for _, labels in parts] == [1347, 450]
    levels, labels = load_digits(return_X_y=True)
    expected = sorted(zip(labels.tolist(), levels.tolist(), strict=True))
    found = [
        (int(label), (image.flatten() * 16).round().tolist())
        for images, numbers in parts
        for image, label in zip(images, numbers, strict=True)
    ]
    assert sorted(found) == expected
    for images, _ in parts:
        torch.testing.assert_close(images * 16, (images * 16).round(), atol=0.04, rtol=0)
        assert images.min() == 0
        assert images.max() == 1
    shares = [torch.bincount(numbers) / len(numbers) for _, numbers in parts]
    torch.testing.assert_close(*shares, atol=0.003, rtol=0)  # stratified


def test_by_default_they_are_resized_normalised_and_grey():
    data = DigitsDataModule()
    data.setup("fit")
    images, labels = whole(data.train_dataloader())
    assert images.shape == (1347, 1, 16, 16)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert abs(images.mean()) < 0.1
    assert 0.7 < images.std() < 1.1
    assert data.num_classes == 10
    assert data.class_names == [str(digit) for digit in range(10)]


def test_calibration_and_its_limits():
    images, _ = whole(DigitsDataModule().calibration_dataloader())
    assert len(images) == 512
    with pytest.raises(CalibrationError, match="digits:train has 1347: set"):
        DigitsDataModule(calibration_samples=1348).calibration_dataloader()


def test_a_part_of_the_training_digits_can_validate():
    data = DigitsDataModule(train_source="digits:train[:1200]", val_source="digits:train[1200:]")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("fit")
    assert len(whole(data.val_dataloader())[1]) == 147
    assert len(whole(data.train_dataloader())[1]) == 1200


def test_a_model_of_three_channels_brings_its_processor(tmp_path):
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    images, _ = whole(DigitsDataModule(str(tmp_path)).test_dataloader())
    assert images.shape == (450, 3, 8, 8)
    assert torch.equal(images[:, 0], images[:, 2])


def test_a_linear_model_learns_them():
    data = DigitsDataModule(**PLAIN)
    (train, labels), (test, answers) = whole(data.train_dataloader()), whole(data.test_dataloader())
    model = LogisticRegression(max_iter=200).fit(train.flatten(1).numpy(), labels.numpy())
    assert model.score(test.flatten(1).numpy(), answers.numpy()) > 0.93
