"""Converts pruned 2:4 layers to torch's semi-structured tensors, which GPUs since Ampere multiply up to twice as fast.

torch.sparse (officially a prototype) has two backends: cuSPARSELt, and CUTLASS where that is missing. Both store two
values of every four and two bits for each: 9/16 of the memory of a dense half-precision weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsefit.bare_model import base_modules
from sparsefit.pruning import MaskSet
from sparsefit.pruning.masks import split_name
from sparsefit.quantized import is_quantized

HALF = (torch.float16, torch.bfloat16)
MULTIPLES = {"cusparselt": (16, 16), "cutlass": (32, 64)}
"""Backend -> (rows, columns) of which the shape of a half-precision weight must be a multiple."""

_AMPERE, _HOPPER = (8, 0), (9, 0)
_TRIAL = 64  # rows and columns that fit both backends


@dataclass(frozen=True)
class SemiStructuredReport:
    """The result of `to_semi_structured`.

    Attributes:
        backends: Device -> backend of the converted weights: "cusparselt" or "cutlass".
        converted: Names of the converted weights.
        dense: Masked weight that was not converted -> reason.
    """

    backends: dict[str, str] = field(default_factory=dict)
    converted: list[str] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)


def to_semi_structured(model: nn.Module, masks: MaskSet) -> SemiStructuredReport:
    """Replace the weights of 2:4 pruned linear layers by torch's semi-structured tensors, in place.

    For inference: such a tensor cannot be trained, merged into, cast, moved or saved by `save_pretrained` (save the
    model first), and inputs must have its dtype (no autocast from another one).

    Args:
        model: A pruned model on its GPU in bfloat16 or float16, with or without PEFT's adapters.
        masks: Its masks.

    Returns:
        Which weights were converted, and for each other masked weight why it was not. If no weight can be converted,
        this is not an error: all weights then have a reason.

    Raises:
        MaskError: if the masks do not fit or a pruned weight is not zero, before anything is changed.
    """
    masks.verify(model)
    layers = base_modules(model)
    report = SemiStructuredReport()
    chosen: dict[torch.device, tuple[str | None, str]] = {}
    for name in masks:
        layer = layers.get(name.removesuffix(".weight"))
        why = why_dense(name, layer, masks)
        if not why:
            device = layer.weight.device
            if device not in chosen:
                chosen[device] = backend_of(device)
            backend, why = chosen[device]
            why = why or _misfit(layer.weight, backend)
        if why:
            report.dense[name] = why
            continue
        _replace(layers, layer.weight, nn.Parameter(pack(layer.weight.detach(), backend), requires_grad=False))
        report.backends[str(device)] = backend
        report.converted.append(name)
    return report


def why_dense(name: str, layer: nn.Module | None, masks: MaskSet) -> str:
    """Why a weight cannot be a semi-structured tensor on any GPU; the empty string if it can.

    Args:
        name: Name of its mask.
        layer: The layer that it is the weight of, if there is one.
        masks: All masks.
    """
    if split_name(name)[1] is not None:
        return "one matrix of a stack of experts"
    if layer is None or not name.endswith("weight"):
        return "not the weight of a layer of its own"
    if is_quantized(layer):
        return "quantized"
    if type(layer) is not nn.Linear:
        return f"its layer is a {type(layer).__name__}, not an nn.Linear"
    if not is_two_of_four(masks[name]):
        return "its mask is not 2:4"
    if layer.weight.dtype not in HALF:
        kind = str(layer.weight.dtype).removeprefix("torch.")
        # torch converts float32 weights, too, but to 1:2, which removes weights that the mask keeps.
        return f"it is {kind}: convert the model to bfloat16 or float16 first"
    if layer.bias is not None and layer.bias.dtype != layer.weight.dtype:
        return "its bias has another dtype"
    return ""


def is_two_of_four(mask: Tensor) -> bool:
    """Whether an (out, in) mask keeps at most two of every four consecutive inputs."""
    if mask.shape[1] % 4:
        return False
    return bool((mask.view(mask.shape[0], -1, 4).sum(dim=2) <= 2).all())


def backend_of(device: torch.device) -> tuple[str | None, str]:
    """The backend for semi-structured tensors on a device and an empty string; None and the reason if there is none.

    Decided by a trial product, as it depends on how torch was built.
    """
    if device.type != "cuda":
        return None, f"it is on the {device.type}: 2:4 tensors need a GPU of compute capability 8.0 or newer"
    capability = torch.cuda.get_device_capability(device)
    if capability < _AMPERE:
        return None, f"the GPU has compute capability {capability[0]}.{capability[1]}: 2:4 tensors need 8.0 or newer"
    candidates = ["cusparselt"] if torch.backends.cusparselt.is_available() else []
    candidates += ["cutlass"] if capability < _HOPPER else []  # torch compiles its CUTLASS kernels for 8.x alone
    problems = {backend: _try(backend, device) for backend in candidates}
    works = next((backend for backend, problem in problems.items() if not problem), None)
    listed = "; ".join(f"{backend}: {problem}" for backend, problem in problems.items())
    return works, "" if works else f"no backend of this torch works on the GPU ({listed or 'it has no cuSPARSELt'})"


def pack(dense: Tensor, backend: str) -> Tensor:
    """A dense 2:4 weight (out, in) as a semi-structured tensor of a backend."""
    kinds = {
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }
    return kinds[backend].from_dense(dense.contiguous())


def _try(backend: str, device: torch.device) -> str:
    """Try a small product with a known result; returns the error, or the empty string if the result is right."""
    weight = torch.tensor([0.0, 1.0, 0.0, -2.0], dtype=torch.float16, device=device).tile(_TRIAL, _TRIAL // 4)
    inputs = torch.eye(_TRIAL, dtype=torch.float16, device=device)
    try:
        product = nn.functional.linear(inputs, pack(weight, backend))
    except (RuntimeError, NotImplementedError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return "" if torch.equal(product, weight.t()) else "wrong results"


def _misfit(weight: Tensor, backend: str) -> str:
    rows, columns = MULTIPLES[backend]
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"its shape is {tuple(weight.shape)}: {backend} takes multiples of ({rows}, {columns})"
    return ""


def _replace(layers: Mapping[str, nn.Module], old: nn.Parameter, new: nn.Parameter) -> None:
    for layer in layers.values():
        if type(layer) is nn.Linear and layer.weight is old:
            layer.weight = new
