"""Weights in 4-bit or 8-bit formats of bitsandbytes: read as (out, in) matrices, pruned, written and restored.

NF4, FP4 and int8 have a code for exactly 0. Pruning writes this code (`zero_outside`); scales and the codes of kept
weights stay bitwise the same. Only weights that a reconstruction changed are quantized again (`write_quantized`).
bitsandbytes is imported only for that, as its CPU kernel (0.50, AVX-512) reads wrong values if the width is a multiple
of 32 but not of the blocksize.

All functions take the layer, not its parameter: the scales of an 8-bit layer move from the parameter to `layer.state`
in the first forward pass, and the values cached there must change together with the weights.
Formats: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sparsefit.errors import MaskError

_BITS = {"Linear4bit": 4, "Linear8bitLt": 8}
_INT8_MAX = 127  # a row's scale (SCB) is its largest magnitude, which has the code 127
_CPU_LAYOUT = "support_avx512bf16_for_cpu"  # attribute: whether a Linear4bit may change to its CPU layout
_CPU_ROWS = 32  # rows that the CPU layout interleaves


def bits_of(layer: nn.Module) -> int:
    """4 or 8 for a layer of bitsandbytes, quantized yet or not; else 0.

    >>> bits_of(nn.Linear(3, 5))
    0
    """
    # PEFT has layers of the same names that wrap these; they do not count.
    own = (c.__name__ for c in type(layer).__mro__ if c.__module__.startswith("bitsandbytes"))
    return next((_BITS[name] for name in own if name in _BITS), 0)


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer is of bitsandbytes and its weight is quantized already.

    >>> is_quantized(nn.Linear(3, 5))
    False
    """
    bits = bits_of(layer)
    if bits == 4:
        return _state(layer) is not None
    return bits == 8 and layer.weight.dtype == torch.int8 and _row_scales(layer) is not None


def awaits_quantization(layer: nn.Module) -> bool:
    """Whether a bitsandbytes layer still holds floats that it will quantize when it is moved to a device (including
    `model.to("cpu")`) or, with 8 bits, in its first forward pass.

    >>> awaits_quantization(nn.Linear(3, 5))
    False
    """
    keeps_floats = bits_of(layer) == 8 and layer.state.has_fp16_weights
    return bits_of(layer) > 0 and not is_quantized(layer) and not keeps_floats


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """The shape (out, in) of a quantized layer's weight, independent of its storage layout.

    >>> matrix_shape(nn.Linear(3, 5))
    (5, 3)
    """
    rows, columns = _state(layer).shape if bits_of(layer) == 4 else layer.weight.shape
    return int(rows), int(columns)


def dequantized(layer: nn.Module) -> Tensor:
    """The dequantized weights of a layer as a new (out, in) tensor on its device: with 4 bits in the dtype from before
    quantization, with 8 bits in float32, the dtype of the scales.

    >>> layer = nn.Linear(2, 1).requires_grad_(False)  # with what a Linear8bitLt holds
    >>> layer.weight.data, layer.weight.SCB = torch.tensor([[127, -64]], dtype=torch.int8), torch.tensor([2.0])
    >>> dequantized(layer)
    tensor([[ 2.0000, -1.0079]])
    """
    if bits_of(layer) == 4:
        return _values(layer.weight.data, _state(layer))
    return _row_scales(layer).unsqueeze(1) / _INT8_MAX * layer.weight.data


def zero_outside(layer: nn.Module, mask: Tensor) -> None:
    """Set the weights outside an (out, in) bool mask to exactly zero; kept weights stay bitwise the same. Raises a
    MaskError if the mask has another shape than the weights.

    >>> layer = nn.Linear(2, 1)  # with what a Linear8bitLt holds
    >>> layer.weight.SCB, layer.state = torch.ones(1), SimpleNamespace(reset_grads=lambda: None)
    >>> zero_outside(layer, torch.tensor([[True, False]])); layer.weight != 0
    tensor([[ True, False]])
    """
    _check_shape(layer, mask)
    mask = mask.to(layer.weight.device)
    if bits_of(layer) == 4:
        _write_codes(layer, _with_zeros(layer.weight.data, _state(layer), mask))
    else:
        _put_int8(layer, layer.weight.data.masked_fill(~mask, 0), _row_scales(layer))


