"""Frozen linear layers with 4-bit or 8-bit weights of bitsandbytes, for training adapters on them.

A state dict in floats can be loaded into them; it is quantized on loading.

They compute with the values that `sparsefit.quantized.dequantized` returns, for any shape, dtype and device. The layers
of bitsandbytes (0.50) do not: the CPU kernel gives wrong products for 4-bit weights if the width is not a multiple of
the blocksize; in evaluation mode on a CPU, 4-bit weights are rearranged and 8-bit layers round their inputs; the first
input decides the dtype of all products; biases are cast in place, and get no gradient from 3-D inputs.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from sparsefit.quantized import dequantized, matrix_shape, write_quantized

OUTLIERS = 6.0
"""Input columns with at least this magnitude are left out of the 8-bit product of LLM.int8() (Dettmers et al. 2022)."""


class _FrozenProduct(torch.autograd.Function):
    """x W^T. The backward pass dequantizes W again, so neither W nor x is saved for it."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, dequantized(layer).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, None]:
        return (grad @ dequantized(ctx.layer).to(grad.dtype) if ctx.needs_input_grad[0] else None), None


class FrozenLinear4bit(bnb.nn.Linear4bit):
    """A linear layer with a frozen NF4 weight (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

    Args:
        layer: The layer to replace: (out, in) weights of float32, bfloat16 or float16, and a bias or None.
        compute_dtype: The dtype of the products; None is autocast's, else that of the inputs.
        double_quant: Quantize the scales, too.
    """

    def __init__(self, layer: nn.Linear, compute_dtype: torch.dtype | None = None, double_quant: bool = False) -> None:
        super().__init__(
            layer.in_features, layer.out_features, False, compute_dtype, double_quant, "nf4", device="meta"
        )
        weight = bnb.nn.Params4bit(
            layer.weight.data, compress_statistics=double_quant, quant_type="nf4", module=self, requires_grad=False
        )
        self.weight = weight.to(layer.weight.device)  # this quantizes
        self.bias = layer.bias
        self.support_avx512bf16_for_cpu = False
        self.train(layer.training)
        self.register_load_state_dict_pre_hook(_take_floats)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias, for (..., in) inputs."""
        given = _given_dtype(x)
        inputs = x.to(self.compute_dtype or given)
        state = self.weight.quant_state or self.quant_state
        with torch.autocast(x.device.type, enabled=False):
            if x.device.type == "cpu" and self.in_features % state.blocksize:
                product = _FrozenProduct.apply(inputs, self)
            else:
                product = bnb.matmul_4bit(inputs, self.weight, quant_state=state)
        return _with_bias(product.to(given), self.bias)


class FrozenLinear8bit(bnb.nn.Linear8bitLt):
    """A linear layer with a frozen int8 weight (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339).

    On a CPU inputs stay in floats; on other devices inputs other than outliers are rounded to 8 bits, too.

    Args:
        layer: The layer to replace: (out, in) float weights, and a bias or None.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(
            layer.in_features, layer.out_features, False, has_fp16_weights=False, threshold=OUTLIERS, device="meta"
        )
        self.weight_dtype = layer.weight.dtype
        # `to` quantizes only weights that come from the CPU.
        weight = bnb.nn.Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        self.weight = weight.to(layer.weight.device)
        self.bias = layer.bias
        self.train(layer.training)
        self.register_load_state_dict_pre_hook(_take_floats)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias, for (..., in) inputs."""
        inputs = x.to(_given_dtype(x))
        with torch.autocast(x.device.type, enabled=False):
            product = _FrozenProduct.apply(inputs, self) if x.device.type == "cpu" else self._int8_product(inputs)
        return _with_bias(product.to(inputs.dtype), self.bias)

    def _int8_product(self, x: Tensor) -> Tensor:
        self.state.is_training = self.training
        if self.weight.CB is not None:
            self.init_8bit_state()
        return bnb.matmul(x, self.weight, state=self.state)


def _take_floats(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Quantize a float weight in a state dict before it is loaded."""
    weight = state_dict.get(f"{prefix}weight")
    if weight is not None and weight.is_floating_point() and tuple(weight.shape) == matrix_shape(layer):
        write_quantized(layer, weight)
        state_dict[f"{prefix}weight"] = layer.weight


def _given_dtype(x: Tensor) -> torch.dtype:
    """The output dtype of nn.Linear: autocast's, else that of the inputs."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _with_bias(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias.to(product.dtype)
