"""Streaming a causal language model larger than memory: its parameters are memory-mapped files, one per block."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsefit.errors import ConfigError, RunFolderError
from sparsefit.modules.loading import Dtype, configuration_of, find_tokenizer, load_skeleton, load_weights, torch_dtype
from sparsefit.modules.model_classes import whole_model
from sparsefit.pruning.blocks import find_block_lists
from sparsefit.pruning.mapped_weights import MappedWeights
from sparsefit.recovery.inspection import open_tensors, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INDEX = "model.safetensors.index.json"
_MASKS = 1 / 16  # the size of masks, one bit a weight, relative to 16-bit weights


class StreamedModel(NamedTuple):
    """A model whose parameters are memory-mapped files."""

    model: PreTrainedModel
    weights: MappedWeights


def stream_causal_lm(
    name: str, folder: Path, dtype: Dtype = "float32", attn_implementation: str | None = None
) -> StreamedModel:
    """Copy a causal language model to another folder and load it with the files of the copy as its parameters.

    The copy is a model folder in Hugging Face layout, with the weights of each block in one file. At no time is more
    than the largest file in memory. Changing a parameter changes the copy. If the weights are stored under other names
    or in other pieces than in transformers' class (experts one by one), transformers converts them on disk first.

    Args:
        name: A local folder with weights in safetensors files.
        folder: An empty folder for the copy.
        dtype: The dtype of the copy: "float32", "bfloat16", "float16", or "auto" for that of the saved model.
        attn_implementation: As in `load_model`.

    Raises:
        ConfigError: if it is not a model folder, or its weights are not those of transformers' class of the model.
        RunFolderError: if there are no weights in safetensors files, or too little free disk space.
    """
    source = _local(name)
    config = configuration_of(name)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{source} holds a quantized model, which cannot be streamed: take one in floats")
    with torch.device("meta"):
        bare = load_skeleton(name, dtype, attn_implementation, "causal_lm")
    wanted = config.dtype if dtype == "auto" else torch_dtype(dtype)
    stored = _Stored(weight_files(source), wanted)
    with ExitStack() as stack:
        if _lacking(bare, stored):
            _check_room(folder, stored.sizes, copies=3)
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
            stored = _Stored(_converted(source, scratch, wanted), wanted)
        _check_fit(source, bare, stored)
        _check_room(folder, stored.sizes)
        files = _copy(stored, _by_block(bare, stored.files), folder)
    weights = MappedWeights(files)
    model = load_weights(name, weights.tensors, wanted, attn_implementation)
    _check_mapped(source, model, weights)
    _copy_other_files(model, source, folder)
    return StreamedModel(model, weights)


def _local(name: str) -> Path:
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{name!r} is no local folder with a config.json: a model is streamed from safetensors files on disk. "
            f"Fetch it first (`hf download {name} --local-dir FOLDER`) and give FOLDER"
        )
    return folder


class _Stored:
    """The tensors of safetensors files, each read only when it is needed.

    Attributes:
        files: The file of each tensor, by name.
        shapes: The shape of each tensor.
        sizes: The bytes of each tensor in the wanted dtype.
    """

    def __init__(self, files: Iterable[Path], dtype: torch.dtype | None) -> None:
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.sizes: dict[str, int] = {}
        self._dtype = dtype
        for file in files:
            with open_tensors(file) as tensors:
                for name, tensor in tensors.items():
                    self.files[name], self.shapes[name] = file, tuple(tensor.shape)
                    self.sizes[name] = tensor.numel() * self._wanted(tensor).itemsize

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read some of the tensors, in the wanted dtype."""
        names, found = list(names), {}
        for file in dict.fromkeys(self.files[name] for name in names):
            with open_tensors(file) as tensors:  # reopened each time: closing releases the memory
                own = [name for name in names if self.files[name] == file]
                found |= {name: tensors[name].to(self._wanted(tensors[name])) for name in own}
        return found

    def _wanted(self, tensor: Tensor) -> torch.dtype:
        return self._dtype if tensor.is_floating_point() and self._dtype is not None else tensor.dtype


