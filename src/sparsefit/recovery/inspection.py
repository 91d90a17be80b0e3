"""What is really in a saved model: zeros counted tensor by tensor on its files, and held against its masks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sparsefit.errors import MaskError, RunFolderError
from sparsefit.pruning import MaskSet

MASKS_FILE = "masks.safetensors"
BASE_FOLDER = "base"
_LEAST_SPARSITY = 0.01  # below it a matrix counts as dense: a few zeros occur by themselves


@dataclass(frozen=True)
class SavedMatrix:
    """A matrix of a saved model and the zeros counted in it."""

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
    """What the files of a saved model hold.

    Attributes:
        files: The safetensors files read.
        matrices: Every matrix in them.
        masks: The masks found beside the model, or None.
        broken: For each masked matrix in which pruned weights are not zero, how many.
        parameters: Numbers in all tensors together.
    """

    files: list[Path]
    matrices: list[SavedMatrix] = field(default_factory=list)
    masks: MaskSet | None = None
    broken: dict[str, int] = field(default_factory=dict)
    parameters: int = 0

    @property
    def pruned(self) -> list[SavedMatrix]:
        """The matrices that have a mask; without masks, those with more than chance zeros."""
        if self.masks is not None:
            return [matrix for matrix in self.matrices if matrix.name in self.masks]
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
        folder: A run folder, or a folder with a model in Hugging Face layout. Masks are looked for in it and
            beside it.

    Raises:
        RunFolderError: if there is no model in safetensors format, or a file is damaged.
        MaskError: if the mask file is damaged, or its masks do not fit the model.
    """
    folder = Path(folder)
    files = _weight_files(folder)
    inspection = Inspection(files, masks=_masks_of(folder))
    unseen = set(inspection.masks or ())
    for file in files:
        with _opened(file) as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name)
                inspection.parameters += tensor.numel()
                if tensor.ndim < 2:
                    continue
                zeros = tensor.numel() - int(torch.count_nonzero(tensor))
                inspection.matrices.append(SavedMatrix(name, tuple(tensor.shape), tensor.numel(), zeros))
                if inspection.masks is not None and name in inspection.masks:
                    unseen.discard(name)
                    _check(inspection, name, tensor)
    if unseen:
        raise MaskError(f"the masks do not fit the model in {folder}: it has no {', '.join(sorted(unseen)[:3])}")
    return inspection


def _check(inspection: Inspection, name: str, tensor: torch.Tensor) -> None:
    mask = inspection.masks.for_parameter(name)
    if mask.shape != tensor.shape:
        raise MaskError(
            f"the masks do not fit the model: {name} is {tuple(tensor.shape)}, its mask {tuple(mask.shape)}"
        )
    alive = int(torch.count_nonzero(tensor.masked_fill(mask, 0)))
    if alive:
        inspection.broken[name] = alive


def _weight_files(folder: Path) -> list[Path]:
    for place in (folder, folder / BASE_FOLDER):
        index = place / "model.safetensors.index.json"
        if index.is_file():
            return [place / name for name in _shards(index)]
        if (place / "model.safetensors").is_file():
            return [place / "model.safetensors"]
    if not folder.is_dir():
        raise RunFolderError(f"there is no folder {folder}")
    raise RunFolderError(f"{folder} holds no saved model: no model.safetensors in it or in its {BASE_FOLDER}/")


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{index} cannot be read: {error}") from error


def _masks_of(folder: Path) -> MaskSet | None:
    found = [place / MASKS_FILE for place in (folder, folder.parent) if (place / MASKS_FILE).is_file()]
    return MaskSet.load(found[0]) if found else None


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from error
