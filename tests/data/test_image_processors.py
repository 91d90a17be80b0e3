"""`ImageDataModule` gives what the image processor of a model makes of each image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_files import _own_cache, _twenty, encoded, parquet, pixels, rows  # noqa: F401
from image_runs import SETTINGS, all_pixels
from PIL import Image as Pillow
from transformers import BitImageProcessorPil, ConvNextImageProcessorPil, ViTImageProcessorPil

from sparsefit.data import ImageDataModule
from sparsefit.errors import ConfigError, DataError

PROCESSORS = {
    "same size": ViTImageProcessorPil(size={"height": 20, "width": 20}),
    "larger": ViTImageProcessorPil(size={"height": 33, "width": 28}, resample=3),
    "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 24}),
    "large convnext": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "resized and cropped": BitImageProcessorPil(size={"shortest_edge": 26}, crop_size={"height": 22, "width": 22}),
    "cropped beyond the image": BitImageProcessorPil(do_resize=False, crop_size={"height": 32, "width": 32}),
    "not normalised": ViTImageProcessorPil(size={"height": 16, "width": 16}, do_normalize=False),
    "scaled otherwise": ViTImageProcessorPil(size={"height": 16, "width": 16}, rescale_factor=1 / 127.5),
    "one mean": ViTImageProcessorPil(size={"height": 20, "width": 20}, image_mean=0.4, image_std=0.3),
}
FIRST = {"input_data_format": "channels_first"}


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_batches_are_what_the_processor_makes_of_each_image(tmp_path, processor, mode):
    sizes = [(20, 20), (20, 20), (30, 25), (20, 20), (24, 40)]
    if mode == "L":
        processor = type(processor).from_dict(processor.to_dict() | {"image_mean": [0.4], "image_std": [0.3]})
    images = [Pillow.fromarray(pixels(number, *size)).convert(mode) for number, size in enumerate(sizes)]
    processor.save_pretrained(tmp_path / "model")
    file = parquet(tmp_path, [encoded(image) for image in images])
    data = ImageDataModule(str(tmp_path / "model"), test_source=file, batch_size=3)
    batches = list(data.test_dataloader())
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1, 2], [0, 1]]
    for batch, start in zip(batches, (0, 3), strict=True):
        assert set(batch) == {"pixel_values", "labels"}
        assert batch["pixel_values"].dtype == torch.float32
        assert batch["labels"].dtype == torch.int64
        for image, value in zip(images[start:], batch["pixel_values"], strict=False):
            array = np.asarray(image)[None] if mode == "L" else np.asarray(image).transpose(2, 0, 1)
            alone = processor(array, **FIRST, do_convert_rgb=mode == "RGB", return_tensors="pt")["pixel_values"][0]
            assert torch.equal(value, alone)


def test_the_processor_is_saved_unchanged_next_to_a_model(tmp_path, twenty):
    data = ImageDataModule(None, twenty, **SETTINGS | {"mean": [0.1, 0.2, 0.3]})
    data.image_processor.save_pretrained(tmp_path / "model")
    again = ImageDataModule(str(tmp_path / "model"), twenty, calibration_samples=5)
    assert torch.equal(all_pixels(again.calibration_dataloader()), all_pixels(data.calibration_dataloader()))


def test_images_of_several_shapes_need_a_processor_that_makes_them_one(tmp_path):
    ViTImageProcessorPil(size={"shortest_edge": 10}).save_pretrained(tmp_path)
    file = parquet(tmp_path, [*rows(2), encoded(pixels(3, 8, 16))])
    for batch_size in (1, 3):
        data = ImageDataModule(str(tmp_path), test_source=file, batch_size=batch_size)
        with pytest.raises(DataError, match=r"image 0 of .* \(3, 10, 10\) and image 2 of .* \(3, 10, 20\).*crop"):
            list(data.test_dataloader())


@pytest.mark.parametrize(("channels", "kind"), [("RGB", "L"), ("L", "RGB"), ("L", "L"), ("RGB", "RGB")])
def test_images_take_the_channels_of_the_model(tmp_path, channels, kind):
    images = [Pillow.fromarray(pixels(number)).convert(kind) for number in range(4)]
    file = parquet(tmp_path, [encoded(image) for image in images])
    size = 3 if channels == "RGB" else 1
    plain = {"image_size": 8, "mean": [0.0] * size, "std": [1.0] * size}
    (batch,) = ImageDataModule(None, test_source=file, **plain).test_dataloader()
    expected = np.stack([np.asarray(image.convert(channels)).reshape(8, 8, size) for image in images])
    assert torch.equal(batch["pixel_values"], torch.tensor(expected.transpose(0, 3, 1, 2)) / 255)


def test_a_processor_of_other_channels_than_wanted_is_reported(tmp_path, twenty):
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot take images of 1 channels: .*Set channels to RGB"):
        ImageDataModule(str(tmp_path), twenty, channels="L").setup("fit")


def test_a_processor_that_cannot_be_loaded_is_reported(tmp_path, twenty, monkeypatch):
    monkeypatch.setattr("sparsefit.modules.loading.hub_problem", lambda: "the hub cannot be reached")
    (tmp_path / "models/vit").mkdir(parents=True)
    (tmp_path / "models/vit/preprocessor_config.json").write_text("{")
    for name, message in (
        (f"{tmp_path}/models", r"holds no preprocessor_config.json.* Did you mean .*models/vit\?"),
        (f"{tmp_path}/model", r"there is no folder .*Did you mean .*models\?"),
        (f"{tmp_path}/models/vit", "cannot load the image processor in .*Check that the folder is complete"),
        ("some/vit", r"the hub cannot be reached.*`hf download some/vit"),
    ):
        with pytest.raises(ConfigError, match=f"{message}.* Or set image_size, mean and std"):
            ImageDataModule(name, twenty).setup("fit")
