"""Quantizes the frozen sparse base to 4 or 8 bits while adapters train, and converts it back to floats for merging.

bitsandbytes is imported only when something is quantized.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsefit.bare_model import base_modules, canonical_name, copied_modules
from sparsefit.errors import ConfigError
from sparsefit.pruning import MaskSet
from sparsefit.quantized import dequantized, is_quantized, zero_outside
from sparsefit.recovery.export import base_state_dict

Kind = Literal["nf4", "int8"]
KINDS = ("nf4", "int8")
_QUANTIZABLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class QuantizeReport:
    """The result of `quantize_base`.

    Attributes:
        kind: "nf4" or "int8".
        layers: Names of the quantized weights.
        left: Masked parameter that was not quantized -> reason.
        bytes_before: Bytes of the model without its adapters before quantization.
        bytes_after: Bytes of the model without its adapters afterwards, including scales.
    """

    kind: Kind
    layers: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def account(self) -> dict[str, Any]:
        """The result as a dict for reports."""
        return asdict(self)


def check_settings(kind: str, compute_dtype: torch.dtype | None = None, double_quant: bool = False) -> None:
    """Check that settings are valid and bitsandbytes is installed.

    Raises:
        ConfigError: for unknown or incompatible settings, or if bitsandbytes is not installed.
    """
    if kind not in KINDS:
        raise ConfigError(f"a base cannot be held in {kind!r}: the choices are nf4 and int8")
    if kind == "int8" and (compute_dtype is not None or double_quant):
        raise ConfigError(
            "compute_dtype and double_quant are settings of nf4: leave them out with int8, which computes in the "
            "dtype of its inputs and has one scale a row"
        )
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"to hold the base in {kind}, bitsandbytes is needed, and it is not installed: "
            "pip install 'sparsefit[quantized]', or pip install bitsandbytes"
        )


def check_adapters(model: nn.Module) -> None:
    """Check that the adapters of a model do not read the values of the weights that they adapt.

    Raises:
        ConfigError: if one does, as HiRA and DoRA do; names it.
    """
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "base_layer", None), nn.Linear):
            continue
        dora = any(getattr(module, "use_dora", {}).values())
        if dora or not hasattr(module, "lora_A"):
            raise ConfigError(
                f"{canonical_name(name)} has an adapter ({'DoRA' if dora else type(module).__name__}) that computes "
                "with the numbers of its weight, which a quantized weight does not have: take form lora or "
                "masked_lora, or leave the base in floats"
            )


@torch.no_grad()
def quantize_base(
    model: nn.Module,
    kind: Kind,
    masks: MaskSet,
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = False,
) -> QuantizeReport:
    """Quantize the masked linear layers of a model in place; every pruned weight stays exactly zero.

    Embeddings, head, norms, adapters and the copies of layers that PEFT trains have no mask and are not quantized.
    Matrices that are not the weight of their own `nn.Linear` are not quantized either (stacked experts, GPT-2's Conv1D,
    shared weights); the report lists them. Quantization is deterministic.

    Args:
        model: A pruned LightningModule or model, with LoRA adapters or none; its base is frozen.
        kind: "nf4": 4 bits, blocks of 64 weights; "int8": 8 bits, one scale per row.
        masks: Its masks.
        compute_dtype: Dtype of the products with nf4 weights; None is autocast's, else that of the inputs.
        double_quant: Quantize the scales of nf4, too.

    Raises:
        ConfigError: before anything is changed, if a masked weight trains, an adapter reads weight values, the settings
            are invalid, or bitsandbytes is missing.
        MaskError: before anything is changed, if the masks do not fit the model, or a pruned weight is not zero.
    """
    check_settings(kind, compute_dtype, double_quant)
    check_adapters(model)
    masks.verify(model)
    layers, left = _choose(model, masks)
    report = QuantizeReport(kind, list(layers), left, base_bytes(model))
    if kind == "int8":
        # bitsandbytes warns on every call that inputs other than float16 are cast.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    places = _places(model)
    for name in list(layers):
        old = layers.pop(name)  # the last reference after its replacement, so that its memory is freed
        new = _quantized(old, kind, compute_dtype, double_quant)
        mask = masks.mask(name, new.weight.device)
        if bool(dequantized(new).masked_fill_(mask, 0).any()):
            zero_outside(new, mask)
        for parent, child in places[id(old)]:
            setattr(parent, child, new)
    report.bytes_after = base_bytes(model)
    return report


def dequantize_base(model: nn.Module) -> None:
    """Replace quantized layers by plain linear layers with the dequantized weights.

    Zeros stay zeros. The weights get their dtype from before quantization; if that is unknown, the dtype of the model's
    other weights.
    """
    _put_floats(model)


@contextmanager
def in_floats(model: nn.Module) -> Iterator[None]:
    """Replace quantized layers by plain ones temporarily, for example to merge adapters for an evaluation."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        replaced += _put_floats(model)
        yield
    finally:
        for parent, child, layer in replaced:
            layer.train(getattr(parent, child).training)
            setattr(parent, child, layer)


def base_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors without its adapters; shared tensors count once, scales are included."""
    tensors = {(t.data_ptr(), t.shape): t.nbytes for t in base_state_dict(model).values() if t.device.type != "meta"}
    return sum(tensors.values())


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the state dict key of each quantized weight, and its layer."""
    for name, module in model.named_modules(remove_duplicate=False):
        if is_quantized(module):
            yield (f"{name}.weight" if name else "weight"), module


