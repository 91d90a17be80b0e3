"""The settings of `ImageDataModule`, checked before anything is read."""

from __future__ import annotations

from typing import Any

from sparsefit.data.count_settings import check_counts
from sparsefit.errors import ConfigError
from sparsefit.settings import number


def check_settings(settings: dict[str, Any]) -> None:
    """Check the settings of `ImageDataModule`.

    Raises:
        ConfigError: naming the setting.
    """
    counts = ("batch_size", "calibration_batch_size", "calibration_samples", "shuffle_buffer")
    optional = ("evaluation_batch_size", "val_images", "test_images")
    check_counts(settings, counts, optional)
    if settings["channels"] not in ("auto", "RGB", "L"):
        raise ConfigError(f'channels is {settings["channels"]!r}: use "auto", "RGB" or "L"')
    if settings["calibration_augmented"] and not settings["augmentation"]:
        raise ConfigError("calibration_augmented is set, but there is no augmentation: list its modules")
    explicit = [name for name in ("image_size", "mean", "std") if settings[name] is not None]
    if settings["processor"] is None and len(explicit) < 3:
        raise ConfigError("set processor (the model's folder or hub name), or all of image_size, mean and std")
    if settings["processor"] is not None and explicit:
        raise ConfigError(f"processor and {explicit[0]} are both set: the processor already defines it, remove one")
    if settings["processor"] is None and (
        len(settings["mean"]) != len(settings["std"]) or len(settings["mean"]) not in (1, 3) or 0 in settings["std"]
    ):
        raise ConfigError(
            f"mean is {settings['mean']} and std is {settings['std']}: give 3 numbers each for RGB images, 1 for grey "
            "ones, and no std of 0"
        )
    if settings["image_size"] is not None:
        number("image_size", settings["image_size"], least=1, whole=True)
