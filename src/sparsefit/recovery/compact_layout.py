"""The files of a compact folder: their layout, and reading and writing them one tensor at a time.

`NAME.safetensors` becomes `NAME.compact.safetensors`, in which each pruned tensor X is two: "X.kept", the values in
the order in which they are stored, and "X.bits", a bit for each weight (the first weight is the highest bit of the
first byte; 1 = kept). All other tensors stay as they are. The metadata has the shape and the sha256 of every tensor of
the ordinary file, against which each is checked whenever it is read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsefit.errors import RunFolderError
from sparsefit.pruning import MaskSet
from sparsefit.pruning.layers.base import as_matrix
from sparsefit.pruning.masks import split_name, unpack_bits

SUFFIX = ".compact.safetensors"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FORMAT = "sparsefit-compact-1"
# Weights selected at a time. By indices and in numpy, which is several times as fast as by a mask or in torch; but they
# take 8 bytes a weight.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Saved:
    """A tensor of the ordinary file, as the metadata of the compact file speaks of it.

    Attributes:
        name: Its name.
        dtype: Its type as safetensors writes it: "BF16".
        shape: Its shape.
        size: Its bytes.
        sha256: Of its bytes.
        kept: How many values of it are held, None if all are: it is stored as it is.
        why_plain: Why it is stored as it is; None if it is held as kept values and bits.
    """

    name: str
    dtype: str
    shape: list[int]
    size: int
    sha256: str
    kept: int | None
    why_plain: str | None


@dataclass(frozen=True)
class Header:
    """The metadata of a compact file.

    Attributes:
        files: Names of all ordinary files of the model.
        tensors: Those of this file, in the order of the ordinary one.
        masks: Name, (out, in) and whether it is stored transposed, of each mask that bits in this file stand for.
        digest: Of all masks of the model; empty if it had none.
        original: The metadata of the ordinary file.
    """

    files: list[str]
    tensors: list[Saved]
    masks: list[tuple[str, list[int], bool]]
    digest: str
    original: dict[str, str]


@dataclass(frozen=True)
class Part:
    """A tensor to be written, which is made when its turn comes.

    Attributes:
        name: Its name.
        dtype: Its type as safetensors writes it.
        shape: Its shape.
        size: Its bytes.
        make: Gives it.
    """

    name: str
    dtype: str
    shape: list[int]
    size: int
    make: Callable[[], Tensor]


def compact_name(file: Path) -> str:
    """The name of the compact file of an ordinary one."""
    return f"{file.stem}{SUFFIX}"


def ordinary_name(file: Path) -> str:
    """The name of the ordinary file of a compact one."""
    return f"{file.name.removesuffix(SUFFIX)}.safetensors"


def opened(file: Path) -> safe_open:
    """An open safetensors file, for a `with`.

    Raises:
        RunFolderError: if it is missing, damaged or something else.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from error


