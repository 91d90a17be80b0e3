"""A pruned model at the size of what is kept: its kept values and one bit a weight, and back without a bit changed.

The layout (recovery/compact_layout.py) is our own: compressed-tensors removed its sparse-bitmask compressor in 0.15 and
vLLM its sparse kernels; the compressor lost the sign of -0.0, too, and could not hold stacks of experts.
A compact folder saves disk and transfer, not memory or time: a model computes with the dense tensors that are read.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sparsefit.errors import ConfigError, MaskError, RunFolderError
from sparsefit.files import SUMS_FILE, check_sums, replacing
from sparsefit.pruning import MaskSet
from sparsefit.pruning.masks import pack_bits
from sparsefit.recovery import compact_layout as layout
from sparsefit.recovery.compact_layout import Header, Part, Saved, compact_files, integers, selected
from sparsefit.recovery.inspection import MASKS_FILE, masks_beside, weight_files

_OTHER_FORMATS = frozenset({".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth"})
_TEMPLATES = "additional_chat_templates"  # the one folder that a tokenizer saves


@dataclass(frozen=True)
class CompactReport:
    """What a conversion did.

    Attributes:
        folder: The folder written.
        bytes_before: Size of the weight files read.
        bytes_after: Size of the weight files written.
        compact: Names of the tensors that are held as kept values and bits.
        plain: The other tensors, and why.
    """

    folder: Path
    bytes_before: int
    bytes_after: int
    compact: list[str]
    plain: dict[str, str]


def compress_folder(model_folder: str | Path, output: str | Path, masks: MaskSet | None = None) -> CompactReport:
    """Write a saved model as a compact folder.

    Configuration and tokenizer are copied along. Nothing has the name of the output before it is whole.

    Args:
        model_folder: A model in Hugging Face layout, in one file or many, or a run folder.
        output: The compact folder; new or empty.
        masks: Its masks; None for those saved with it. A model that has none is taken by its zeros.

    Raises:
        RunFolderError: if there is no model to read, a file is damaged, or the output cannot be written.
        MaskError: if the masks do not fit, or a pruned weight is not exactly +0 in the files.
    """
    model_folder, output = Path(model_folder), Path(output)
    if any(model_folder.glob(f"*{layout.SUFFIX}")):
        raise RunFolderError(f"{model_folder} is a compact folder already; expand_folder makes an ordinary one of it")
    files = weight_files(model_folder)
    masks = masks_beside(model_folder) if masks is None else masks
    held: list[Saved] = []
    _check_empty(output)
    with replacing(output) as folder:
        for file in files:
            with layout.opened(file) as tensors:
                header = _plan(file, [one.name for one in files], tensors, masks)
                parts = _compact_parts(tensors, header, masks)
                layout.write(folder / layout.compact_name(file), layout.as_metadata(header), parts)
            held += header.tensors
        _check_all_found(masks, held, model_folder)
        check_sums(files[0].parent)
        _copy_others(files[0].parent, folder, {file.name for file in files} | {MASKS_FILE})
        if masks is not None and any(one.kept is None and one.name in masks.parameters for one in held):
            masks.save(folder / MASKS_FILE)  # the bits do not tell all of them
    return _report(output, files, [output / layout.compact_name(file) for file in files], held)


def expand_folder(compact: str | Path, output: str | Path) -> CompactReport:
    """Write the ordinary folder back: every tensor to the bit as it was, and the masks beside them.

    Args:
        compact: What `compress_folder` wrote.
        output: A model folder in Hugging Face layout; new or empty.

    Raises:
        RunFolderError: if the compact folder is damaged or something else, or the output cannot be written.
    """
    compact, output = Path(compact), Path(output)
    files = compact_files(compact)
    held: list[Saved] = []
    found = MaskSet()
    _check_empty(output)
    with replacing(output) as folder:
        for file in files:
            with layout.opened(file) as tensors:
                header = layout.header_of(file, tensors)
                parts = [
                    Part(s.name, s.dtype, s.shape, s.size, partial(layout.dense_tensor, file, tensors, s))
                    for s in header.tensors
                ]
                layout.write(folder / layout.ordinary_name(file), header.original, parts)
                found = _joined(found, layout.masks_in(file, tensors, header))
            held += header.tensors
        check_sums(compact)  # of the others: the weights have their own
        _copy_others(compact, folder, {file.name for file in files})
        if found and not (folder / MASKS_FILE).exists():
            if found.digest() != header.digest:
                raise RunFolderError(f"{compact} is damaged: its bits do not give the masks that it was made with")
            found.save(folder / MASKS_FILE)
    return _report(output, files, [output / layout.ordinary_name(file) for file in files], held)


def read_compact(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a compact folder by name as the ordinary files had them, one after the other.

    Raises:
        RunFolderError: if the folder is missing, damaged, of a newer version or something else.
    """
    for file in compact_files(folder):
        with layout.opened(file) as tensors:
            for saved in layout.header_of(file, tensors).tensors:
                yield saved.name, layout.dense_tensor(file, tensors, saved)


def load_compact(folder: str | Path, model_class: Any, **settings: Any) -> nn.Module:
    """The model of a compact folder, as `model_class.from_pretrained` gives it from the ordinary one.

    The model takes over the tensors that are read: they are in memory once, unless its class converts them.

    Args:
        folder: What `compress_folder` wrote.
        model_class: A class of transformers (no Auto class): the one called `architecture_of(folder)`.
        settings: For its `from_pretrained`: dtype, attn_implementation, device_map ...

    Raises:
        RunFolderError: if the folder is damaged or something else.
        ConfigError: if its tensors do not fill a model of this class.
    """
    folder = Path(folder)
    saved_from = architecture_of(folder)
    model, found = model_class.from_pretrained(
        None,
        config=str(folder),
        state_dict=dict(read_compact(folder)),
        output_loading_info=True,
        local_files_only=True,
        **settings,
    )
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise ConfigError(
            f"{folder} does not fill a {model_class.__name__}: it has no {missing}. It was saved from a {saved_from}"
        )
    # transformers has no folder to take these two from.
    model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file() and getattr(model, "generation_config", None) is not None:
        model.generation_config = type(model.generation_config).from_pretrained(folder, local_files_only=True)
    return model


