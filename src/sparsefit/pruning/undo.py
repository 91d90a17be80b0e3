"""What pruning takes from a model, kept so that the dense model can be put back to the bit."""

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
    """The values that a mask takes from a weight: only these, and one bit a weight to say where they belong.

    It is what an undo of the pruning keeps, and all that a dense teacher needs beside its pruned student.
    """

    bits: Tensor  # the packed mask, True = kept, in the order of the weight's elements
    values: Callable[[], Tensor]  # gives the removed values in that order

    def put_back(self, view: Tensor) -> None:
        """Write the removed values to their places in a weight."""
        view.masked_scatter_(~unpack_bits(self.bits, tuple(view.shape), view.device), self.values().to(view.device))

    def take_out(self, view: Tensor) -> None:
        """Set these weights to exactly zero again."""
        zero_outside_mask(view, unpack_bits(self.bits, tuple(view.shape), view.device))


class Undo:
    """Prunes weights in place and remembers what they were: of a GPU's weights in CPU memory, of a CPU's in a temporary
    file (in memory where none can be written)."""

    def __init__(self) -> None:
        self._back: list[Callable[[], object]] = []
        self._file: IO[bytes] | None = None
        self._buffer: Tensor | None = None

    def apply_mask(self, weight: PrunableWeight, mask: Tensor, bits: Tensor) -> None:
        """Set the weights outside an (out, in) mask to zero; `bits` is the same mask, packed."""
        if isinstance(weight, QuantizedWeight):
            self._back.append(weight.snapshot())
        else:
            view, kept = weight.view, weight.part(mask)
            bits = bits if kept is mask else pack_bits(kept)
            gone = [_outside(values, kept) for values, kept in in_chunks(view, kept.view(view.shape))]
            removed = Removed(bits, self._put_away(torch.cat(gone)))
            self._back.append(lambda: (removed.put_back(weight.view), weight.changed()))
        weight.apply_mask(mask)

    def set_values(self, weight: PrunableWeight, values: Tensor) -> None:
        """Put new (out, in) values in the place of the weights."""
        if isinstance(weight, QuantizedWeight):
            self._back.append(weight.snapshot())
        else:
            dense = self._put_away(weight.view.flatten())
            self._back.append(lambda: (weight.view.copy_(dense().view(weight.view.shape)), weight.changed()))
        weight.set_values(values)

    def restore(self) -> None:
        """Make the model dense again, to the bit. An interrupt while this goes on is held back until it is done."""
        done = False
        while not done:
            with suppress(KeyboardInterrupt):
                for put_back in reversed(self._back):
                    put_back()
                done = True
        self._back = []

    def _put_away(self, values: Tensor) -> Callable[[], Tensor]:
        """Keep a copy of flat values; what is returned gives them back."""
        if values.device.type == "cpu" and values.numel():
            with suppress(OSError):  # no folder for temporary files, or a full disk
                return self._put_into_file(values)
        copy = self._copy_of_gpu(values) if values.device.type == "cuda" else values.to("cpu", copy=True)
        return lambda: copy

    def _copy_of_gpu(self, values: Tensor) -> Tensor:
        """By way of a small buffer that the GPU writes to directly: ten times as fast as `.cpu()`, which fills fresh
        memory with one thread."""
        if self._buffer is None:
            self._buffer = torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True)
        there, source = torch.empty(values.nbytes, dtype=torch.uint8), values.view(torch.uint8)
        for part, target in zip(source.split(BUFFER), there.split(BUFFER), strict=True):
            target.copy_(self._buffer[: len(part)].copy_(part))
        return there.view(values.dtype)

    def _put_into_file(self, values: Tensor) -> Callable[[], Tensor]:
        # Unbuffered: what a full disk did not take must not be tried again when the file is read.
        self._file = self._file or tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (open as long as this is)
        file, position = self._file, self._file.seek(0, os.SEEK_END)
        left = memoryview(values.view(torch.uint8).numpy())
        while left:
            left = left[file.write(left) :]
        size, dtype = values.nbytes, values.dtype  # the values themselves are not to be held

        def read() -> Tensor:
            found = bytearray(size)
            left = memoryview(found)
            file.seek(position)
            while left:
                left = left[file.readinto(left) :]
            return torch.frombuffer(found, dtype=dtype)

        return read


class NoUndo(Undo):
    """Prunes weights in place and remembers nothing: for weights that are files, copies of the dense ones."""

    def apply_mask(self, weight: PrunableWeight, mask: Tensor, bits: Tensor) -> None:
        """Set the weights outside an (out, in) mask to zero."""
        weight.apply_mask(mask)

    def set_values(self, weight: PrunableWeight, values: Tensor) -> None:
        """Put new (out, in) values in the place of the weights."""
        weight.set_values(values)


def _outside(values: Tensor, kept: Tensor) -> Tensor:
    """The values that a mask of the same shape does not keep, flat."""
    values, gone = values.flatten(), ~kept.flatten()
    if values.device.type != "cpu":
        return values[gone]
    # NumPy's takes an eighth of the time of torch's.
    integers = values.view(INTEGERS[values.element_size()]).numpy()
    return torch.from_numpy(np.compress(gone.numpy(), integers)).view(values.dtype)
