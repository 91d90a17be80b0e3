"""A LightningDataModule of labelled images for image classifiers: training, calibration, validation and testing."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from sparsefit.data.data_position import Settings
from sparsefit.data.image_batches import ImageStream, ImageTable, NeverEmpty, Part, too_few
from sparsefit.data.image_loading import Batch, EpochSampler, Finish, ImageLoader
from sparsefit.data.image_processing import ImageProcessing, make_image_processor
from sparsefit.data.image_settings import check_settings
from sparsefit.data.images import Images, labels_of, open_images, overlap
from sparsefit.data.resumable_data import ResumableDataModule
from sparsefit.data.windows import generator_of
from sparsefit.errors import ConfigError, DataError
from sparsefit.extras import need
from sparsefit.modules.loading import load_image_processor

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

_EVALUATED = ("train_source", "val_source", "test_source")


class ImageDataModule(ResumableDataModule):
    """Labelled images in batches {"pixel_values": float32 (batch, channels, height, width), "labels": int64 (batch,)}.

    A source is a parquet file or a pattern of them, a folder with one folder for each class, `cifar10:train`,
    `imagenet-1k:validation` (streamed), `NAME:SPLIT` of the hub or of a folder, `digits:train`; `stream:` before a file
    or a split streams it. `SOURCE[start:stop]` takes a part of its images. See `sparsefit.data.images`.

    With `augmentation`, the training loader yields resized and cropped images as uint8, and `on_after_batch_transfer`,
    which the Trainer calls, augments and normalises them on the device. All other batches are already complete when
    the loader yields them.

    Args:
        processor: folder or hub name of the model whose preprocessor_config.json defines how images are resized,
            cropped and normalised; None uses `image_size`, `mean` and `std`.
        train_source: images to train on.
        calibration_source: images to calibrate on; None takes the training images.
        val_source: images to validate on; None validates on nothing.
        test_source: images to test on.
        batch_size: images in a training batch.
        evaluation_batch_size: images in a validation or test batch; None takes `batch_size`.
        calibration_samples: images to calibrate on, drawn without replacement.
        calibration_batch_size: images in a calibration batch.
        augmentation: modules that are applied in order to training images (batch, channels, height, width) in [0, 1],
            such as kornia.augmentation.RandomHorizontalFlip; they use torch's global random number generator.
        calibration_augmented: also augment the calibration images.
        channels: "RGB", "L" (grey), or "auto" for as many as the processor has means; images are converted.
        skip_corrupt: leave out images that are damaged or missing, with a warning; otherwise they raise an error.
        val_images: the maximum number of validation images, drawn at random from the source; of a stream, which may be
            sorted by class, the first ones. None uses all. Images that `skip_corrupt` leaves out count.
        test_images: as `val_images`, for testing.
        image_size: height and width without a processor, in pixels.
        mean: mean of each channel without a processor, of values in [0, 1].
        std: standard deviation of each channel without a processor, of values in [0, 1].
        image_column: column of the images, if a source has several.
        label_column: column of the labels, if a source has several.
        shuffle_buffer: images that the shuffling of a stream keeps in memory.
        seed: the seed of all random draws; the same seed gives the same images in the same order.
        num_workers: processes that decode images; not needed for sources that take at most 1 GiB when resized: these
            are decoded once and stay in memory.
    """

    def __init__(
        self,
        processor: str | None = None,
        train_source: str | None = None,
        calibration_source: str | None = None,
        val_source: str | None = None,
        test_source: str | None = None,
        batch_size: int = 64,
        evaluation_batch_size: int | None = None,
        calibration_samples: int = 4096,
        calibration_batch_size: int = 64,
        augmentation: list[nn.Module] | None = None,
        calibration_augmented: bool = False,
        channels: Literal["auto", "RGB", "L"] = "auto",
        skip_corrupt: bool = False,
        val_images: int | None = None,
        test_images: int | None = None,
        image_size: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        need("PIL", "an image data module")
        settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_settings(settings)
        # as text: modules in a checkpoint would require unpickling
        self.save_hyperparameters(settings | {"augmentation": [str(module) for module in augmentation or []]})
        self.augmentation = nn.Sequential(*augmentation or [])
        self._opened: dict[str, Images] = {}
        self._tables: dict[str, ImageTable] = {}

    @cached_property
    def image_processor(self) -> BaseImageProcessor:
        """The transformers image processor; a run saves it with a model that has none of its own."""
        settings = self.hparams
        if settings.processor is not None:
            try:
                return load_image_processor(settings.processor)
            except ConfigError as error:
                raise ConfigError(f"{error} Or set image_size, mean and std, without a processor.") from error
        return make_image_processor(settings.image_size, settings.mean, settings.std)

    @property
    def class_names(self) -> list[str] | None:
        """The names of the labels 0, 1, ...; None if the source has none."""
        return self._images(self._first_source()).class_names

    @property
    def num_classes(self) -> int | None:
        """The number of classes of the source; None for a stream that does not name them."""
        images = self._images(self._first_source())
        if images.class_names is not None:
            return len(images.class_names)
        return None if images.streamed else int(labels_of(images).max()) + 1

    def setup(self, stage: str | None = None) -> None:
        """Opens the sources that the stage needs, so that missing images raise before a model is changed.

        Raises:
            DataError: for sources that cannot be read, or whose classes differ.
        """
        settings = self.hparams
        _ = self._processing
        if stage in ("fit", None) and settings.train_source is not None:
            train = self._images("train_source")
            self._images(self._calibration_source())
            for name in ("val_source", "test_source"):
                if settings[name] is not None and overlap(train, self._images(name)):
                    rank_zero_warn(f"train_source and {name} share images: use SOURCE[start:stop] to part them")
        if stage in ("validate", None) and settings.val_source is not None:
            self._images("val_source")
        if stage == "test" or (stage is None and settings.test_source is not None):
            self._images("test_source")
        self._check_classes()

    @property
    def deciding(self) -> Settings:
        """The settings that decide which images a position in the training data refers to."""
        given = self.hparams
        if given.train_source is None:
            return {}
        images = self._images("train_source")
        names = ("batch_size", "seed", "skip_corrupt", *(("shuffle_buffer", "num_workers") if images.streamed else ()))
        length = None if images.streamed else len(images.table)
        source = (given.train_source, [Path(given.train_source).name, length])  # its folder may have moved
        return {"train_source": source} | {name: (given[name], given[name]) for name in names}

    def batches_in_epoch(self, ranks: int) -> float:
        """The number of batches per rank in an epoch; infinite if images are streamed."""
        images = self._images("train_source")
        return math.inf if images.streamed else math.ceil(len(images.table) // ranks / self.hparams.batch_size)

    def train_dataloader(self) -> DataLoader:
        """One epoch of shuffled images; each epoch has another order. The last batch may be smaller."""
        settings, images, share = self.hparams, self._images("train_source"), self.rank_and_world_size()
        finish = None if len(self.augmentation) else self._processing.values
        if images.streamed:
            stream = ImageStream(
                images,
                self._processing,
                settings.skip_corrupt,
                settings.batch_size,
                settings.seed,
                settings.shuffle_buffer,
                share=share,
            )
            return self._loader(stream, images, finish, position=self.position, batch_size=None)
        table = self._table("train_source")
        if len(table) < share[1]:
            raise DataError(f"{images.source} has {len(table)} images for {share[1]} devices: each needs one")
        sampler = EpochSampler(len(table), settings.batch_size, settings.seed, share)
        return self._loader(
            NeverEmpty(table), images, finish, position=self.position, batch_size=settings.batch_size, sampler=sampler
        )

    def calibration_dataloader(self) -> DataLoader:
        """Exactly `calibration_samples` images: the same for the same seed, and on every rank.

        Raises:
            CalibrationError: if the source has fewer; before any is read, unless images are skipped or streamed.
        """
        settings, images = self.hparams, self._images(self._calibration_source())
        count, size = settings.calibration_samples, settings.calibration_batch_size
        finish, then = self._processing.values, None
        if settings.calibration_augmented:
            finish, then = None, self._augmented_again
        if images.streamed:
            buffer, skip = settings.shuffle_buffer, settings.skip_corrupt
            stream = ImageStream(images, self._processing, skip, size, settings.seed, buffer, count=count)
            return self._loader(stream, images, finish, then=then, batch_size=None, num_workers=0)
        if len(images.table) < count:
            raise too_few(images.source, f"{len(images.table)}", count)
        table = self._table(self._calibration_source())
        order = torch.randperm(len(table), generator=generator_of(settings.seed)).tolist()
        places = table.readable(iter(order), count)
        if len(places) < count:
            raise too_few(images.source, f"{len(places)} that can be read", count)
        return self._loader(Subset(table, places), images, finish, then=then, batch_size=size)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The images of `val_source`; an empty list without one."""
        if self.hparams.val_source is None:
            return []
        return self._evaluation_loader("val_source", self.hparams.val_images)

    def test_dataloader(self) -> DataLoader:
        """The images of `test_source`."""
        return self._evaluation_loader("test_source", self.hparams.test_images)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augments and normalises training images that the loader yielded as uint8."""
        pixels = batch["pixel_values"] if isinstance(batch, dict) and "pixel_values" in batch else None
        if pixels is None or pixels.dtype != torch.uint8:
            return batch
        batch = batch | {"pixel_values": self._augmented(pixels)}
        # the Trainer did this before the transfer, when the images were not yet floats
        return batch if self.trainer is None else self.trainer.precision_plugin.convert_input(batch)

    @cached_property
    def _processing(self) -> ImageProcessing:
        return ImageProcessing(self.image_processor, self.hparams.channels)

    def _augmented(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return self._processing.normalise(self.augmentation.to(pixels.device)(pixels.float() / 255))

    def _augmented_again(self, pixels: Tensor, number: int) -> Tensor:
        """Augment a batch with a seed that depends only on its number; leaves the global random state unchanged."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_of(self.hparams.seed, number).initial_seed())
            return self._augmented(pixels)

    def _evaluation_loader(self, name: str, limit: int | None) -> DataLoader:
        size, images = self.hparams.evaluation_batch_size or self.hparams.batch_size, self._images(name)
        if images.streamed:
            stream = ImageStream(images, self._processing, self.hparams.skip_corrupt, size, limit=limit)
            return self._loader(stream, images, self._processing.values, batch_size=None)
        table = self._table(name)
        places = range(len(table))
        if limit is not None and limit < len(table):  # files may be in the order of their classes
            drawn = torch.randperm(len(table), generator=generator_of(self.hparams.seed))[:limit]
            places = drawn.sort().values.tolist()
        return self._loader(Subset(table, places), images, self._processing.values, batch_size=size)

    def _loader(self, dataset: Dataset[Part], images: Images, finish: Finish | None, **settings: Any) -> ImageLoader:
        settings.setdefault("num_workers", self.hparams.num_workers)
        if images.source in self._tables and self._tables[images.source].fits:
            settings["num_workers"] = 0
        settings["pin_memory"] = torch.cuda.is_available()
        return ImageLoader(dataset, finish, images.source, **settings)

    def _images(self, name: str) -> Images:
        source = self.hparams[name]
        if source is None:
            raise ConfigError(f"{type(self).__name__} has no {name}: name the images to read")
        if source not in self._opened:
            settings = self.hparams
            self._opened[source] = open_images(
                source, settings.image_column, settings.label_column, settings.skip_corrupt
            )
        return self._opened[source]

    def _table(self, name: str) -> ImageTable:
        images = self._images(name)
        if images.source not in self._tables:
            self._tables[images.source] = ImageTable(images, self._processing, self.hparams.skip_corrupt)
        return self._tables[images.source]

    def _first_source(self) -> str:
        return next((name for name in _EVALUATED if self.hparams[name] is not None), "calibration_source")

    def _calibration_source(self) -> str:
        return "train_source" if self.hparams.calibration_source is None else "calibration_source"

    def _check_classes(self) -> None:
        named = [self._images(name) for name in _EVALUATED if self.hparams[name] in self._opened]
        named = [images for images in named if images.class_names is not None]
        for images in named[1:]:
            if images.class_names != named[0].class_names:
                differ = sorted(set(images.class_names or ()) ^ set(named[0].class_names or ()))
                raise DataError(
                    f"{named[0].source} has {len(named[0].class_names or ())} classes and {images.source} has "
                    f"{len(images.class_names or ())}, so the same label means another class"
                    + (f"; they differ in {', '.join(differ[:5])}" if differ else "; their order differs")
                    + ". Give both the same classes in the same order"
                )
