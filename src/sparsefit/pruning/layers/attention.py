"""nn.MultiheadAttention: all of its weights are used in one function, F.multi_head_attention_forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefit.pruning.layers.base import Handler, PrunableWeight, See, is_dense

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def matrices(module: nn.Module) -> list[PrunableWeight]:
    """`in_proj_weight`, (3E, E) with the rows of query, key and value one after another, or the three separate weights;
    and `out_proj.weight`.

    >>> [(weight.name, weight.shape) for weight in matrices(nn.MultiheadAttention(8, 2))]
    [('in_proj_weight', (24, 8)), ('out_proj.weight', (8, 8))]
    """
    # PEFT replaces out_proj with its own layer, and recomputes all weights in each pass.
    if not isinstance(module, nn.MultiheadAttention) or not isinstance(module.out_proj, nn.Linear):
        return []
    parameters = dict(module.named_parameters())
    names = (*(_SEPARATE if _SEPARATE[0] in parameters else ("in_proj_weight",)), "out_proj.weight")
    # A parametrization also recomputes a weight: its name then refers to no parameter.
    if not all(is_dense(parameters.get(name)) for name in names):
        return []
    return [PrunableWeight(name, parameters[name], (module,)) for name in names]


def _attend(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], see: See) -> Any:
    call = _SIGNATURE.bind(*args, **kwargs)
    given = call.arguments
    _see_projections(given, see)
    weight, bias = given["out_proj_weight"], given["out_proj_bias"]
    if not see.holds(weight):
        return function(*args, **kwargs)
    # With the identity in the weight's place, the function returns the weight's input.
    given["out_proj_weight"] = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    given["out_proj_bias"] = None
    inputs, attention = function(*call.args, **call.kwargs)
    see(weight, _batch_first(inputs))
    outputs = F.linear(inputs.flatten(0, -2), weight, bias)  # flat as in the function itself
    return outputs.unflatten(0, inputs.shape[:-1]), attention


def _see_projections(given: Mapping[str, Any], see: See) -> None:
    tensors, packed = [given[name] for name in ("query", "key", "value")], given["in_proj_weight"]
    inputs = {id(tensor): _batch_first(tensor) for tensor in tensors}
    separate = given.get("use_separate_proj_weight")
    if not separate and len(inputs) == 1:
        see(packed, *inputs.values())
        return
    weights = [given[name] for name in _SEPARATE] if separate else packed.chunk(3)
    for weight, tensor in zip(weights, tensors, strict=True):
        see(weight, inputs[id(tensor)])


def _batch_first(inputs: Tensor) -> Tensor:
    """(tokens, batch, in) as (batch, tokens, in); (tokens, in) as it is."""
    return inputs.transpose(0, 1) if inputs.ndim == 3 else inputs


PRODUCTS: dict[Callable[..., Any], Handler] = {F.multi_head_attention_forward: _attend}