def write_quantized(layer: nn.Module, matrix: Tensor) -> None:
    """Quantize an (out, in) float matrix with the layer's own settings, as its new weights. Zeros stay exact zeros;
    other weights get the rounding error of the format.

    >>> write_quantized(nn.Linear(3, 5), torch.zeros(3, 5))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    sparsefit.errors.MaskError: a mask or matrix of shape (3, 5) does not fit ...
    """
    _check_shape(layer, matrix)
    from bitsandbytes import functional

    weight, kept = layer.weight, (matrix != 0).to(layer.weight.device)
    if bits_of(layer) == 8:
        codes, scales, _ = functional.int8_vectorwise_quant(matrix.to(weight.device, torch.float16).contiguous())
        # The scale of an all-zero row is 0, and kernels differ in how they round 0 / 0.
        _put_int8(layer, codes.masked_fill(~kept, 0), scales)
        return
    state = _state(layer)
    packed, new = functional.quantize_4bit(
        matrix.to(weight.device, _dtype(state)).contiguous(),
        blocksize=state.blocksize,
        compress_statistics=getattr(state, "original_nested", state.nested),
        quant_type=state.quant_type,
        quant_storage=getattr(state, "original_storage_type", weight.dtype),
    )
    # An all-zero block has the scale 0. If scales are quantized, too, it may be restored as another number, and not
    # every kernel gives the weights of such a block the code of 0.
    packed = _with_zeros(packed, new, kept)
    # Replace the fields of the state, not the object, which the parameter and all layers that share it refer to. One
    # assignment, so that an interrupt leaves either the old or the new fields.
    state.__dict__ = vars(new)
    _write_codes(layer, packed)


def snapshot(layer: nn.Module) -> Callable[[], None]:
    """Copy codes and scales; returns a function that restores them bitwise and may be called repeatedly.

    >>> layer = nn.Linear(2, 1).requires_grad_(False)  # with what a Linear8bitLt holds
    >>> layer.weight.data, layer.weight.SCB = torch.tensor([[127, -64]], dtype=torch.int8), torch.tensor([2.0])
    >>> callable(snapshot(layer))
    True
    """
    codes = layer.weight.data.clone()
    if bits_of(layer) != 4:
        scales = _row_scales(layer).clone()
        return lambda: _put_int8(layer, codes, scales)
    fields, cpu_layout = copy.deepcopy(vars(_state(layer))), getattr(layer, _CPU_LAYOUT, False)

    def put_back() -> None:
        _state(layer).__dict__ = dict(fields)
        layer.weight.data = codes
        setattr(layer, _CPU_LAYOUT, cpu_layout)

    return put_back


@contextmanager
def plain_layout(model: nn.Module) -> Iterator[None]:
    """Keep the 4-bit layers of a model in the plain layout from now on; undone only if the body raises.

    On a CPU with AVX-512 BF16, a Linear4bit in evaluation mode rearranges its weights in its first forward pass. This
    rounds the scales and fails for some shapes. In bitsandbytes 0.50, such layers are also saved with the scales in the
    wrong order and break in `model.to(device)`.

    >>> with plain_layout(nn.Linear(3, 5)) as held: print(held)
    None
    """
    switched = [layer for layer in model.modules() if bits_of(layer) == 4 and getattr(layer, _CPU_LAYOUT, False)]
    for layer in switched:
        setattr(layer, _CPU_LAYOUT, False)
    try:
        yield
    except BaseException:
        for layer in switched:
            setattr(layer, _CPU_LAYOUT, True)
        raise


