"""Leaves weights that the sparse base holds out of checkpoints, and loads them from the run folder again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sparsefit.bare_model import canonical_name
from sparsefit.errors import MaskError, RunFolderError
from sparsefit.pruning import MaskSet
from sparsefit.recovery.export import pretrained_part
from sparsefit.recovery.inspection import BASE_FOLDER, MASKS_FILE, SavedTensors
from sparsefit.recovery.quantize import scale_keys

_WORDS = 2**22  # 64-bit words per chunk of `checksum`


@dataclass(frozen=True)
class InBase:
    """The entries of a module's state dict that are bitwise equal to tensors in a base.

    Attributes:
        folder: The run folder.
        files: File name -> (size, modification time) at the time of the comparison.
        masks: The masks of the module, which are those of the folder.
        prefix: Prefix of the module's names that names in the base do not have.
        entries: State dict key -> (name in the base, checksum).
    """

    folder: Path
    files: dict[str, tuple[int, int]]
    masks: MaskSet
    prefix: str
    entries: dict[str, tuple[str, int]]

    def holds(self, masks: MaskSet) -> bool:
        """Whether the files of the base are unchanged since the comparison, and the masks are the same object."""
        return masks is self.masks and _files(self.folder) == self.files


def checksum(tensor: Tensor) -> int:
    """The sum of a tensor's 64-bit words, each multiplied by a different odd number, modulo 2^64, as a signed number.
    It is the same on every device and takes about the time of reading the tensor."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if len(data) % 8 or data.storage_offset() % 8:
        data = torch.cat([data, data.new_zeros(-len(data) % 8)])
    words, total = data.view(torch.int64), 0
    for start in range(0, len(words), _WORDS):
        some = words[start : start + _WORDS]
        odd = torch.arange(2 * start + 1, 2 * (start + len(some)), 2, device=some.device)
        total += int((some * odd).sum())
    return (total + 2**63) % 2**64 - 2**63


def compare(
    folder: Path,
    module: nn.Module,
    masks: MaskSet,
    state: Mapping[str, Tensor],
    origins: Mapping[str, int] | None = None,
) -> InBase | None:
    """Find the entries of a module's state dict, without trained parameters, that the base in a run folder holds.

    Returns None if the folder has no readable base of this module.

    Args:
        folder: The run folder.
        module: The module.
        masks: Its masks.
        state: Its state dict, as in a checkpoint.
        origins: State dict key of each quantized weight -> checksum of its float values.
    """
    files = _files(folder)
    if len(files) < 2 or MASKS_FILE not in files:  # the masks are written last
        return None
    try:
        found = pretrained_part(module)
        prefix = f"{found[0]}." if found is not None and found[0] else ""
        # With prompt tuning the names in the file differ, so nothing is left out of the checkpoint.
        if _under_prefix(MaskSet.load(folder / MASKS_FILE), prefix).digest() != masks.digest():
            return None
        with ExitStack() as stack:
            tensors = SavedTensors((folder / BASE_FOLDER).glob("*.safetensors"), stack)
            entries = dict(_equal(module, state, tensors, prefix, origins or {}))
    except (MaskError, SafetensorError, OSError):
        return None  # an unreadable base cannot be relied on
    return InBase(folder, files, masks, prefix, entries)


