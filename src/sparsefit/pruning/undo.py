"""Keeping the values that pruning removes, so that the dense model can be restored bit for bit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsefit.pruning.layers.base import INTEGERS, PrunableWeight, in_chunks, zero_outside_mask
from sparsefit.pruning.layers.quantized import QuantizedWeight
from sparsefit.pruning.masks import pack_bits, unpack_bits

BUFFER = 2**26  # bytes


class Removed(NamedTuple):
    """The values that a mask removes from a weight, and one bit a weight for their positions.

    An undo of the pruning keeps these, and a dense teacher needs only these in addition to its pruned student.
    """

    bits: Tensor  # the packed mask, True = kept, in the order of the weight's elements
    values: Callable[[], Tensor]  # gives the removed values in that order

    def put_back(self, view: Tensor) -> None:
        """Write the removed values back into a weight."""
        view.masked_scatter_(~unpack_bits(self.bits, tuple(view.shape), view.device), self.values().to(view.device))

    def take_out(self, view: Tensor) -> None:
        """Set the removed weights to exactly zero again."""
        zero_outside_mask(view, unpack_bits(self.bits, tuple(view.shape), view.device))


class Undo:
    """Keeps old values of weights: those of a GPU in CPU memory, those of a CPU in a temporary file (or in memory if no
    file can be written)."""

    def __init__(self) -> None:
        self._back: list[Callable[[], object]] = []
        self._file: IO[bytes] | None = None
        self._buffer: Tensor | None = None

    def keep(self, weight: PrunableWeight, mask: Tensor | None, bits: Tensor) -> None:
        """Keep the values outside an (out, in) mask, which `bits` packs; all values if there is no mask."""
        if isinstance(weight, QuantizedWeight):
            self._back.append(weight.snapshot())
        elif mask is None:
            dense = self._put_away(weight.view.flatten())
            self._back.append(lambda: (weight.view.copy_(dense().view(weight.view.shape)), weight.changed()))
        else:
            view, kept = weight.view, weight.part(mask)
            bits = bits if kept is mask else pack_bits(kept)
            gone = [_outside(values, kept) for values, kept in in_chunks(view, kept.view(view.shape))]
            removed = Removed(bits, self._put_away(torch.cat(gone)))
            self._back.append(lambda: (removed.put_back(weight.view), weight.changed()))

    def restore(self) -> None:
        """Restore the dense model bit for bit. An interrupt during this does not stop it."""
        done = False
        while not done:
            with suppress(KeyboardInterrupt):
                for put_back in reversed(self._back):
                    put_back()
                done = True
        self._back = []

    def _put_away(self, values: Tensor) -> Callable[[], Tensor]:
        """Keep a copy of flat values; returns a function that reads it."""
        if values.device.type == "cpu" and values.numel():
            with suppress(OSError):  # no folder for temporary files, or a full disk
                return self._put_into_file(values)
        copy = self._copy_of_gpu(values) if values.device.type == "cuda" else values.to("cpu", copy=True)
        return lambda: copy

    def _copy_of_gpu(self, values: Tensor) -> Tensor:
        """Copy through a small pinned buffer: ten times as fast as `.cpu()`, which fills fresh memory with one
        thread."""
        if self._buffer is None:
            self._buffer = torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True)
        there, source = torch.empty(values.nbytes, dtype=torch.uint8), values.view(torch.uint8)
        for part, target in zip(source.split(BUFFER), there.split(BUFFER), strict=True):
            target.copy_(self._buffer[: len(part)].copy_(part))
        return there.view(values.dtype)

    def _put_into_file(self, values: Tensor) -> Callable[[], Tensor]:
        # Unbuffered: what a full disk refused must not be written again when the file is read.
        self._file = self._file or tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (open as long as this is)
        file, position = self._file, self._file.seek(0, os.SEEK_END)
        left = memoryview(values.view(torch.uint8).numpy())
        while left:
            left = left[file.write(left) :]
        size, dtype = values.nbytes, values.dtype  # so that `read` does not keep the values alive

        def read() -> Tensor:
            found = bytearray(size)
            left = memoryview(found)
            file.seek(position)
            while left:
                left = left[file.readinto(left) :]
            return torch.frombuffer(found, dtype=dtype)

        return read


def _outside(values: Tensor, kept: Tensor) -> Tensor:
    """The values that a mask of the same shape removes, flat."""
    values, gone = values.flatten(), ~kept.flatten()
    if values.device.type != "cpu":
        return values[gone]
    # NumPy's compress takes an eighth of the time of torch's indexing.
    integers = values.view(INTEGERS[values.element_size()]).numpy()
    return torch.from_numpy(np.compress(gone.numpy(), integers)).view(values.dtype)
