"""Records the products that convolutions and recurrent layers report for their weights."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

from sparsefit.pruning.layers import convolution, recurrent


class Watched(TorchFunctionMode):
    """Keeps the reported products while it is active."""

    def __init__(self, *parameters, change=None):
        super().__init__()
        self.parameters, self.change, self.seen = list(parameters), change, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        handler = (convolution.PRODUCTS | recurrent.PRODUCTS).get(function)
        if handler is None:
            return function(*args, **(kwargs or {}))
        return handler(function, args, kwargs or {}, self)

    def holds(self, tensor):
        return self.whole(tensor) is not None

    def whole(self, view):
        storage = view.untyped_storage().data_ptr()
        return next((own for own in self.parameters if own.untyped_storage().data_ptr() == storage), None)

    def __call__(self, weight, inputs, tokens=None, key=None):
        hash(key)
        whole = self.whole(weight)
        if whole is None:
            return
        first = weight.storage_offset() // weight.stride(0)
        rows = None if len(weight) == len(whole) else slice(first, first + len(weight))
        pieces = list(tokens()) if tokens else [inputs.detach().flatten(0, -2)]
        assert not any(piece.requires_grad for piece in pieces)
        self.seen.append((whole, inputs, rows, key, pieces))
        if self.change:
            self.change(whole)

    def tokens_of(self, weight):
        return [torch.cat(pieces) for seen, _, _, _, pieces in self.seen if seen is weight]


def watched(module, *args):
    """The output of a watched module, which must equal the unwatched one, and the reported products."""
    expected = module(*args)
    with Watched(*(weight.parameter for kind in (convolution, recurrent) for weight in kind.matrices(module))) as mode:
        output = module(*args)
    for one, other in zip(tensors_in(output), tensors_in(expected), strict=True):
        assert torch.equal(one, other)
    return output, mode


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value if part is not None for tensor in tensors_in(part)]
