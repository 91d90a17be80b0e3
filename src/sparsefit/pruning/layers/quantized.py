"""Layers of bitsandbytes: weights in 4 or 8 bits, and weights that such a layer still holds as floats."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsefit.pruning.layers.base import PrunableWeight, is_dense
from sparsefit.quantized import (
    bits_of,
    dequantized,
    is_quantized,
    matrix_shape,
    snapshot,
    write_quantized,
    zero_outside,
)


class QuantizedWeight(PrunableWeight):
    """The weight of a quantized layer: its matrix is a dequantized copy, and new values are quantized."""

    positions = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return matrix_shape(self.layers[0])

    @property
    def device(self) -> torch.device:
        """The current device of the weights, from the layer, which may have replaced its parameter."""
        return self.layers[0].weight.device

    def matrix(self) -> Tensor:
        """The dequantized weights, a new (out, in) tensor."""
        return dequantized(self.layers[0])

    held = matrix

    def apply_mask(self, mask: Tensor) -> None:
        """Write the code of zero outside an (out, in) mask."""
        zero_outside(self.layers[0], mask)

    def set_values(self, matrix: Tensor) -> None:
        """Quantize new values, (out, in)."""
        write_quantized(self.layers[0], matrix)

    def snapshot(self) -> Callable[[], None]:
        """Copy the weights; returns a function that restores them bit for bit."""
        return snapshot(self.layers[0])


class CachedWeight(PrunableWeight):
    """The float weight of a Linear8bitLt (`has_fp16_weights`), which in evaluation mode quantizes it once and computes
    with that copy until it is reset."""

    def changed(self) -> None:
        """Discard the layer's quantized copy."""
        for layer in self.layers:
            if bits_of(layer) == 8:  # another layer can share the weight
                layer.state.reset_grads()


def matrices(module: nn.Module) -> list[PrunableWeight]:
    """The weight of a Linear4bit or Linear8bitLt, quantized or as floats.

    >>> matrices(nn.Linear(3, 5))
    []
    """
    if is_quantized(module):
        return [QuantizedWeight("weight", module.weight, (module,), called=True)]
    if bits_of(module) and is_dense(module.weight) and module.weight.ndim == 2:
        return [CachedWeight("weight", module.weight, (module,), called=True)]
    return []