def stored_matrix(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The weight called `name` in the tensors of a state dict or a file, (out, in); dequantized if it was saved in 4 or
    8 bits. Its scales are found by name.

    >>> stored_matrix({"weight": torch.tensor([[127, -64]], dtype=torch.int8), "SCB": torch.tensor([2.0])}, "weight")
    tensor([[ 2.0000, -1.0079]])
    """
    data = tensors[name]
    if f"{name}.absmax" in tensors:
        parts = {key.removeprefix(f"{name}."): tensors[key] for key in tensors if key.startswith(f"{name}.")}
        return _values(data, _state_of_parts(parts))
    scales = tensors.get(f"{name.removesuffix('weight')}SCB")
    if data.dtype == torch.int8 and scales is not None:
        return scales.unsqueeze(1) / _INT8_MAX * data
    return data


def _state(layer: nn.Module) -> Any:
    # The layer keeps a second reference, as sharding strategies lose the attributes of a parameter.
    state = getattr(layer.weight, "quant_state", None)
    return state if state is not None else getattr(layer, "quant_state", None)


def _row_scales(layer: nn.Module) -> Tensor | None:
    scales = getattr(layer.weight, "SCB", None)
    scales = scales if scales is not None else layer.state.SCB
    return scales.to(layer.weight.device) if scales is not None else None


def _put_int8(layer: nn.Module, codes: Tensor, scales: Tensor) -> None:
    """Put a Linear8bitLt in the state right after quantization; its next forward pass caches codes and scales."""
    layer.weight.data = codes
    layer.weight.CB, layer.weight.SCB = codes, scales
    layer.state.reset_grads()


def _write_codes(layer: nn.Module, packed: Tensor) -> None:
    """Set the codes of a Linear4bit, in the plain layout, and convert its scales to that layout."""
    state = _state(layer)
    state.absmax, state.dtype = _flat_absmax(state), _dtype(state)
    state.packing_format_for_cpu = False
    layer.weight.data = packed
    setattr(layer, _CPU_LAYOUT, False)


def _with_zeros(data: Tensor, state: Any, mask: Tensor) -> Tensor:
    """The packed codes with the code of 0 wherever an (out, in) mask is False; shaped (n, 1), as they are stored."""
    codes = _codes(data, state)
    zero = int((state.code == 0).nonzero()[0])
    codes[: mask.numel()].masked_fill_(~mask.flatten(), zero)
    storage = getattr(state, "original_storage_type", data.dtype)
    return (codes[::2] << 4 | codes[1::2]).view(storage).unsqueeze(1)


def _values(data: Tensor, state: Any) -> Tensor:
    """Dequantize 4-bit codes: code value times block scale, in float32 and rounded once, as the kernels do."""
    count, scales = torch.Size(state.shape).numel(), _block_scales(state)
    codes = nn.functional.pad(_codes(data, state)[:count], (0, len(scales) * state.blocksize - count))
    values = state.code.float()[codes.int()].view(len(scales), state.blocksize) * scales.unsqueeze(1)
    return values.flatten()[:count].view(*state.shape).to(_dtype(state))


def _codes(data: Tensor, state: Any) -> Tensor:
    """The 4-bit codes, one per byte, row by row, as a new tensor; one extra code if the number of weights is odd."""
    stored = data.contiguous().view(torch.uint8)
    if data.ndim == 1 or 1 in data.shape:  # the plain layout: pairs, the first of each in the high half
        stored = stored.flatten()
        return torch.stack((stored >> 4, stored & 15), dim=1).flatten()
    # The CPU layout, (out, in / 2): in each pair of columns of 32 rows, rows 0-15 are the low half-bytes and rows 16-31
    # the high ones.
    rows, columns = state.shape
    stored = stored.view(rows // _CPU_ROWS, columns // 2, _CPU_ROWS)
    pairs = torch.cat((stored & 15, stored >> 4), dim=2).view(rows // _CPU_ROWS, columns // 2, _CPU_ROWS, 2)
    return pairs.transpose(1, 2).flatten()


def _block_scales(state: Any) -> Tensor:
    """The scale of each block in float32; dequantized if the scales are quantized themselves."""
    if not state.nested:
        return _flat_absmax(state).float()
    codes, outer = state.absmax, state.state2
    scales = outer.absmax.repeat_interleave(outer.blocksize)[: len(codes)]
    return outer.code[codes.int()] * scales + state.offset


def _flat_absmax(state: Any) -> Tensor:
    # In the CPU layout, scales are (blocks per row, rows) in bfloat16.
    return state.absmax.t().flatten().float() if state.absmax.ndim == 2 else state.absmax


def _dtype(state: Any) -> torch.dtype:
    return getattr(state, "original_dtype", state.dtype)


def _state_of_parts(parts: Mapping[str, Tensor]) -> Any:
    """The fields of a QuantState from its saved tensors; one of them holds all other fields as JSON."""
    packed = next(value for key, value in parts.items() if key.startswith("quant_state."))
    fields = SimpleNamespace(**json.loads(bytes(packed.cpu().tolist())))
    fields.dtype, fields.absmax, fields.code = getattr(torch, fields.dtype), parts["absmax"], parts["quant_map"]
    fields.nested = "nested_absmax" in parts
    if fields.nested:
        fields.state2 = SimpleNamespace(
            absmax=parts["nested_absmax"], code=parts["nested_quant_map"], blocksize=fields.nested_blocksize
        )
        fields.offset = fields.nested_offset
    return fields


def _check_shape(layer: nn.Module, tensor: Tensor) -> None:
    if tuple(tensor.shape) != matrix_shape(layer):
        raise MaskError(
            f"a mask or matrix of shape {tuple(tensor.shape)} does not fit quantized weights of shape "
            f"{matrix_shape(layer)}: give it as (out, in), not packed"
        )
