"""Layers of bitsandbytes: weights in 4 or 8 bits, and weights that such a layer still holds as floats."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsefit import quantized as codes
from sparsefit.pruning.layers.base import PrunableWeight, is_dense


class QuantizedWeight(PrunableWeight):
    """The weight of a quantized layer: its matrix is a dequantized copy, and new values are quantized."""

    positions = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return codes.matrix_shape(self.layers[0])

    @property
    def device(self) -> torch.device:
        """The current device of the weights, from the layer, which may have replaced its parameter."""
        return self.layers[0].weight.device

    def matrix(self) -> Tensor:
        """The dequantized weights, a new (out, in) tensor."""
        return codes.dequantized(self.layers[0])

    held = matrix

    def apply_mask(self, mask: Tensor) -> None:
        """Write the code of zero outside an (out, in) mask."""
        codes.zero_outside(self.layers[0], mask)

    def set_values(self, matrix: Tensor) -> None:
        """Quantize new values, (out, in)."""
        codes.write_quantized(self.layers[0], matrix)

    def snapshot(self) -> Callable[[], None]:
        """Copy the weights; returns a function that restores them bit for bit."""
        return codes.snapshot(self.layers[0])


class CachedWeight(PrunableWeight):
    """The float weight of a Linear8bitLt (`has_fp16_weights`), which in evaluation mode quantizes it once and computes
    with that copy until it is reset."""

    def changed(self) -> None:
        """Discard the layer's quantized copy."""
        for layer in self.layers:
            if codes.bits_of(layer) == 8:  # another layer can share the weight
                layer.state.reset_grads()


def matrices(module: nn.Module) -> list[PrunableWeight]:
    """The weight of a Linear4bit or Linear8bitLt, quantized or as floats.

    >>> matrices(nn.Linear(3, 5))
    []
    """
    if codes.is_quantized(module):
        return [QuantizedWeight("weight", module.weight, (module,), called=True)]
    if codes.bits_of(module) and is_dense(module.weight) and module.weight.ndim == 2:
        return [CachedWeight("weight", module.weight, (module,), called=True)]
    return []
