"""Models and data that do not belong together."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from lightning.pytorch import LightningDataModule, LightningModule
from transformers import BitImageProcessorPil, ConvNextImageProcessorPil, ViTImageProcessorPil

from sparsefit.cli.model_data_checks import check_data
from sparsefit.data import DigitsDataModule
from sparsefit.errors import ConfigError
from sparsefit.modules import ImageClassifierModule

SIZE = {"height": 16, "width": 16}
CONFIG = {"num_channels": 1, "patch_size": 4, "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}


def processors(of_model, of_data):
    return SimpleNamespace(image_processor=of_model), SimpleNamespace(image_processor=of_data)


def vit(**settings):
    return ViTImageProcessorPil(**{"size": SIZE} | settings)


def module(labels=10, names=None):
    numbers = {name: number for number, name in enumerate(names or ())}
    head = {"id2label": dict(enumerate(names)), "label2id": numbers} if names else {"num_labels": labels}
    return ImageClassifierModule("convnext", CONFIG | head)


@pytest.mark.parametrize(
    ("own", "other", "message"),
    [
        (vit(image_mean=[0.9] * 3), vit(), r"image_mean is .*0\.9.* for the model and .*0\.5"),
        (vit(image_std=[0.5, 0.5, 0.1]), vit(), r"image_std is .*0\.1.* for the model"),
        (vit(), vit(size={"height": 8, "width": 8}), "size is .*16.* and .*8.* for the data"),
        (vit(), vit(rescale_factor=1 / 127.5), "rescale_factor"),
        (vit(do_normalize=False), vit(), "do_normalize is False for the model and True for the data"),
        (vit(), ConvNextImageProcessorPil(size={"shortest_edge": 16}), "size is .*height.* and .*shortest_edge"),
        (
            BitImageProcessorPil(size={"shortest_edge": 26}, crop_size=SIZE),
            BitImageProcessorPil(size={"shortest_edge": 26}, crop_size=24),
            "crop_size",
        ),
    ],
)
def test_images_prepared_otherwise_are_reported(own, other, message):
    with pytest.raises(ConfigError, match=f"{message}.*Set data.init_args.processor to the model's folder"):
        check_data(*processors(own, other))


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (vit(), vit()),
        (vit(image_mean=[0.5] * 3), vit(image_mean=0.5)),
        (vit(rescale_factor=1 / 255), vit(rescale_factor=0.00392156862745098)),
        (vit(do_normalize=False, image_mean=[0.9] * 3), vit(do_normalize=False)),  # whose means do nothing
        (vit(), None),
        (None, vit()),
        (vit(), lambda image: image),
    ],
)
def test_images_prepared_alike_pass(own, other, recwarn):
    check_data(*processors(own, other))
    assert not recwarn.list


def test_a_saved_processor_is_the_same(tmp_path, recwarn):
    data = DigitsDataModule(mean=[0.9])
    data.image_processor.save_pretrained(tmp_path)
    loaded = DigitsDataModule(str(tmp_path)).image_processor
    assert list(loaded.image_mean) == [0.9]
    check_data(*processors(data.image_processor, loaded))
    assert not recwarn.list


DIGITS = [str(digit) for digit in range(10)]


@pytest.mark.parametrize("names", [DIGITS[::-1], ["10", *DIGITS]])
def test_the_same_classes_in_another_order_are_reported(names):
    with pytest.raises(ConfigError, match=r"'0' is class (9|1) of the model and 0 of the data, and 9 more differ"):
        check_data(module(names=names), DigitsDataModule())


@pytest.mark.parametrize("names", [None, DIGITS, ["zero", "one", *DIGITS[2:]]])
def test_classes_that_agree_or_have_other_names_pass(names, recwarn):
    check_data(module(names=names), DigitsDataModule())
    assert not recwarn.list


def test_a_head_of_another_size_is_reported():
    with pytest.raises(ConfigError, match="head has 4 classes and the data have 10"):
        check_data(module(4), DigitsDataModule())
    with pytest.warns(UserWarning, match="head has 1000 classes and the data have 10"):
        check_data(module(1000), DigitsDataModule())


def test_modules_and_data_of_other_kinds_pass(recwarn):
    check_data(LightningModule(), LightningDataModule())
    check_data(LightningModule(), DigitsDataModule())
    check_data(module(), LightningDataModule())
    assert not recwarn.list


def images_recipe(folder, **data):
    return {
        "model": {
            "class_path": "sparsefit.modules.ImageClassifierModule",
            "init_args": {"model": "convnext", "config": CONFIG, "num_classes": 10},
        },
        "data": {
            "class_path": "sparsefit.data.DigitsDataModule",
            "init_args": {
                "train_source": "digits:train[:64]",
                "test_source": "digits:test[:50]",
                "calibration_samples": 16,
                **data,
            },
        },
        "pruning": {"sparsity": 0.5, "granularity": "layer"},
        "budget": {"gpu_hours": 1.0},
        "run": {"folder": str(folder)},
        "trainer": {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False},
    }


def test_a_fit_leaves_a_model_with_its_processor_and_a_fit_of_that_wants_the_same(sparsefit, tmp_path):
    from transformers import AutoImageProcessor

    recipe = images_recipe(tmp_path / "run")
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 0, errors
    for part in ("base", "model"):
        processor = AutoImageProcessor.from_pretrained(tmp_path / "run" / part, backend="pil")
        assert (processor.size["height"], list(processor.image_mean)) == (16, [0.305])

    again = images_recipe(tmp_path / "again", mean=[0.9])
    again["model"]["init_args"] = {"model": str(tmp_path / "run/model")}
    status, _, errors = sparsefit("fit", recipe=again)
    assert status == 2
    assert "image_mean is [0.305] for the model and [0.9] for the data" in errors
    assert not [file for file in (tmp_path / "again").rglob("*") if file.is_file() and "events" not in file.name]
