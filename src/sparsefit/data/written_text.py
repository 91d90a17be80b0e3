"""Windows of text that a model generated: written once, batch by batch, to a file that many runs can read."""

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
"""Called with (batches done, all batches) of a rank."""

_FORMAT = 1


@dataclass(frozen=True)
class WrittenText:
    """A file of windows, named by a digest of everything that determines its content.

    Args:
        folder: the folder of the file.
        kind: "calibration" or "training".
        windows: the number of windows.
        length: tokens in a window.
        batch_size: windows that are generated at once; each batch has its own seed and is independent of the others.
        decided_by: everything else that determines the text: the model's digest, the sampling settings, the seed.
    """

    folder: Path
    kind: str
    windows: int
    length: int
    batch_size: int
    decided_by: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the text."""
        sizes = {"windows": self.windows, "length": self.length, "batch_size": self.batch_size}
        return {"format": _FORMAT, "kind": self.kind} | sizes | dict(self.decided_by)

    @property
    def digest(self) -> str:
        """A digest of `settings`."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.folder / f"{self.kind}-{self.digest}.npy"

    @property
    def batches(self) -> int:
        """The number of batches."""
        return -(-self.windows // self.batch_size)

    def lying_in(self, folder: Path) -> WrittenText:
        """The same text in another folder."""
        return replace(self, folder=folder)

    def read(self) -> numpy.ndarray:
        """The windows, int32 (windows, length), memory-mapped.

        Raises:
            DataError: if the file is damaged.
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
        """Write the file: each rank writes its batches to a part file, and the first rank joins the parts.

        Batches that a killed process has written to its part are kept, and not generated again. The file itself exists
        only once it is complete.

        Args:
            write_batch: called with a start and a stop; generates these windows, (windows, length) int64 on the CPU.
            progress: called after each batch of this rank.
            rank: the rank of this process.
            world_size: the number of processes, which must all see the folder.
            barrier: waits for all processes.

        Raises:
            DataError: if the folder cannot be written to, or the ranks do not share it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self._part(rank, world_size)
            for batch in range(rank, self.batches, world_size):
                start, stop = batch * self.batch_size, min((batch + 1) * self.batch_size, self.windows)
                if not part[start:stop].all():
                    part[start:stop] = write_batch(start, stop).numpy() + 1  # 0 marks tokens that are not written yet
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
        """The part file of a rank, with what it has written so far; a sparse file of the shape of the whole."""
        path, shape = self._part_path(rank, world_size), (self.windows, self.length)
        try:
            part = open_memmap(path, mode="r+")
            if part.shape == shape and part.dtype == numpy.int32:
                return part
        except (OSError, ValueError, EOFError):  # it does not exist, or its header is incomplete
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
        for left in self.folder.glob(f"{self.path.name}.part*-of-*"):  # also those of other numbers of ranks
            left.unlink(missing_ok=True)

    def _part_path(self, rank: int, world_size: int) -> Path:
        return self.path.with_name(f"{self.path.name}.part{rank}-of-{world_size}")


class WrittenWindows(IterableDataset[Tensor]):
    """One epoch of windows that a model generated, shuffled and divided among ranks and workers.

    Args:
        text: the windows, int32 (windows, length).
        seed: the seed of the order, which also depends on the epoch.
        rank: the rank of this process.
        world_size: the number of processes.
    """

    def __init__(self, text: numpy.ndarray, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.text = text
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.taken: tuple[int, ...] = ()  # windows of each worker that were taken with other numbers of ranks

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        order = torch.randperm(len(self.text), generator=generator_of(self.seed, self.epoch)).tolist()
        left = order[worker::workers][self.taken[worker] if self.taken else 0 :]
        return (as_window(self.text[number]) for number in deal(left, self.rank, self.world_size))


def as_window(row: numpy.ndarray) -> Tensor:
    """A row of a file as an int64 tensor (length,)."""
    return torch.from_numpy(row.astype(numpy.int64))


_WAY_OUT = "Remove it, and the next run that needs it generates it again; a resumed run needs the original file"
