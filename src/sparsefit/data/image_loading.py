"""Loaders of images: their order, the position where a resumed run starts, and the warning of skipped images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from sparsefit.data.data_position import Place, samples_dealt
from sparsefit.data.image_batches import Part
from sparsefit.data.windows import generator_of
from sparsefit.errors import DataError

Batch = dict[str, Tensor]

Finish = Callable[[Tensor], Tensor]

_SHOWN = 3


class EpochSampler(DistributedSampler[int]):
    """A rank's share of the images, in an order given by seed and epoch; can start after the batches already done.

    All ranks have the same number of images, so up to `world_size - 1` images are left out of an epoch. It is a
    DistributedSampler so that the Trainer does not replace it.

    Args:
        size: the size of the whole data set.
        batch_size: images in a batch of a rank.
        seed: the seed of the orders.
        share: (rank, number of ranks).
    """

    def __init__(self, size: int, batch_size: int, seed: int, share: tuple[int, int]) -> None:
        rank, world_size = share
        super().__init__(range(size), world_size, rank, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.size = size
        self.batch_size = batch_size
        self.place = Place(0, 0)

    def start(self, place: Place) -> None:
        """Sets the epoch and the position in it for the next iteration."""
        self.place = place

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: a resumed Trainer counts epochs differently; see `start`."""

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.size, generator=generator_of(self.seed, self.place.epoch))
        left = order[samples_dealt(self.place.before, self.batch_size) :]
        share = left[self.rank :: self.num_replicas][: len(left) // self.num_replicas]
        return iter(share[self.place.batches * self.batch_size :].tolist())


class ImageLoader(DataLoader):
    """Batches {"pixel_values", "labels"}; warns at the end of a pass which images were skipped.

    Args:
        dataset: yields `Part`s.
        finish: converts a part's uint8 images to float32 (batch, channels, height, width); None keeps them.
        source: the name of the images in messages.
        position: returns the position where training continues.
        then: called in this process with the images of a batch and its number; returns the images to use.
        settings: for `torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset[Part],
        finish: Finish | None,
        source: str,
        position: Callable[[], Place] | None = None,
        then: Callable[[Tensor, int], Tensor] | None = None,
        **settings: Any,
    ) -> None:
        self.finish = finish
        self.source = source
        self.position = position
        self.then = then
        settings.setdefault("collate_fn", partial(collate, finish=finish))
        super().__init__(dataset, **settings)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        skipped = 0
        if self.position is not None:
            place = self.position()
            if isinstance(self.sampler, EpochSampler):
                self.sampler.start(place)
            else:
                self.dataset.epoch, self.dataset.before, skipped = place.epoch, place.before, place.batches
        return islice(self._batches(super().__iter__()), skipped, None)

    def _batches(self, parts: Iterator[tuple[Batch, list[str]]]) -> Iterator[Batch]:
        corrupt: list[str] = []
        found = 0
        try:
            for number, (batch, names) in enumerate(parts):
                corrupt += names
                if count := len(batch["labels"]):
                    found += count
                    if self.then is not None:
                        batch["pixel_values"] = self.then(batch["pixel_values"], number)
                    yield batch
        finally:  # a Trainer may stop within a pass
            if corrupt and found:
                rank_zero_warn(f"{_skipped(corrupt, self.source)}; they were skipped")
        if corrupt and not found:
            raise DataError(f"{_skipped(corrupt, self.source)}, and there is no other: fetch them again")
        if not found and isinstance(self.dataset, IterableDataset):  # no other is opened without an image
            raise DataError(f"{self.source} takes no image: it has too few for its slice, or for the devices, or none")


def collate(part: Part, finish: Finish | None) -> tuple[Batch, list[str]]:
    """The batch of a part, and the names of its corrupt images."""
    pixels = part.pixels if finish is None or not len(part.labels) else finish(part.pixels)
    return {"pixel_values": pixels, "labels": part.labels}, part.corrupt


def _skipped(corrupt: list[str], source: str) -> str:
    names = ", ".join(corrupt[:_SHOWN]) + (", ..." if len(corrupt) > _SHOWN else "")
    return f"{len(corrupt)} images of {source} cannot be read: {names}"
