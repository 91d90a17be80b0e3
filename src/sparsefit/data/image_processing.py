"""From encoded images to model inputs: decoding by Pillow, the rest by the model's own image processor."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from sparsefit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BaseImageProcessor

Channels = Literal["auto", "RGB", "L"]

_DECODED: dict[str, Any] = {"input_data_format": "channels_first", "do_convert_rgb": False}
_AFFINE = 1e-4  # tolerance for rounding in float32, as a share of the range of the values


def make_image_processor(image_size: int, mean: Sequence[float], std: Sequence[float]) -> BaseImageProcessor:
    """A processor that resizes to (image_size, image_size), bilinearly, scales to [0, 1] and normalises."""
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(
        size={"height": image_size, "width": image_size}, image_mean=list(mean), image_std=list(std)
    )


def decode(content: bytes | str | None, channels: Literal["RGB", "L"]) -> np.ndarray:
    """Decode an image: uint8 (channels, height, width), rotated as its EXIF data say.

    Grey images become RGB by repetition, transparent ones get a white background (as in transformers), 16-bit ones keep
    their upper 8 bits.

    Raises:
        Exception: depending on the decoder, for an image that is damaged or missing.
    """
    from PIL import ExifTags, ImageOps, UnidentifiedImageError
    from PIL import Image as Pillow
    from transformers.image_transforms import convert_to_rgb

    if content is None:
        raise FileNotFoundError("the image is missing")
    try:
        opened = Pillow.open(io.BytesIO(content) if isinstance(content, bytes) else content)
    except UnidentifiedImageError as error:  # its message only names an object in memory
        raise ValueError("it is empty, or no image of a kind that Pillow knows") from error
    with opened as file:
        image = _of_8_bits(file)
        if file.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        plain = "transparency" not in image.info
        if image.mode == "L" and channels == "L" and plain:
            return np.array(image)[None]
        pixels = np.array(image) if image.mode == "RGB" and plain else convert_to_rgb(image, return_numpy=True)
    if channels == "L":
        return np.array(Pillow.fromarray(pixels).convert("L"))[None]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


class ImageProcessing:
    """An image processor in two steps: resizing and cropping images, and scaling their values.

    Between the steps images are uint8, which takes a quarter of the memory, and can be augmented. Both steps are
    computed by the processor itself: the second is a lookup table of its results for all 256 values.

    Args:
        processor: an image processor of transformers.
        channels: "RGB", "L" (grey), or "auto" for as many as the processor has means.

    Raises:
        ConfigError: for a processor that cannot be split in this way.
    """

    def __init__(self, processor: BaseImageProcessor, channels: Channels = "auto") -> None:
        self.processor = processor
        mean = getattr(processor, "image_mean", None)
        if channels == "auto":
            channels = "L" if isinstance(mean, Sequence) and len(mean) == 1 else "RGB"
        self.channels: Literal["RGB", "L"] = channels
        self.table = _table(processor, 1 if channels == "L" else 3)  # float32 (channels, 256)
        self._unchanged: dict[tuple[int, ...], bool] = {}
        self._first: tuple[str, tuple[int, ...]] | None = None

    def pixels(self, images: list[np.ndarray], names: list[str]) -> Tensor:
        """Resize and crop images.

        Args:
            images: uint8 (channels, height, width) each; heights and widths may differ.
            names: the names of the images, for errors.

        Returns:
            uint8 (images, channels, height, width).

        Raises:
            DataError: if the results differ in size from each other or from earlier ones.
        """
        if not images:
            return torch.empty((0, len(self.table), 1, 1), dtype=torch.uint8)
        if not all(self._leaves(image.shape) for image in images):
            images = self._shaped(images)
        for name, image in zip(names, images, strict=True):
            self._first = self._first or (name, image.shape)
            if image.shape != self._first[1]:
                raise DataError(
                    f"{self._first[0]} comes out of the image processor in the shape {self._first[1]} and {name} in "
                    f"{image.shape}, which cannot be batched: let the processor crop (do_center_crop and crop_size) or "
                    'resize to a fixed height and width (size: {"height": ..., "width": ...})'
                )
        return torch.from_numpy(np.stack(images))

    def values(self, pixels: Tensor) -> Tensor:
        """Scaled and normalised images: float32 of the shape of `pixels`, uint8 (images, channels, height, width)."""
        values = np.empty(pixels.shape, np.float32)
        for channel, table in enumerate(self.table.numpy()):
            # five times faster than indexing in torch; "clip" never changes a value
            values[:, channel] = np.take(table, pixels[:, channel].numpy(), mode="clip")
        return torch.from_numpy(values)

    def normalise(self, images: Tensor) -> Tensor:
        """As `values`, for float images (images, channels, height, width) with values in [0, 1].

        Raises:
            ConfigError: if the processor does not scale values linearly.
        """
        low, high = self.table[:, 0], self.table[:, -1]
        line = low[:, None] + torch.linspace(0, 1, 256) * (high - low)[:, None]
        if (line - self.table).abs().max() > _AFFINE * (high - low).abs().max():
            raise ConfigError(
                f"{type(self.processor).__name__} does not scale the values of images linearly, so augmented ones "
                "cannot be normalised: train without augmentation"
            )
        low, high = (limit.to(images.device, images.dtype).view(1, -1, 1, 1) for limit in (low, high))
        return low + images * (high - low)

    def _shaped(self, images: list[np.ndarray]) -> list[np.ndarray]:
        shaped = self.processor(images, **_DECODED, do_rescale=False, do_normalize=False)
        shaped = [np.asarray(image) for image in shaped["pixel_values"]]
        if any(image.dtype != np.uint8 or image.shape[0] != len(self.table) for image in shaped):
            raise ConfigError(_other(self.processor))
        return shaped

    def _leaves(self, shape: tuple[int, ...]) -> bool:
        """Whether the processor leaves images of this shape unchanged, tested with a noise image."""
        if shape not in self._unchanged:
            noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
            self._unchanged[shape] = np.array_equal(self._shaped([noise])[0], noise)
        return self._unchanged[shape]


def _table(processor: BaseImageProcessor, channels: int) -> Tensor:
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (channels, 16, 16)).copy()
    try:
        values = processor([levels], **_DECODED, do_resize=False, do_center_crop=False, do_pad=False)
    except ValueError as error:
        raise ConfigError(
            f"the image processor cannot take images of {channels} channels: {error}. Set channels to "
            f"{'RGB' if channels == 1 else 'L'}, or take a processor made for such images"
        ) from error
    values = torch.as_tensor(np.asarray(values["pixel_values"][0]), dtype=torch.float32)
    if values.shape != levels.shape:
        raise ConfigError(_other(processor))
    return values.flatten(1)


def _other(processor: BaseImageProcessor) -> str:
    return (
        f"{type(processor).__name__} is no processor that resizes, crops, scales and normalises single images: take "
        "one of an image classifier, or set image_size, mean and std, without a processor"
    )


def _of_8_bits(image: Image) -> Image:
    from PIL import Image as Pillow

    if not image.mode.startswith(("I", "F")):
        return image
    levels = np.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"its values (mode {image.mode}) are neither of 8 nor of 16 bits")
    return Pillow.fromarray((levels // 256).astype(np.uint8))