def leave_out(
    base: InBase, checkpoint: dict[str, Any], pruning: str, origins: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Remove the masks, and all weights that now equal those of the base, from a checkpoint.

    Args:
        base: What `compare` returned.
        checkpoint: The checkpoint as Lightning saves it; changed in place.
        pruning: The key of the state of `WandaPruning`.
        origins: As for `compare`; quantizing the floats in the base gives the same quantized weights again.

    Returns:
        What `complete` needs.
    """
    state = checkpoint["state_dict"]
    origins = origins or {}
    left = {
        key: [*entry]
        for key, entry in base.entries.items()
        if isinstance(state.get(key), Tensor) and entry[1] in (origins.get(key), checksum(state[key]))
    }
    scales = {scale for key in left if key in origins for scale in scale_keys(state, key)}
    checkpoint["state_dict"] = {key: value for key, value in state.items() if key not in left and key not in scales}
    callbacks = checkpoint["callbacks"]
    if pruning in callbacks:
        callbacks[pruning] = {key: value for key, value in callbacks[pruning].items() if key != "masks"}
    folder = str(base.folder.absolute())
    return {"folder": folder, "prefix": base.prefix, "masks": base.masks.digest(), "of": pruning, "entries": left}


def complete(checkpoint: dict[str, Any], left_out: Mapping[str, Any], path: Path, folders: Iterable[Path]) -> Path:
    """Load into a checkpoint what `leave_out` removed, in place.

    Args:
        checkpoint: The checkpoint as it was read.
        left_out: What `leave_out` returned.
        path: The path it was read from, for the message.
        folders: Run folders to search.

    Returns:
        The run folder that holds the base.

    Raises:
        RunFolderError: if none holds the same base; gives the reason for each folder.
    """
    tried: dict[Path, str] = {}
    for folder in dict.fromkeys(place.absolute() for place in folders):
        try:
            masks, tensors = _read(folder, left_out)
        except (RunFolderError, MaskError, SafetensorError, OSError) as error:
            tried[folder] = str(error)
            continue
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **tensors}
        if left_out["of"] in checkpoint["callbacks"]:
            checkpoint["callbacks"][left_out["of"]]["masks"] = masks.state_dict()
        return folder
    looked = "; ".join(f"in {folder}: {reason}" for folder, reason in tried.items())
    raise RunFolderError(
        f"the checkpoint {path} holds only what changes, and the sparse base that it goes with was not found. Looked "
        f"{looked}. Put {BASE_FOLDER}/ and {MASKS_FILE} of its run back into one of these folders, or move the run "
        "folder as a whole"
    )


def _equal(
    module: nn.Module, state: Mapping[str, Tensor], base: SavedTensors, prefix: str, origins: Mapping[str, int]
) -> Iterator[tuple[str, tuple[str, int]]]:
    named = dict(module.named_parameters(remove_duplicate=False))
    shared: dict[int, str] = {}  # a tied weight is written once, under one of its names
    for key, parameter in named.items():
        if (name := canonical_name(key).removeprefix(prefix)) in base:
            shared.setdefault(id(parameter), name)
    for key, value in state.items():
        parameter = named.get(key)
        name = canonical_name(key).removeprefix(prefix)
        if name not in base and parameter is not None:
            name = shared.get(id(parameter), name)
        if name not in base or not isinstance(value, Tensor) or (parameter is not None and parameter.requires_grad):
            continue
        if key in origins:
            if checksum(base[name]) == origins[key]:
                yield key, (name, origins[key])
        elif _same_bits(value, base[name]):
            yield key, (name, checksum(value))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other.to(one.device)))
    return torch.equal(one, other)


def _read(folder: Path, left_out: Mapping[str, Any]) -> tuple[MaskSet, dict[str, Tensor]]:
    if not (folder / BASE_FOLDER).is_dir():
        raise RunFolderError(f"no {BASE_FOLDER}/")
    masks = _under_prefix(MaskSet.load(folder / MASKS_FILE), left_out["prefix"])
    if masks.digest() != left_out["masks"]:
        raise RunFolderError(f"its {MASKS_FILE} is that of another model or run")
    with ExitStack() as stack:
        base, tensors = SavedTensors((folder / BASE_FOLDER).glob("*.safetensors"), stack), {}
        for key, (name, expected) in left_out["entries"].items():
            if name not in base:
                raise RunFolderError(f"its {BASE_FOLDER}/ has no {name}")
            tensors[key] = base[name]
            if checksum(tensors[key]) != expected:
                raise RunFolderError(f"{name} in its {BASE_FOLDER}/ is damaged, or that of another run")
    return masks, tensors


def _under_prefix(masks: MaskSet, prefix: str) -> MaskSet:
    return masks.renamed(lambda name: prefix + name)


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of the files of a base and its masks, by file name."""
    files = [*sorted((folder / BASE_FOLDER).glob("*.safetensors")), folder / MASKS_FILE]
    stats = {file.name: file.stat() for file in files if file.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
