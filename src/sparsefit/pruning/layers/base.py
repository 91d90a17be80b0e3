"""What all kinds of layers share: a weight as an (out, in) matrix, and how a product reports the inputs of its weights.

Each kind of layer is one file in this folder. It has

- `matrices(module)`: the weights of a module itself (not of its children) that multiply its inputs, as
  `PrunableWeight`s; an empty list for a module of another kind;
- `PRODUCTS`: for each torch function that computes with such weights a handler
  `handler(function, args, kwargs, see)`, which calls `see` (a `See`) for each weight with its inputs and returns what
  the function returns. So an input is seen at the product itself, whatever code calls the function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Tokens = Callable[[], Iterator[Tensor]]  # gives the rows that a matrix multiplies, (tokens, in), in one or more pieces
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the number of bytes
CHUNK = 2**18  # elements that a CPU works on at once: these and temporaries of their size fit in its cache


@dataclass(frozen=True, eq=False)
class PrunableWeight:
    """One weight matrix and the layers that use it.

    Attributes:
        name: The parameter's name in the module or in the bare model. A matrix of a stack of experts has its number
            added: "model.layers.0.mlp.experts.down_proj[3]".
        parameter: The parameter itself.
        layers: Every layer that holds this parameter (more than one where it is shared).
        transposed: Whether the parameter is stored (in, out), as GPT-2's Conv1D does.
        index: The number of the matrix if the parameter is a stack, (experts, out, in).
        called: Whether the argument of its layers' call is what the matrix multiplies; used if no product is seen.
    """

    name: str
    parameter: nn.Parameter
    layers: tuple[nn.Module, ...]
    transposed: bool = False
    index: int | None = None
    called: bool = False

    @property
    def view(self) -> Tensor:
        """A view of the stored weights, (out, in) or, for a convolution, (out, in, positions...)."""
        return stored_view(self.parameter.detach(), self.transposed, self.index)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, *rest = self.view.shape
        return out, math.prod(rest)

    @property
    def device(self) -> torch.device:
        """The current device of the weights."""
        return self.parameter.device

    @property
    def positions(self) -> int:
        """How many columns of the matrix belong to one input channel: the kernel positions of a convolution, else 1."""
        return math.prod(self.view.shape[2:])

    def matrix(self) -> Tensor:
        """The weights as (out, in); shares memory with the parameter where a view is possible."""
        return as_matrix(self.parameter.detach(), self.transposed, self.index)

    @property
    def in_product(self) -> Tensor:
        """The tensor whose memory is passed to products that compute with the weights."""
        return self.view

    def part(self, matrix: Tensor) -> Tensor:
        """The part of an (out, in) tensor that belongs to the weights this rank holds: all of it, unless sharded."""
        return matrix

    def held(self) -> Tensor:
        """The weights that this rank holds as a matrix, with the shape of a `part`."""
        return as_matrix(self.view)

    def apply_mask(self, mask: Tensor) -> None:
        """Set the weights outside an (out, in) mask to exactly zero, in place."""
        zero_outside_mask(self.view, self.part(mask).to(self.device))
        self.changed()

    def set_values(self, matrix: Tensor) -> None:
        """Replace the weights with new values, (out, in)."""
        view = self.view
        view.copy_(self.part(matrix).reshape(view.shape))
        self.changed()

    def changed(self) -> None:
        """Called after each change of the weights, for layers that compute with a copy of them."""


class See(Protocol):
    """Called with the input of a weight just before the product."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is a watched parameter or a view of one."""

    def __call__(self, weight: Tensor, inputs: Tensor, tokens: Tokens | None = None, key: Hashable = None) -> None:
        """Record the inputs of a parameter, or of a view of it or of some of its rows; other tensors are ignored.

        `tokens` gives the rows that the matrix multiplies, if these are not `inputs`, (..., in), flattened. `key`
        distinguishes different views of one input tensor, such as the strides of a convolution.
        """


Handler = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any], See], Any]


def stored_view(tensor: Tensor, transposed: bool, index: int | None = None) -> Tensor:
    """View a tensor that is stored as (in, out), or in a stack, as (out, in, ...); or the other way round.

    >>> stored_view(torch.zeros(4, 3, 5), transposed=True, index=2).shape
    torch.Size([5, 3])
    """
    view = tensor if index is None else tensor[index]
    return view.t() if transposed else view


def as_matrix(tensor: Tensor, transposed: bool = False, index: int | None = None) -> Tensor:
    """A tensor that is stored as (in, out), in a stack, or as a convolution's kernels, as an (out, in) or
    (out, in * positions) matrix; a view where that is possible.

    >>> as_matrix(torch.zeros(8, 3, 2, 2)).shape, as_matrix(torch.zeros(4, 3, 5), transposed=True, index=2).shape
    (torch.Size([8, 12]), torch.Size([5, 3]))
    """
    view = stored_view(tensor, transposed, index)
    return view.flatten(1) if view.ndim > 2 else view


def is_dense(parameter: object) -> bool:
    """Whether this is a parameter of plain floats (8-bit floats have scales). A tensor that a parametrization computes
    anew in each pass is not a parameter: zeros written to it would be lost.

    >>> is_dense(nn.Parameter(torch.zeros(2))), is_dense(torch.zeros(2))
    (True, False)
    """
    if not isinstance(parameter, nn.Parameter) or is_lazy(parameter):
        return False
    return parameter.is_floating_point() and parameter.element_size() > 1


def zero_outside_mask(view: Tensor, mask: Tensor) -> None:
    """Set the weights of a view outside an (out, in) mask, on the same device, to exactly +0, in place.

    >>> weight = torch.tensor([[1.0, 2.0]])
    >>> zero_outside_mask(weight, torch.tensor([[True, False]])); weight
    tensor([[1., 0.]])
    """
    # As integers, since NaN times 0 is NaN; also several times as fast as masked_fill_.
    for values, kept in in_chunks(view.view(INTEGERS[view.element_size()]), mask.view(view.shape)):
        values.mul_(kept)


def in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding rows of tensors of one shape, about `CHUNK` elements at a time on a CPU; all at once on a GPU.

    >>> [tuple(chunk.shape) for (chunk,) in in_chunks(torch.zeros(3, CHUNK // 2))]
    [(2, 131072), (1, 131072)]
    """
    first = tensors[0]
    rows = len(first) if first.device.type != "cpu" else CHUNK * len(first) // max(1, first.numel())
    return zip(*(tensor.split(max(1, rows)) for tensor in tensors), strict=True)
