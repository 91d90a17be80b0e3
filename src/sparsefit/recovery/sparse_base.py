"""What a checkpoint leaves to the sparse base in a run folder, and how it is filled up from there again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparsefit.errors import ConfigError, MaskError, RunFolderError
from sparsefit.pruning import MaskSet
from sparsefit.pruning.naming import canonical_name
from sparsefit.recovery.export import exported_masks, pretrained_part
from sparsefit.recovery.inspection import BASE_FOLDER, MASKS_FILE
from sparsefit.recovery.quantize import scale_keys

_SHOWN = 3
_WORDS = 2**22  # that are summed up at once


@dataclass(frozen=True)
class InBase:
    """The entries of a module's state that a base has, bit by bit.

    Attributes:
        folder: The run folder.
        files: The size and the time of change of each of its files when they were compared.
        masks: The masks of the module, which are those of the folder.
        prefix: What a name in the base lacks of the module's name.
        entries: Key in the state -> (name in the base, checksum).
    """

    folder: Path
    files: dict[str, tuple[int, int]]
    masks: MaskSet
    prefix: str
    entries: dict[str, tuple[str, int]]

    def holds(self, masks: MaskSet) -> bool:
        """Whether the base is still the one that was compared, and for these masks."""
        return masks is self.masks and _files(self.folder) == self.files


def checksum(tensor: Tensor) -> int:
    """The sum of a tensor's 64-bit words, each times an odd number of its own, modulo 2^64 (as a signed number): the
    same on every device, at about the speed of reading it."""
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
    """What the base in a run folder has of a module's state; nothing that trains. None where there is no base of it.

    Args:
        folder: The run folder.
        module: The module.
        masks: Its masks.
        state: Its state, as a checkpoint has it.
        origins: Key in the state of each quantized weight -> checksum of the floats that it was made of.
    """
    files = _files(folder)
    if len(files) < 2 or MASKS_FILE not in files:  # the masks are written last
        return None
    try:
        if MaskSet.load(folder / MASKS_FILE).digest() != exported_masks(module, masks).digest():
            return None
        found = pretrained_part(module)
        prefix = f"{found[0]}." if found is not None and found[0] else ""
        with ExitStack() as stack:
            tensors = _Tensors(folder / BASE_FOLDER, stack)
            entries = dict(_equal(module, state, tensors, prefix, origins or {}))
    except (MaskError, SafetensorError, OSError):
        return None  # what cannot be read cannot be relied on
    return InBase(folder, files, masks, prefix, entries)


def leave_out(
    base: InBase, checkpoint: dict[str, Any], pruning: str, origins: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Take out of a checkpoint what is, at this moment, as the base has it, and the masks.

    Args:
        base: What the base has.
        checkpoint: As Lightning saves it.
        pruning: The key of the state of `WandaPruning`.
        origins: As for `compare`; the floats in the base give the same quantized weights again.

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


def complete(checkpoint: dict[str, Any], left_out: Mapping[str, Any], path: Path, folders: Iterable[Path]) -> None:
    """Put back what `leave_out` took.

    Args:
        checkpoint: As it was read.
        left_out: What `leave_out` returned.
        path: Where it was read, for the message.
        folders: Run folders to look into, before the one that the base was in when the checkpoint was saved.

    Raises:
        RunFolderError: if none holds the very same base; says for each what is wrong.
    """
    tried: dict[Path, str] = {}
    for folder in dict.fromkeys(place.absolute() for place in (*folders, Path(left_out["folder"]))):
        try:
            masks, tensors = _read(folder, left_out)
        except (RunFolderError, MaskError, SafetensorError, OSError) as error:
            tried[folder] = str(error)
            continue
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **tensors}
        if left_out["of"] in checkpoint["callbacks"]:
            checkpoint["callbacks"][left_out["of"]]["masks"] = masks.state_dict()
        return
    looked = "; ".join(f"in {folder}: {reason}" for folder, reason in tried.items())
    raise RunFolderError(
        f"the checkpoint {path} holds only what changes, and the sparse base that it goes with was not found. Looked "
        f"{looked}. Put {BASE_FOLDER}/ and {MASKS_FILE} of its run back into one of these folders, or move the run "
        "folder as a whole"
    )


def check_same_recipe(checkpoint: Mapping[str, Any], module: nn.Module, path: str | Path) -> None:
    """See that a module trains what the checkpoint holds.

    Raises:
        ConfigError: if model or adapters are others; names the settings that differ.
    """
    now, saved = _settings(getattr(module, "hparams", {})), _settings(checkpoint.get("hyper_parameters") or {})
    differing = {key: (saved[key], now[key]) for key in saved.keys() & now.keys() if saved[key] != now[key]}
    held, state = checkpoint["state_dict"], module.state_dict()
    left_out = (checkpoint["sparsefit"]["base"] or {}).get("entries", {})
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    problems = []
    if getattr(module, "strict_loading", True):
        problems += [f"{name} is not in the checkpoint" for name in trained if name not in held | left_out]
        problems += [f"{key} is not in the model" for key in [*held, *left_out] if key not in state]
    problems += [
        f"{name} is {tuple(held[name].shape)} in the checkpoint and {tuple(parameter.shape)} in the model"
        for name, parameter in trained.items()
        if name in held and held[name].shape != parameter.shape
    ]
    # Others, such as the learning rate or dropout, may be changed on the way.
    decisive = {setting: values for setting, values in differing.items() if _decides(setting)}
    if not problems and not decisive:
        return
    listed = ", ".join(
        f"{key} was {was!r} and is {is_!r}" for key, (was, is_) in sorted((decisive or differing).items())
    )
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise ConfigError(
        f"the checkpoint {path} is from another recipe: {'; '.join(filter(None, [listed, *problems[:_SHOWN]]))}{more}. "
        "Resume with the settings of its run (config.yaml in the run folder), or start a new run in another folder"
    )


def _decides(setting: str) -> bool:
    return setting == "model" or (setting.split(".")[0] == "adapter" and setting != "adapter.dropout")


def _settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, in plain values; of a model's path only the last part, as folders are moved."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _settings(value, f"{prefix}{key}.")
        elif key == "model" and not prefix:
            flat[key] = Path(str(value)).name
        elif isinstance(value, tuple | list | str | int | float | None):  # others may not compare
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


class _Tensors:
    """The tensors in a folder's safetensors files, read as they are asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        files = [stack.enter_context(safe_open(file, framework="pt")) for file in sorted(folder.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


def _equal(
    module: nn.Module, state: Mapping[str, Tensor], base: _Tensors, prefix: str, origins: Mapping[str, int]
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
    masks = MaskSet.load(folder / MASKS_FILE).renamed(lambda name: left_out["prefix"] + name)
    if masks.digest() != left_out["masks"]:
        raise RunFolderError(f"its {MASKS_FILE} is that of another model or run")
    with ExitStack() as stack:
        base, tensors = _Tensors(folder / BASE_FOLDER, stack), {}
        for key, (name, expected) in left_out["entries"].items():
            if name not in base:
                raise RunFolderError(f"its {BASE_FOLDER}/ has no {name}")
            tensors[key] = base[name]
            if checksum(tensors[key]) != expected:
                raise RunFolderError(f"{name} in its {BASE_FOLDER}/ is damaged, or that of another run")
    return masks, tensors


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of the files that make up a base and its masks."""
    files = [*sorted((folder / BASE_FOLDER).glob("*.safetensors")), folder / MASKS_FILE]
    stats = {file.name: file.stat() for file in files if file.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
