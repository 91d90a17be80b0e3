"""Linear layers: nn.Linear and its subclasses, GPT-2's Conv1D, and all matrix products with their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefit.pruning.layers import quantized
from sparsefit.pruning.layers.base import Handler, PrunableWeight, See, is_dense


def matrices(module: nn.Module) -> list[PrunableWeight]:
    """The weight of nn.Linear, (out, in), or of transformers' Conv1D (GPT-2), stored (in, out).

    >>> [(weight.name, weight.shape) for weight in matrices(nn.Linear(3, 5))]
    [('weight', (5, 3))]
    """
    weight, kind = getattr(module, "weight", None), type(module).__name__
    # The output projection of nn.MultiheadAttention is never called: a fused function uses its weight.
    if not is_dense(weight) or weight.ndim != 2 or kind == "NonDynamicallyQuantizableLinear":
        return []
    # y = x W + b with W (in, out). Recognised by its name, as this package must not import transformers.
    transposed = kind == "Conv1D" and hasattr(module, "nf")
    if not transposed and (not isinstance(module, nn.Linear) or quantized.matrices(module)):
        return []
    return [PrunableWeight("weight", weight, (module,), transposed, called=True)]


def _product(*names: str, weight_is_second: bool = False) -> Handler:
    """The handler of a matrix product whose arguments have these names; the last two of them are multiplied."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], see: See) -> Any:
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        left, right = given.get(names[-2]), given.get(names[-1])
        if weight_is_second:
            see(right, left)
        elif isinstance(left, Tensor) and isinstance(right, Tensor):
            _see_factors(left, right, see)
        return function(*args, **kwargs)

    return handler


def _see_factors(left: Tensor, right: Tensor, see: See) -> None:
    first, second = _one_matrix(left), _one_matrix(right)
    if second.ndim == 2 and see.holds(second):  # x W^T
        see(second.mT, left)
    elif first.ndim == 2 and see.holds(first):  # W x^T, or W times one vector
        columns = right.mT if right.ndim > 1 else right
        see(first, right, tokens=lambda: iter([columns.detach().reshape(-1, first.shape[1])]))
    elif right.ndim == 3 and left.ndim in (2, 3) and see.holds(right):  # a stack of experts, each with its own tokens
        for tokens, expert in zip(left.expand(len(right), -1, -1), right.mT, strict=True):
            # Tokens that are routed to other experts are zeros here (Llama 4).
            see(expert, tokens, tokens=lambda tokens=tokens: iter([tokens[tokens.any(dim=-1)]]))


def _one_matrix(tensor: Tensor) -> Tensor:
    """The matrix of a batch of one, or of one matrix repeated; other tensors unchanged."""
    repeats = tensor.layout is torch.strided and len(tensor) > 0
    while tensor.ndim > 2 and (len(tensor) == 1 or (repeats and tensor.stride(0) == 0)):
        tensor = tensor[0]
    return tensor


PRODUCTS: dict[Callable[..., Any], Handler] = {
    F.linear: _product("input", "weight", weight_is_second=True),
    **dict.fromkeys((torch.matmul, torch.linalg.matmul, Tensor.matmul, Tensor.__matmul__), _product("input", "other")),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _product("input", "mat2")),
    **dict.fromkeys((torch.mv, Tensor.mv), _product("input", "vec")),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _product("input", "mat1", "mat2")),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), _product("input", "batch1", "batch2")),
}
