"""Where the matrix of a mask lies: in a model, a state dict or the tensors of a file."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from sparsefit.pruning.layers.base import as_matrix
from sparsefit.pruning.layers.quantized import dequantized, is_quantized, matrix_shape, stored_matrix
from sparsefit.pruning.naming import canonical_name


@dataclass(frozen=True)
class Stored:
    """A parameter as a model or a file holds it.

    Attributes:
        tensor: Its data.
        quantized: Its layer, if that holds it in 8 or 4 bits.
    """

    tensor: Tensor
    quantized: nn.Module | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, of what it stands for if it is quantized."""
        return tuple(self.tensor.shape if self.quantized is None else matrix_shape(self.quantized))

    def matrix(self, transposed: bool, index: int | None) -> Tensor:
        """The (out, in) matrix that a mask belongs to; a copy where it is quantized, else a view."""
        values = self.tensor if self.quantized is None else dequantized(self.quantized)
        return as_matrix(values, transposed, index)

    def matrix_shape(self, transposed: bool, index: int | None) -> tuple[int, int] | None:
        """(out, in) of that matrix; None if there is no such matrix."""
        shape = self.shape
        if index is not None:
            if len(shape) != 3 or index >= shape[0]:
                return None
            shape = shape[1:]
        if len(shape) < 2:
            return None
        rows, columns = shape[0], math.prod(shape[1:])
        return (columns, rows) if transposed else (rows, columns)


def split_name(name: str) -> tuple[str, int | None]:
    """The parameter that a mask's name speaks of, and which matrix of a stack.

    >>> split_name("experts.down_proj[3]"), split_name("fc.weight")
    (('experts.down_proj', 3), ('fc.weight', None))
    """
    match = re.fullmatch(r"(.+)\[(\d+)\]", name)
    return (match[1], int(match[2])) if match else (name, None)


def names_in(tensors: nn.Module | Mapping[str, Tensor]) -> list[str]:
    """The names that the parameters have in the bare model.

    >>> names_in(nn.Linear(3, 5))
    ['weight', 'bias']
    """
    if isinstance(tensors, nn.Module):
        tensors = dict(tensors.named_parameters(remove_duplicate=False))
    return [canonical_name(name) for name in tensors]


def stored_in(tensors: nn.Module | Mapping[str, Tensor], wanted: Container[str]) -> dict[str, Stored]:
    """The wanted parameters of a model, a state dict or a file, by the name that they have in the bare model.

    >>> stored_in(nn.Linear(3, 5), wanted=["weight"])["weight"].shape
    (5, 3)
    """
    if not isinstance(tensors, nn.Module):
        bare = {canonical_name(name): tensor for name, tensor in tensors.items()}
        return {name: Stored(stored_matrix(bare, name).detach()) for name in bare if name in wanted}
    found = {}
    for prefix, module in tensors.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            whole = canonical_name(f"{prefix}.{name}" if prefix else name)
            if whole in wanted:
                is_packed = name == "weight" and is_quantized(module)
                found[whole] = Stored(parameter.detach(), module if is_packed else None)
    return found