def _lacking(bare: nn.Module, stored: _Stored) -> list[str]:
    """The parameters of a model that are not stored under any of their names."""
    return [names[0] for names in _names_of(bare) if not stored.shapes.keys() & names]


def _converted(source: Path, scratch: Path, dtype: torch.dtype | None) -> list[Path]:
    """Convert a model on disk to the weight names and shapes of transformers' class; returns the files."""
    moved = {"device_map": {"": "disk"}, "offload_folder": str(scratch / "offloaded")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        model = whole_model(str(source), "causal_lm", local_files_only=True, dtype=dtype or "auto", **moved)
        model.save_pretrained(scratch / "model", save_original_format=False, max_shard_size="1GB")
    return weight_files(scratch / "model")


def _check_fit(source: Path, bare: nn.Module, stored: _Stored) -> None:
    if lacking := _lacking(bare, stored):
        raise ConfigError(
            f"{source} has no {lacking[0]} of transformers' {type(bare).__name__}, so it cannot be streamed. Check "
            "that the folder is complete and that its config.json names the class that it was saved from"
        )
    shapes = {name: tuple(own.shape) for name, own in bare.named_parameters(remove_duplicate=False)}
    for name, shape in shapes.items():
        if stored.shapes.get(name, shape) != shape:
            raise ConfigError(f"{source}: {name} is {stored.shapes[name]}, and {shape} by its config.json")


def _names_of(model: nn.Module) -> list[list[str]]:
    """The names of each parameter: several if weights are tied."""
    names: dict[int, list[str]] = {}
    for name, own in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(own), []).append(name)
    return list(names.values())


def _by_block(bare: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Group tensor names: those outside the blocks, and those of each block."""
    blocks = {id(block) for blocks in find_block_lists(bare) for block in blocks}
    paths = [f"{path}." for path, module in bare.named_modules() if id(module) in blocks]
    groups: dict[str, list[str]] = {"": []} | {path: [] for path in paths}
    for name in names:
        groups[next((path for path in paths if name.startswith(path)), "")].append(name)
    return [group for group in groups.values() if group]


def _check_room(folder: Path, sizes: dict[str, int], copies: int = 1) -> None:
    needed = sum(sizes.values()) * (copies + _MASKS)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunFolderError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free; the pruned model needs {needed / 1e9:.1f} GB. Free "
            "some space or choose another folder"
        )


def _copy(stored: _Stored, groups: list[list[str]], folder: Path) -> list[Path]:
    """Write each group of tensors to a file, and an index of all of them."""
    files = [folder / f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    for file, names in zip(files, groups, strict=True):
        save_file(stored.read(names), file, metadata={"format": "pt"})
    weight_map = {name: file.name for file, names in zip(files, groups, strict=True) for name in names}
    index = {"metadata": {"total_size": sum(stored.sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _check_mapped(source: Path, model: nn.Module, weights: MappedWeights) -> None:
    moved = []
    for names in _names_of(model):
        own, stored = (
            model.get_parameter(names[0]),
            [weights.tensors[name] for name in names if name in weights.tensors],
        )
        if own.numel() and own.data_ptr() not in [tensor.data_ptr() for tensor in stored]:
            moved += names
    if moved:
        raise ConfigError(
            f"{source}: transformers computes {moved[0]} from what is stored, or keeps it in another dtype, so that it "
            "cannot be streamed. Take the model's own dtype ('auto'), or a machine with more memory"
        )


def _copy_other_files(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Write the files of a model folder other than the weights: configurations and tokenizer."""
    model.config.save_pretrained(folder)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    if (tokenizer := find_tokenizer(str(source))) is not None:
        tokenizer.save_pretrained(folder)