def compact_files(folder: str | Path) -> list[Path]:
    """The weight files of a compact folder.

    Raises:
        RunFolderError: if it is not there, holds none, or one of them is missing or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunFolderError(f"there is no folder {folder}")
    found = sorted(folder.glob(f"*{SUFFIX}"))
    if not found:
        raise RunFolderError(f"{folder} holds no compact model: no file in it ends in {SUFFIX}")
    with opened(found[0]) as tensors:
        files = [folder / compact_name(Path(name)) for name in header_of(found[0], tensors).files]
    if strange := [file.name for file in files if file.parent != folder]:
        raise RunFolderError(f"{found[0]} names {strange[0]!r}, which is no file of its folder: it is not read")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise RunFolderError(f"{folder} is not complete: it has no {', '.join(missing)}. Copy it again")
    return files


def header_of(file: Path, tensors: safe_open) -> Header:
    """The metadata of an open compact file.

    Raises:
        RunFolderError: if it is none, of another version, or damaged.
    """
    metadata = tensors.metadata() or {}
    if metadata.get("format") != _FORMAT:
        raise RunFolderError(
            f"{file} is no compact file of this version: its format is {metadata.get('format')!r}, and {_FORMAT!r} is "
            "read here. A newer version of sparsefit may read it"
        )
    try:
        fields = {name: json.loads(value) for name, value in metadata.items() if name != "format"}
        saved = [Saved(**one) for one in fields.pop("tensors")]
        return Header(tensors=saved, **fields)
    except (ValueError, TypeError, KeyError) as error:
        raise RunFolderError(f"{file} is damaged: its metadata cannot be read: {error!r}") from error


def as_metadata(header: Header) -> dict[str, str]:
    """A header as strings, which is all that safetensors takes."""
    return {"format": _FORMAT} | {name: json.dumps(value, default=vars) for name, value in vars(header).items()}


def dense_tensor(file: Path, tensors: safe_open, saved: Saved) -> Tensor:
    """A tensor out of an open compact file as the ordinary file had it.

    Raises:
        RunFolderError: if a bit of it is not what it was.
    """
    try:
        tensor = _read(tensors, saved)
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise RunFolderError(f"{file} is damaged: {saved.name} cannot be read: {error}") from error
    if digest(tensor) != saved.sha256:
        raise RunFolderError(f"{file} is damaged: {saved.name} is not what was saved. Copy or make the file again")
    return tensor


def masks_in(file: Path, tensors: safe_open, header: Header) -> MaskSet:
    """The masks that the bits of an open compact file stand for.

    Raises:
        RunFolderError: if the file is damaged.
    """
    shapes = {saved.name: tuple(saved.shape) for saved in header.tensors}
    masks = MaskSet()
    try:
        for name, _, transposed in header.masks:
            parameter, index = split_name(name)
            stored = unpack_bits(tensors.get_tensor(f"{parameter}.bits"), shapes[parameter])
            masks.add(name, as_matrix(stored, transposed, index), transposed)
    except (SafetensorError, RuntimeError, ValueError, KeyError, IndexError) as error:
        raise RunFolderError(f"{file} is damaged: its masks cannot be read: {error!r}") from error
    return masks


def write(path: Path, metadata: dict[str, str], parts: list[Part]) -> None:
    """A safetensors file, with one tensor in memory at a time: the library's own writer wants them all.

    Raises:
        RunFolderError: if a tensor is not of the size that was said.
    """
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for part in parts:
        entries[part.name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [start, start + part.size]}
        start += part.size
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in parts:
            tensor = part.make()
            if tensor.nbytes != part.size:
                raise RunFolderError(f"the file changed while {part.name} was read from it: start again")
            file.write(_bytes(tensor))


def integers(tensor: Tensor) -> Tensor:
    """The bits of a tensor's numbers as integers, flat; a view if it is contiguous."""
    return tensor.contiguous().flatten().view(INTEGERS[tensor.element_size()])


def selected(values: Tensor, mask: Tensor) -> Tensor:
    """The values of a flat tensor at which a flat mask is True, in their order."""
    pieces = zip(values.split(_CHUNK), mask.split(_CHUNK), strict=True)
    return torch.cat([torch.from_numpy(piece.numpy().compress(places.numpy())) for piece, places in pieces])


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _read(tensors: safe_open, saved: Saved) -> Tensor:
    if saved.kept is None:
        return tensors.get_tensor(saved.name)
    kept = tensors.get_tensor(f"{saved.name}.kept")
    mask = unpack_bits(tensors.get_tensor(f"{saved.name}.bits"), (math.prod(saved.shape),))
    return _spread(integers(kept), mask).view(kept.dtype).view(saved.shape)


def _spread(kept: Tensor, mask: Tensor) -> Tensor:
    if int(torch.count_nonzero(mask)) != len(kept):
        raise ValueError(f"it has {len(kept)} values, and bits for {int(torch.count_nonzero(mask))}")
    dense = torch.zeros(len(mask), dtype=kept.dtype)
    start = 0
    for piece, places in zip(dense.split(_CHUNK), mask.split(_CHUNK), strict=True):
        indices = places.numpy().nonzero()[0]
        piece.numpy()[indices] = kept[start : start + len(indices)].numpy()
        start += len(indices)
    return dense


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
