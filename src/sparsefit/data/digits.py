"""The handwritten digits that come with scikit-learn: real images that need no network."""

from __future__ import annotations

from typing import Any

from sparsefit.data.image_data import ImageDataModule


class DigitsDataModule(ImageDataModule):
    """1,797 grey digits of 8 x 8 pixels (Alpaydin and Kaynak 1998), 1,347 to train on and 450 to test on."""

    def __init__(
        self,
        processor: str | None = None,
        train_source: str | None = "digits:train",
        test_source: str | None = "digits:test",
        calibration_samples: int = 512,
        image_size: int | None = 16,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        **settings: Any,
    ) -> None:
        """Takes what `ImageDataModule` takes.

        Args:
            processor: folder or hub name of the model whose preprocessor_config.json defines how images are resized and
                normalised; None uses `image_size`, `mean` and `std`.
            train_source: images to train on.
            test_source: images to test on.
            calibration_samples: images to calibrate on, drawn without replacement.
            image_size: height and width without a processor, in pixels.
            mean: mean of each channel without a processor; None is that of the grey digits.
            std: standard deviation of each channel without a processor; None is that of the grey digits.
            settings: see `ImageDataModule`.
        """
        if processor is None:
            mean, std = mean or [0.305], std or [0.376]
        else:
            image_size = None
        super().__init__(
            processor,
            train_source,
            test_source=test_source,
            calibration_samples=calibration_samples,
            image_size=image_size,
            mean=mean,
            std=std,
            **settings,
        )
