"""The masks of a pruned model, at one bit a weight: applying, verifying, saving and loading them, and their digest."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparsefit.bare_model import canonical_name
from sparsefit.errors import MaskError
from sparsefit.files import replacing_file
from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.pruning.layers.quantized import QuantizedWeight
from sparsefit.pruning.layers.sharded import as_sharded, counted
from sparsefit.quantized import is_quantized, matrix_shape, stored_matrix
from sparsefit.sharded import reshard

_FORMAT = "sparsefit-masks-1"
Tensors = nn.Module | Mapping[str, Tensor]  # a model, a state dict or the tensors of a file


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor of any shape as ceil(numel / 8) bytes on the CPU; the first weight is the highest bit.

    >>> pack_bits(torch.tensor([[True, False], [True, True]]))
    tensor([176], dtype=torch.uint8)
    """
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy()))
    eights = nn.functional.pad(mask.flatten(), (0, -mask.numel() % 8)).view(torch.int64)
    # Eight bools are the bytes of one integer; this product moves their bits, in order, into its highest byte.
    return (eights * (0x8040201008040201 - (1 << 64)) >> 56).to(torch.uint8).cpu()


def unpack_bits(packed: Tensor, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """The bool tensor of a shape, from the bytes of `pack_bits`.

    >>> unpack_bits(torch.tensor([176], dtype=torch.uint8), (2, 2)).tolist()
    [[True, False], [True, True]]
    """
    count = torch.Size(shape).numel()
    if torch.device(device).type == "cpu":
        bits = torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=count))
    else:
        places = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
        bits = (packed.to(device)[:, None] >> places & 1).flatten()[:count]
    return bits.view(torch.bool).view(shape)


def split_name(name: str) -> tuple[str, int | None]:
    """The parameter that a mask's name refers to, and the number of the matrix if the parameter is a stack.

    >>> split_name("experts.down_proj[3]"), split_name("fc.weight")
    (('experts.down_proj', 3), ('fc.weight', None))
    """
    match = re.fullmatch(r"(.+)\[(\d+)\]", name)
    return (match[1], int(match[2])) if match else (name, None)


class _Packed(NamedTuple):
    bits: Tensor  # (ceil(out * in / 8),) uint8
    shape: tuple[int, int]  # (out, in)
    transposed: bool  # whether the parameter is stored (in, out)


