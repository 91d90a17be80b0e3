"""Inspects a saved model: counts the zeros of each tensor in its files, and compares them with its masks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sparsefit.errors import DivergenceError, MaskError, RunFolderError
from sparsefit.files import is_plain
from sparsefit.pruning import MaskSet
from sparsefit.quantized import stored_matrix
from sparsefit.recovery.finite_checks import nonfinite_count, nonfinite_message

MASKS_FILE = "masks.safetensors"
BASE_FOLDER = "base"
MODEL_FOLDER = "model"
_LEAST_SPARSITY = 0.01  # below it a matrix counts as dense, as a few zeros occur by chance


@dataclass(frozen=True)
class SavedMatrix:
    """A matrix of a saved model and the number of its zeros."""

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / max(1, self.weights)


@dataclass
class Inspection:
    """The result of inspecting the files of a saved model.

    Attributes:
        files: The safetensors files read.
        matrices: All matrices in them.
        masks: The masks found next to the model, or None.
        broken: Masked matrix -> number of pruned weights that are not zero, where there are any.
        nonfinite: Tensor -> number of NaN and infinite elements, where there are any.
        parameters: Number of elements in all tensors.
    """

    files: list[Path]
    matrices: list[SavedMatrix] = field(default_factory=list)
    masks: MaskSet | None = None
    broken: dict[str, int] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    parameters: int = 0

    @property
    def pruned(self) -> list[SavedMatrix]:
        """The matrices that have a mask; without masks, those with more zeros than occur by chance."""
        if self.masks is not None:
            masked = self.masks.parameters
            return [matrix for matrix in self.matrices if matrix.name in masked]
        return [matrix for matrix in self.matrices if matrix.sparsity >= _LEAST_SPARSITY]

    @property
    def sparsity(self) -> float:
        """Share of zeros over the pruned matrices."""
        return sum(m.zeros for m in self.pruned) / max(1, sum(m.weights for m in self.pruned))

    def account(self) -> dict[str, Any]:
        """The counts as a report holds them: in total and for each pruned matrix."""
        return {
            "total": self.sparsity,
            "zeros": sum(m.zeros for m in self.pruned),
            "weights": sum(m.weights for m in self.pruned),
            "parameters": self.parameters,
            "layers": [asdict(m) | {"shape": list(m.shape), "sparsity": m.sparsity} for m in self.pruned],
        }


def inspect_folder(folder: str | Path) -> Inspection:
    """Count the zeros of a saved model and check them against its masks.

    Args:
        folder: A run folder, or a folder with a model in Hugging Face layout. Masks are looked up in it and in its
            parent folder.

    Raises:
        RunFolderError: if there is no model in safetensors format, or a file is damaged.
        MaskError: if the mask file is damaged, or its masks do not fit the model.
    """
    folder = Path(folder)
    files = weight_files(folder)
    inspection = Inspection(files, masks=masks_beside(folder))
    masked = inspection.masks.parameters if inspection.masks is not None else {}
    unseen = set(masked)
    for file in files:
        with open_tensors(file) as tensors:
            for name in sorted(tensors):
                _look_at(inspection, tensors, name, masked)
                unseen.discard(name)
    if unseen:
        raise MaskError(f"the masks do not fit the model in {folder}: it has no {', '.join(sorted(unseen)[:3])}")
    return inspection


def inspect_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> Inspection:
    """Count the zeros of tensors that were read from a file of another format, without masks.

    Args:
        tensors: The tensors by name.
        file: The file they were read from.
    """
    inspection = Inspection([file])
    for name in sorted(tensors):
        _look_at(inspection, tensors, name, {})
    return inspection


def check_finite_folder(folder: Path) -> None:
    """Check that the saved model that `inspect_folder` reads has no NaN and no infinity.

    Raises:
        DivergenceError: if it has; names the tensors.
        RunFolderError: if there is no model in safetensors format, or a file is damaged.
    """
    for file in weight_files(folder):
        with open_tensors(file) as tensors:
            if broken := {name: count for name in sorted(tensors) if (count := nonfinite_count(tensors[name]))}:
                found = nonfinite_message(broken)
                raise DivergenceError(f"{file} holds a model that diverged: {found}. Take an earlier one")


class SavedTensors(Mapping[str, torch.Tensor]):
    """The tensors in safetensors files, read lazily.

    Args:
        files: The files; if several hold a name, the last one in sorted order counts.
        stack: The exit stack that closes the files.
    """

    def __init__(self, files: Iterable[Path], stack: ExitStack) -> None:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in sorted(files)]
        self._files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _look_at(
    inspection: Inspection, tensors: Mapping[str, torch.Tensor], name: str, masked: Mapping[str, list[str]]
) -> None:
    tensor = stored_matrix(tensors, name) if name in masked else tensors[name]
    inspection.parameters += tensor.numel()
    if count := nonfinite_count(tensor):
        inspection.nonfinite[name] = count
    if tensor.ndim >= 2:
        zeros = tensor.numel() - int(torch.count_nonzero(tensor))
        inspection.matrices.append(SavedMatrix(name, tuple(tensor.shape), tensor.numel(), zeros))
    if name in masked:
        alive = sum(inspection.masks.of_parameter(name).alive({name: tensor}).values())
        if alive:
            inspection.broken[name] = alive


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; of a run folder those of its recovered model, else its sparse base.

    Raises:
        RunFolderError: if there are none, or their index cannot be read.
    """
    for place in (folder, folder / MODEL_FOLDER, folder / BASE_FOLDER):
        index = place / "model.safetensors.index.json"
        if index.is_file():
            return [place / name for name in _shards(index)]
        if (place / "model.safetensors").is_file():
            return [place / "model.safetensors"]
    if not folder.is_dir():
        raise RunFolderError(f"there is no folder {folder}")
    raise RunFolderError(
        f"{folder} holds no saved model: no model.safetensors in it, its {MODEL_FOLDER}/ or its {BASE_FOLDER}/"
    )


def check_indices(folder: Path) -> None:
    """Check that the index files of a model folder name only files inside it.

    Raises:
        RunFolderError: if one names a file outside the folder, or cannot be read.
    """
    for index in folder.glob("*.index.json"):
        _shards(index)


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if not is_plain(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{index} cannot be read: {error}") from error
    if outside:
        raise RunFolderError(f"{index} names {outside[0]!r}, which is no file of its folder: it is not read")
    return names


def files_digest(folder: Path) -> str:
    """sha256 of the names and values of all tensors in a folder's safetensors files, independent of their sharding.

    Raises:
        RunFolderError: if a file is damaged.
    """
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_tensors(file) as tensors:
            for name in tensors:
                data = tensors[name].contiguous().reshape(-1).view(torch.uint8)
                found[name] = hashlib.sha256(data.numpy()).hexdigest()
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def masks_beside(folder: Path) -> MaskSet | None:
    """The masks in a folder or its parent; None if there are none."""
    found = [place / MASKS_FILE for place in (folder, folder.parent) if (place / MASKS_FILE).is_file()]
    return MaskSet.load(found[0]) if found else None


@contextmanager
def open_tensors(file: Path) -> Iterator[SavedTensors]:
    """Open the tensors of one file; raises a `RunFolderError` if it is damaged."""
    try:
        with ExitStack() as stack:
            yield SavedTensors([file], stack)
    except (SafetensorError, OSError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from error