def float_weights(model: nn.Module, masks: MaskSet) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the state dict key of each masked weight of a plain linear layer, and the weight."""
    for name, module in model.named_modules(remove_duplicate=False):
        key = f"{name}.weight" if name else "weight"
        if type(module) is nn.Linear and canonical_name(key) in masks.parameters:
            yield key, module.weight


def scale_keys(state: Mapping[str, Any], key: str) -> list[str]:
    """The keys in a state dict of the scales and the format of the quantized weight with the given key."""
    layer = key.removesuffix("weight")
    return [k for k in state if k.startswith(f"{key}.") or k in (f"{layer}SCB", f"{layer}weight_format")]


def to_float_state(model: nn.Module, state: dict[str, Any]) -> dict[str, Tensor]:
    """Replace the quantized weights in a model's state dict by float weights on the CPU, in place.

    Args:
        model: The model.
        state: Its state dict; quantized weights that it does not contain are skipped.

    Returns:
        The scales that were removed from it, for `restore_scales`.
    """
    scales: dict[str, Tensor] = {}
    for key, layer in quantized_weights(model):
        if key in state:
            state[key] = _float_weight(layer, model).cpu()
            scales |= {name: state.pop(name).cpu() for name in scale_keys(state, key)}
    return scales


@torch.no_grad()
def restore_scales(model: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Restore the exact scales of weights that were dequantized and quantized again.

    Their codes are the same as before, but scales that are themselves quantized may differ.

    Args:
        model: The quantized model.
        scales: What `to_float_state` returned.
    """
    from bitsandbytes.nn import Params4bit

    for key, layer in quantized_weights(model):
        own = {name: scales[name] for name in scale_keys(scales, key)}
        device = layer.weight.device
        if (rows := own.get(f"{key.removesuffix('weight')}SCB")) is not None:
            layer.weight.SCB = rows.to(device)
        elif own:
            own = {name.removeprefix(f"{key}."): value.to(device) for name, value in own.items()}
            layer.weight = Params4bit.from_prequantized(layer.weight.data, own, device=device, module=layer)


def _choose(model: nn.Module, masks: MaskSet) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The layers to quantize by name of their weight, and for each other masked parameter why it is not quantized."""
    owners: dict[str, tuple[nn.Module, str]] = {}
    holders: dict[int, set[int]] = {}
    for path, module in base_modules(model).items():
        for name, _ in module.named_parameters(recurse=False):
            owners[f"{path}.{name}" if path else name] = (module, name)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(id(module))
    copied, layers, left = copied_modules(model), {}, {}
    for weight in masks.parameters:
        module, name = owners[weight]
        parameter = getattr(module, name)
        if parameter.requires_grad:
            raise ConfigError(
                f"{weight} trains, and a quantized weight cannot: train adapters on the frozen base (form lora or "
                "masked_lora), or leave the base in floats"
            )
        if is_quantized(module):
            left[weight] = "is quantized already"
        elif type(module) is not nn.Linear or name != "weight":
            stacked = weight not in masks
            left[weight] = "a stack of matrices" if stacked else f"held by a {type(module).__name__}, no nn.Linear"
        elif id(module) in copied:
            left[weight] = "a copy of its layer trains in its place"
        elif len(holders[id(parameter)]) > 1:
            left[weight] = "shared with another layer"
        elif parameter.dtype not in _QUANTIZABLE:
            left[weight] = f"its dtype is {parameter.dtype}"
        else:
            layers[weight] = module
    return layers, left


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """For each module id, its parents and its name in each parent."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parent, _, name = path.rpartition(".")
        if path:
            places.setdefault(id(module), []).append((model.get_submodule(parent), name))
    return places


@torch.no_grad()
def _put_floats(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replace quantized layers by plain ones; returns parent, name and quantized layer for each replacement."""
    places, replaced = _places(model), []
    for layer in [module for module in model.modules() if is_quantized(module)]:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(_float_weight(layer, model), requires_grad=False)
        plain.bias = layer.bias
        plain.train(layer.training)
        for parent, child in places.get(id(layer), []):
            setattr(parent, child, plain)
            replaced.append((parent, child, layer))
    return replaced


def _quantized(layer: nn.Linear, kind: Kind, compute_dtype: torch.dtype | None, double_quant: bool) -> nn.Module:
    from sparsefit.recovery.quantized_linear import FrozenLinear4bit, FrozenLinear8bit

    return FrozenLinear8bit(layer) if kind == "int8" else FrozenLinear4bit(layer, compute_dtype, double_quant)


def _float_weight(layer: nn.Module, model: nn.Module) -> Tensor:
    """The dequantized weight, (out, in), in its dtype from before quantization."""
    values = dequantized(layer)
    if values.dtype == torch.float32 and layer.weight.dtype == torch.int8:
        others = (t.dtype for m in base_modules(model).values() for t in m.parameters(recurse=False) if t.ndim > 1)
        known = getattr(layer, "weight_dtype", None)
        values = values.to(known or next((dtype for dtype in others if dtype.is_floating_point), torch.float32))
    return values
