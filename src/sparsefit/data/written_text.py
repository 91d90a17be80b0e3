"""Windows of text that a model wrote: written once, batch by batch, and kept in a file that many runs can read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from sparsefit.data.packing import deal
from sparsefit.data.windows import generator_of
from sparsefit.errors import DataError

Progress = Callable[[int, int], None]
"""Told (batches done, all batches) of a rank."""

_FORMAT = 1


@dataclass(frozen=True)
class WrittenText:
    """A file of windows, named by a digest of all that decides what stands in it.

    Args:
        folder: where it lies.
        kind: "calibration" or "training".
        windows: how many.
        length: tokens in each.
        batch_size: windows that are written at once; a batch has a seed of its own, and can be written alone.
        decided_by: whatever else decides the text: the model's digest, the settings of sampling, the seed.
    """

    folder: Path
    kind: str
    windows: int
    length: int
    batch_size: int
    decided_by: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the text."""
        sizes = {"windows": self.windows, "length": self.length, "batch_size": self.batch_size}
        return {"format": _FORMAT, "kind": self.kind} | sizes | dict(self.decided_by)

    @property
    def digest(self) -> str:
        """A digest of all that decides the text."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"{self.kind}-{self.digest}.npy"

    @property
    def batches(self) -> int:
        """Into how many batches the windows are cut."""
        return -(-self.windows // self.batch_size)

    def lying_in(self, folder: Path) -> WrittenText:
        """The same text in another folder."""
        return replace(self, folder=folder)

    def read(self) -> numpy.ndarray:
        """The windows, int32 (windows, length), read from the disk as they are needed.

        Raises:
            DataError: where the file is damaged.
        """
        try:
            found = numpy.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{self.path} cannot be read: {error}. {_WAY_OUT}") from error
        if found.shape != (self.windows, self.length) or found.dtype != numpy.int32:
            raise DataError(f"{self.path} does not hold {self.windows} windows of {self.length} tokens. {_WAY_OUT}")
        return found

    def write(
        self,
        write_batch: Callable[[int, int], Tensor],
        progress: Callable[[], None],
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] = lambda: None,
    ) -> None:
        """Write the file: each rank its batches, in a part of its own, and the first rank the whole.

        What a process that was killed has written of its part is kept, and is not written again. The file itself is
        there only once it is whole.

        Args:
            write_batch: gives the windows from one number up to another, (windows, length) int64 on the CPU.
            progress: called after each batch of this rank.
            rank: of this process.
            world_size: number of processes, which must all see the folder.
            barrier: waits for all of them.

        Raises:
            DataError: where the folder cannot be written to, or the ranks do not share it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self._part(rank, world_size)
            for batch in range(rank, self.batches, world_size):
                start, stop = batch * self.batch_size, min((batch + 1) * self.batch_size, self.windows)
                if not part[start:stop].all():
                    part[start:stop] = write_batch(start, stop).numpy() + 1  # 0 is what is not written yet
                progress()
            part.flush()
            barrier()
            if rank == 0:
                self._join(world_size)
            barrier()
        except OSError as error:
            raise DataError(f"text cannot be written to {self.folder}: {error}") from error
        if not self.path.is_file():
            raise DataError(
                f"rank {rank} does not see {self.path}, which rank 0 wrote: give a folder that all ranks share"
            )

    def _part(self, rank: int, world_size: int) -> numpy.memmap:
        """The part of a rank, as far as it has been written; a sparse file of the shape of the whole."""
        path, shape = self._part_path(rank, world_size), (self.windows, self.length)
        try:
            part = open_memmap(path, mode="r+")
            if part.shape == shape and part.dtype == numpy.int32:
                return part
        except (OSError, ValueError, EOFError):  # there is none, or it broke off within its first line
            pass
        return open_memmap(path, mode="w+", dtype=numpy.int32, shape=shape)

    def _join(self, world_size: int) -> None:
        parts = [open_memmap(self._part_path(rank, world_size), mode="r") for rank in range(world_size)]
        partial = self.path.with_name(f"{self.path.name}.partial")
        whole = open_memmap(partial, mode="w+", dtype=numpy.int32, shape=(self.windows, self.length))
        for batch in range(self.batches):
            rows = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            whole[rows] = parts[batch % world_size][rows] - 1
        whole.flush()
        told = json.dumps(self.settings, indent=2) + "\n"
        self.path.with_suffix(".json").write_text(told, encoding="utf-8")
        os.replace(partial, self.path)
        del parts, whole
        for left in self.folder.glob(f"{self.path.name}.part*-of-*"):  # of an earlier number of ranks, too
            left.unlink(missing_ok=True)

    def _part_path(self, rank: int, world_size: int) -> Path:
        return self.path.with_name(f"{self.path.name}.part{rank}-of-{world_size}")


class WrittenWindows(IterableDataset[Tensor]):
    """One epoch of windows that a model wrote, shuffled; ranks and workers share them out among themselves.

    Args:
        text: the windows, int32 (windows, length).
        seed: of the order, beside the epoch.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, text: numpy.ndarray, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.text = text
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.taken: tuple[int, ...] = ()  # windows of each worker's that are done: by other numbers of ranks

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        order = torch.randperm(len(self.text), generator=generator_of(self.seed, self.epoch)).tolist()
        left = order[worker::workers][self.taken[worker] if self.taken else 0 :]
        return (as_window(self.text[number]) for number in deal(left, self.rank, self.world_size))


def as_window(row: numpy.ndarray) -> Tensor:
    """A row of a file as an int64 tensor (length,)."""
    return torch.from_numpy(row.astype(numpy.int64))


_WAY_OUT = "Remove it, and the next run that needs it writes it anew; a run that is resumed needs it as it was"