def architecture_of(folder: str | Path) -> str:
    """The name of the transformers class that a model folder was saved from.

    Raises:
        RunFolderError: if its config.json is missing or does not say.
    """
    path = Path(folder) / "config.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise RunFolderError(
            f"{path} does not say of which class the model is ({error!r}); read_compact gives its tensors"
        ) from error


def _plan(file: Path, files: list[str], tensors: safe_open, masks: MaskSet | None) -> Header:
    """The metadata of a compact file, for which every tensor is looked at and checked."""
    held, bits = [], []
    for name in tensors.offset_keys():
        tensor, dtype = tensors.get_tensor(name), tensors.get_slice(name).get_dtype()
        why, count = _why_plain(name, tensor, masks), None
        if why is None and masks is not None:
            of_this = masks.of_parameter(name)
            list(of_this.matrices_in({name: tensor}))  # raises if one does not fit
            _check_zeros(name, tensor, _kept(name, tensor, masks), file)
            bits += [(of, entry["shape"], entry["transposed"]) for of, entry in of_this.state_dict().items()]
        if why is None:
            count = int(torch.count_nonzero(_kept(name, tensor, masks)))
        held.append(Saved(name, dtype, list(tensor.shape), tensor.nbytes, layout.digest(tensor), count, why))
    return Header(files, held, bits, masks.digest() if masks is not None else "", tensors.metadata() or {})


def _why_plain(name: str, tensor: Tensor, masks: MaskSet | None) -> str | None:
    """Why a tensor is stored as it is; None if it is to be stored as kept values and bits."""
    if masks is not None and name not in masks.parameters:
        return "has no mask"
    if not tensor.is_floating_point() or tensor.element_size() not in layout.INTEGERS:
        return f"quantized or no weights: {tensor.dtype}"
    if masks is not None:
        return None
    if tensor.ndim < 2:
        return "not a matrix"
    size = int(torch.count_nonzero(integers(tensor))) * tensor.element_size() + math.ceil(tensor.numel() / 8)
    return None if size < tensor.nbytes else "too few zeros to become smaller"


def _kept(name: str, tensor: Tensor, masks: MaskSet | None) -> Tensor:
    """Which weights of a tensor are kept, flat; without masks all but +0, so that -0.0 and NaN are not lost."""
    return integers(tensor) != 0 if masks is None else masks.for_parameter(name, tensor).flatten()


def _check_zeros(name: str, tensor: Tensor, kept: Tensor, file: Path) -> None:
    alive = int(torch.count_nonzero((integers(tensor) != 0) & ~kept))
    if alive:
        raise MaskError(
            f"{name} in {file} has {alive} weights that its mask prunes and that are not exactly +0 (-0.0 counts): "
            "they would be lost. MaskSet.apply(model) makes them zero; then save the model again"
        )


def _check_all_found(masks: MaskSet | None, held: list[Saved], folder: Path) -> None:
    unseen = set(masks.parameters if masks is not None else ()) - {saved.name for saved in held}
    if unseen:
        raise MaskError(f"the masks do not fit the model in {folder}: it has no {', '.join(sorted(unseen)[:3])}")


def _compact_parts(tensors: safe_open, header: Header, masks: MaskSet | None) -> list[Part]:
    def values_of(name: str) -> Tensor:
        tensor = tensors.get_tensor(name)
        return selected(integers(tensor), _kept(name, tensor, masks))

    def bits_of(name: str) -> Tensor:
        return pack_bits(_kept(name, tensors.get_tensor(name), masks))

    values, bits = [], []
    for saved in header.tensors:
        count = math.prod(saved.shape)
        width = saved.size // max(1, count)
        if saved.kept is None:
            part = Part(saved.name, saved.dtype, saved.shape, saved.size, partial(tensors.get_tensor, saved.name))
        else:
            make = partial(values_of, saved.name)
            part = Part(f"{saved.name}.kept", saved.dtype, [saved.kept], saved.kept * width, make)
            size = math.ceil(count / 8)
            bits.append(Part(f"{saved.name}.bits", "U8", [size], size, partial(bits_of, saved.name)))
        values.append((width, part))
    # Wide types first, as safetensors has them: every tensor is then aligned to its type.
    return [part for _, part in sorted(values, key=lambda entry: -entry[0])] + bits


def _joined(first: MaskSet, second: MaskSet) -> MaskSet:
    return MaskSet.from_state_dict(first.state_dict() | second.state_dict())


def _report(folder: Path, read: list[Path], written: list[Path], held: list[Saved]) -> CompactReport:
    before, after = (sum(file.stat().st_size for file in files) for files in (read, written))
    plain = {saved.name: saved.why_plain for saved in held if saved.why_plain is not None}
    return CompactReport(folder, before, after, [saved.name for saved in held if saved.why_plain is None], plain)


def _copy_others(source: Path, target: Path, without: set[str]) -> None:
    """Copy what lies beside the weights: configuration, tokenizer, code; no weights in other formats."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in without | {SUMS_FILE} and path.suffix not in _OTHER_FORMATS:
            shutil.copy2(path, target / path.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES)


def _check_empty(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise RunFolderError(f"{output} exists and is not an empty folder: give another name, or remove it first")
