"""Batches of images: from tables, which stay in memory if they are small, and from streams."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from sparsefit.data.data_position import Dealt, samples_dealt
from sparsefit.data.image_processing import ImageProcessing, decode
from sparsefit.data.images import Images, Row, labels_of
from sparsefit.data.packing import deal, shuffled
from sparsefit.data.windows import generator_of
from sparsefit.errors import CalibrationError, DataError

if TYPE_CHECKING:
    from datasets import IterableDataset as HubStream

_KEPT_BYTES = 2**30


class Part(NamedTuple):
    """Images, uint8 (images, channels, height, width), their labels (images,), and the names of corrupt images."""

    pixels: Tensor
    labels: Tensor
    corrupt: list[str]


class ImageTable(Dataset[Part]):
    """Images by index. If all of them, resized, take no more than 1 GiB, they stay in memory once decoded.

    Args:
        images: a source that is not streamed.
        processing: resizes and crops.
        skip_corrupt: leave out images that cannot be read; otherwise they raise an error.
    """

    def __init__(self, images: Images, processing: ImageProcessing, skip_corrupt: bool = False) -> None:
        self.images = images
        self.processing = processing
        self.skip_corrupt = skip_corrupt
        self.labels = torch.tensor(labels_of(images), dtype=torch.int64)
        one = self._first_readable()  # (1, channels, height, width)
        self.fits = len(self) * one.numel() <= _KEPT_BYTES
        self._kept = one.new_empty((len(self) if self.fits else 0, *one.shape[1:]))
        self._known = torch.zeros(len(self), dtype=torch.bool)
        self._corrupt: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.images.table)

    def __getitem__(self, place: int) -> Part:
        return self.__getitems__([place])

    def __getitems__(self, places: list[int]) -> Part:
        """The images at these indices; a loader requests a whole batch."""
        if not self.fits:
            good, pixels, corrupt = self._read(places)
            return Part(pixels, self.labels[good], list(corrupt.values()))
        new = [place for place in places if not self._known[place]]
        if new:
            good, pixels, corrupt = self._read(new)
            self._kept[good] = pixels
            self._corrupt |= corrupt
            self._known[new] = True
        good = [place for place in places if place not in self._corrupt]
        return Part(
            self._kept[good], self.labels[good], [self._corrupt[place] for place in places if place not in good]
        )

    def readable(self, order: Iterator[int], count: int) -> list[int]:
        """The first `count` indices of `order` whose images can be read; all of these if there are fewer."""
        if not self.skip_corrupt:
            return list(islice(order, count))
        return list(islice((place for place in order if not self[place].corrupt), count))

    def _read(self, places: list[int]) -> tuple[list[int], Tensor, dict[int, str]]:
        good, pixels, corrupt = read(self.images.rows(places), self.processing, self.skip_corrupt)
        return [places[one] for one in good], pixels, {places[one]: what for one, what in corrupt.items()}

    def _first_readable(self) -> Tensor:
        for place in range(len(self)):
            if len(pixels := self._read([place])[1]):
                return pixels
        raise DataError(f"none of the {len(self)} images of {self.images.source} can be read: fetch them again")


class NeverEmpty(Dataset[Part]):
    """A table whose batches always hold an image, as all ranks of a training need the same number of batches.

    If no image of a batch can be read, the next readable image of the table replaces them.
    """

    def __init__(self, table: ImageTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, place: int) -> Part:
        return self.__getitems__([place])

    def __getitems__(self, places: list[int]) -> Part:
        """The images at these indices, at least one."""
        part = self.table.__getitems__(places)
        place = places[-1]
        while not len(part.labels):  # ends, because the table knows that one of its images can be read
            place = (place + 1) % len(self)
            part = self.table[place]._replace(corrupt=part.corrupt)
        return part


class ImageStream(IterableDataset[Part]):
    """Batches of a streamed source; each worker of a loader reads its own files.

    All ranks read the same encoded images and decode only their own share.

    Args:
        images: a source that is streamed.
        processing: resizes and crops.
        skip_corrupt: leave out images that cannot be read; otherwise they raise an error.
        batch_size: images in a batch.
        seed: the seed of the order; None keeps that of the source.
        shuffle_buffer: images kept in memory to draw from.
        limit: the maximum number of images to read.
        count: the exact number of images to yield, for calibration; replaces those that cannot be read.
        share: (rank, number of ranks); a remainder that does not divide evenly is dropped.
    """

    def __init__(
        self,
        images: Images,
        processing: ImageProcessing,
        skip_corrupt: bool,
        batch_size: int,
        seed: int | None = None,
        shuffle_buffer: int = 1000,
        limit: int | None = None,
        count: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.images = images
        self.processing = processing
        self.skip_corrupt = skip_corrupt
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.limit = limit
        self.count = count
        self.share = share
        self.epoch = 0
        self.before: Dealt = ()  # what was read of the epoch with other numbers of ranks

    def __iter__(self) -> Iterator[Part]:
        if self.count is not None:
            yield from self._exactly(self.count)
            return
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        taken = samples_dealt(self.before, self.batch_size, worker, workers)
        rows = deal(islice(self._rows(), taken, None), *self.share)
        while chunk := list(islice(rows, self.batch_size)):
            part = self._part(chunk)
            while not len(part.labels) and (chunk := list(islice(rows, 1))):
                more = self._part(chunk)
                part = more._replace(corrupt=part.corrupt + more.corrupt)
            yield part

    def _exactly(self, count: int) -> Iterator[Part]:
        rows, found = self._rows(), 0
        while found < count:
            chunk = list(islice(rows, min(self.batch_size, count - found)))
            if not chunk:
                raise too_few(self.images.source, f"{found}" + " that can be read" * self.skip_corrupt, count)
            part = self._part(chunk)
            found += len(part.labels)
            yield part

    def _rows(self) -> Iterator[Row]:
        table, worker = self.images.table, get_worker_info()
        if self.limit is not None:
            table = table.take(self.limit)
        numbered = worker is None
        if self.seed is not None and table.num_shards > 1:
            table, numbered = _files_shuffled(table, self.seed), False
            table.set_epoch(self.epoch)
        rows = (self.images.row(place if numbered else None, record) for place, record in enumerate(table))
        if self.seed is None:
            return rows
        # not by the library, whose shuffling loses the row numbers for error messages
        return shuffled(rows, self.shuffle_buffer, generator_of(self.seed, self.epoch, worker.id if worker else 0))

    def _part(self, rows: list[Row]) -> Part:
        good, pixels, corrupt = read(rows, self.processing, self.skip_corrupt)
        labels = torch.tensor([rows[one].label for one in good], dtype=torch.int64)
        return Part(pixels, labels, list(corrupt.values()))


def read(rows: list[Row], processing: ImageProcessing, skip_corrupt: bool) -> tuple[list[int], Tensor, dict[int, str]]:
    """Decodes, resizes and crops images.

    Returns:
        The numbers of the rows that could be read, their images (uint8, from `ImageProcessing.pixels`), and the names
        of the corrupt ones by their numbers.

    Raises:
        DataError: for an image that cannot be read, unless `skip_corrupt`.
    """
    images: dict[int, np.ndarray] = {}
    corrupt: dict[int, str] = {}
    for number, row in enumerate(rows):
        try:
            images[number] = decode(row.content, processing.channels)
        except Exception as error:  # the errors for damaged images depend on the decoder
            cause = str(error).strip().splitlines() or [type(error).__name__]
            if not skip_corrupt:
                raise DataError(
                    f"{row.name} cannot be read: {cause[0].rstrip('.')}. Fetch it again, take it out, or set "
                    "skip_corrupt to leave out all such images"
                ) from error
            corrupt[number] = row.name
    return list(images), processing.pixels(list(images.values()), [rows[number].name for number in images]), corrupt


def _files_shuffled(table: HubStream, seed: int) -> HubStream:
    # newer versions of the library would read several files at once, and wait 5 seconds when they stop
    one = "max_buffer_input_shards" in signature(table.shuffle).parameters
    return table.shuffle(seed=seed, buffer_size=1, **({"max_buffer_input_shards": 1} if one else {}))


def too_few(source: str, found: str, count: int) -> CalibrationError:
    """The error for a source with fewer images than calibration needs; `found` tells how many it has."""
    return CalibrationError(
        f"calibration draws {count} images without replacement, as the data's calibration_samples says, but {source} "
        f"has {found}: set data.init_args.calibration_samples to no more, or add images. Pruning's own "
        "calibration_samples takes the first of those drawn, and does not help here"
    )