class MaskSet(Mapping[str, Tensor]):
    """Masks by parameter name, stored at one bit a weight.

    `masks[name]` is a bool tensor (out, in), True = kept. Names are those of the bare model, so a set fits the
    model with and without PEFT's wrappers. Each matrix of a stack of experts has a mask of its own, under the
    parameter's name and its number: "...experts.down_proj[3]".

    Attributes:
        parameters: For each masked parameter, the names of its masks: several for a stack of experts.
    """

    def __init__(self, packed: Mapping[str, _Packed] | None = None) -> None:
        self._packed: dict[str, _Packed] = {}
        self.parameters: dict[str, list[str]] = {}
        for name, own in (packed or {}).items():
            self._put(name, own)

    def add(self, name: str, mask: Tensor, transposed: bool = False) -> Tensor:
        """Add the (out, in) bool mask of a parameter; `transposed` if the parameter is stored (in, out). Returns the
        packed bits, on the CPU."""
        bits = pack_bits(mask)
        self._put(name, _Packed(bits, (mask.shape[0], mask.shape[1]), transposed))
        return bits

    def _put(self, name: str, packed: _Packed) -> None:
        if name not in self._packed:
            self.parameters.setdefault(split_name(name)[0], []).append(name)
        self._packed[name] = packed

    def __getitem__(self, name: str) -> Tensor:
        return self.mask(name, "cpu")

    def mask(self, name: str, device: torch.device | str) -> Tensor:
        """The (out, in) mask of a weight on a device; it is sent there as bits and unpacked there."""
        return unpack_bits(self._packed[name].bits, self._packed[name].shape, device)

    def __contains__(self, name: object) -> bool:
        return name in self._packed  # a Mapping's own would unpack the mask

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def for_parameter(self, parameter: str, like: Tensor) -> Tensor:
        """The mask of a whole parameter in the shape and layout in which it is stored, on its device."""
        stored = torch.ones(like.shape, dtype=torch.bool, device=like.device)
        for name in self.parameters[parameter]:
            place = PrunableWeight(name, stored, (), self._packed[name].transposed, split_name(name)[1])
            place.set_values(self.mask(name, like.device))
        return stored

    def counts(self) -> dict[str, tuple[int, int]]:
        """(weights, zeros) of each mask."""
        return {name: (mask.numel(), mask.numel() - int(mask.sum())) for name, mask in self.items()}

    @property
    def sparsity(self) -> float:
        """Share of zeros over all masks."""
        counts = self.counts().values()
        return sum(zeros for _, zeros in counts) / max(1, sum(size for size, _ in counts))

    def digest(self) -> str:
        """sha256 of names, shapes and bits: equal if and only if the masks are equal."""
        sha = hashlib.sha256()
        for name, packed in sorted(self._packed.items()):
            sha.update(json.dumps([name, packed.shape, packed.transposed]).encode())
            sha.update(packed.bits.numpy().tobytes())
        return sha.hexdigest()

    def renamed(self, rename: Callable[[str], str]) -> MaskSet:
        """The same masks under other names."""
        return MaskSet({rename(name): packed for name, packed in self._packed.items()})

    def of_parameter(self, parameter: str) -> MaskSet:
        """The masks of one parameter."""
        return MaskSet({name: self._packed[name] for name in self.parameters.get(parameter, ())})

    def apply(self, model: nn.Module) -> None:
        """Set every pruned weight of a model to zero.

        Raises:
            MaskError: before anything is changed, if a mask's parameter is missing or has another shape.
        """
        with torch.no_grad():
            for name, weight in self._found_in(model).items():
                weight.apply_mask(self.mask(name, weight.device))

    def verify(self, tensors: Tensors) -> None:
        """Check that every pruned weight of a model, or of tensors by name (a state dict, a file), is exactly zero.

        Raises:
            MaskError: naming the parameters with non-zero pruned weights, and how many; or if the masks do not fit.
        """
        broken = [f"{name} ({count})" for name, count in self.alive(tensors).items() if count]
        if broken:
            raise MaskError(
                f"pruned weights are not zero in {len(broken)} of {len(self)} matrices: {', '.join(broken[:5])}. "
                "Something wrote to them after pruning; MaskSet.apply(model) makes them zero again"
            )

    def alive(self, tensors: Tensors) -> dict[str, int]:
        """How many pruned weights of each matrix are non-zero; a MaskError if the masks do not fit."""

        def outside(weight: PrunableWeight) -> Tensor:
            kept = weight.part(self.mask(weight.name, weight.device))
            return torch.count_nonzero(weight.held().masked_fill(kept, 0))

        return counted(self._found_in(tensors).values(), outside)

    def matrices_in(self, tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each mask and its (out, in) matrix: a copy if it is quantized, else a view.

        Raises:
            MaskError: if a matrix is missing (with the nearest names) or has another shape.
        """
        for name, weight in self._found_in(tensors).items():
            yield name, weight.matrix()

    def _found_in(self, tensors: Tensors) -> dict[str, PrunableWeight]:
        names, held = _held_in(tensors, self.parameters)
        found = {}
        for name, packed in self._packed.items():
            parameter, index = split_name(name)
            if parameter not in held:
                nearest = ", ".join(difflib.get_close_matches(parameter, names, n=2, cutoff=0))
                raise MaskError(
                    f"the masks do not fit the model: it has no parameter {parameter}; the nearest are {nearest}"
                )
            own = held[parameter]
            if isinstance(own, nn.Module):
                weight, shape = QuantizedWeight(name, own.weight, (own,)), matrix_shape(own)
            else:
                weight = as_sharded(PrunableWeight(name, own, (), packed.transposed, index))
                shape = tuple(own.shape)
            if not _fits(weight, packed.shape):
                raise MaskError(
                    f"the masks do not fit the model: {parameter} is {shape}, its mask "
                    f"{'' if index is None else f'{index} '}{packed.shape}{' stored transposed' * packed.transposed}"
                )
            found[name] = weight
        return found

    def state_dict(self) -> dict[str, Any]:
        """The masks as plain tensors and primitives, for a checkpoint."""
        return {name: packed._asdict() | {"shape": list(packed.shape)} for name, packed in self._packed.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> MaskSet:
        """The masks of `state_dict`; a MaskError if an entry is incomplete."""
        found = {}
        for name, entry in state.items():
            try:
                out, inputs = entry["shape"]
                packed = _Packed(entry["bits"].cpu(), (int(out), int(inputs)), bool(entry["transposed"]))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise MaskError(f"the saved mask of {name} is damaged: {error!r}") from error
            if packed.bits.dtype != torch.uint8 or packed.bits.shape != (-(-out * inputs // 8),):
                raise MaskError(
                    f"the saved mask of {name} is damaged: {tuple(packed.bits.shape)} bytes for {out}x{inputs}"
                )
            found[name] = packed
        return cls(found)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file of one bit a weight; an existing file is replaced only once the new one is complete.
        The same masks give the same file, byte for byte."""
        shapes = {name: [*packed.shape, packed.transposed] for name, packed in self._packed.items()}
        metadata = {"format": _FORMAT, "masks": json.dumps(shapes), "digest": self.digest()}
        entries: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, packed in self._packed.items():
            start, end = end, end + len(packed.bits)
            entries[name] = {"dtype": "U8", "shape": [len(packed.bits)], "data_offsets": [start, end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        with replacing_file(Path(path)) as partial, open(partial, "wb") as file:  # safetensors shuffles the metadata
            file.write(len(header).to_bytes(8, "little") + header)
            for packed in self._packed.values():
                file.write(packed.bits.numpy().tobytes())

    @classmethod
    def load(cls, path: str | Path) -> MaskSet:
        """Read a file of `save`; a MaskError if it is missing, damaged or another kind of file."""
        path = Path(path)
        if not path.is_file():
            raise MaskError(f"there is no mask file {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {
                    name: {"bits": file.get_tensor(name), "shape": shape, "transposed": transposed}
                    for name, (*shape, transposed) in json.loads(metadata.get("masks", "{}")).items()
                }
        except (SafetensorError, OSError, AttributeError, TypeError, ValueError) as error:
            raise MaskError(f"{path} is damaged or no mask file: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise MaskError(f"{path} is no mask file of this version: its format is {metadata.get('format')!r}")
        masks = cls.from_state_dict(state)
        if masks.digest() != metadata.get("digest"):
            raise MaskError(f"{path} is damaged: its masks do not give the digest that was saved with them")
        return masks


def _held_in(tensors: Tensors, wanted: Container[str]) -> tuple[list[str], dict[str, Tensor | nn.Module]]:
    """The names of all parameters in the bare model, and each wanted parameter, or its layer if it is quantized."""
    layers = {}
    if isinstance(tensors, nn.Module):
        reshard(tensors)
        modules = tensors.named_modules(remove_duplicate=False)
        layers = {canonical_name(f"{name}.weight".lstrip(".")): m for name, m in modules if is_quantized(m)}
        tensors = dict(tensors.named_parameters(remove_duplicate=False))
    bare = {canonical_name(name): tensor for name, tensor in tensors.items()}
    plain = {name: stored_matrix(bare, name) for name in bare if name in wanted and name not in layers}
    return list(bare), plain | layers


def _fits(weight: PrunableWeight, shape: tuple[int, int]) -> bool:
    try:
        return weight.shape == shape
    except (IndexError, RuntimeError):  # not a stack, or too few matrices in it; or not a matrix to transpose
        return False
