"""LoRA that preserves sparsity: W + s * M (.) (B A), where M is the mask of W.

MaskLoRA of Zimmer et al. 2023, "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs" (arXiv 2312.15230). The
update changes only kept weights, so it merges into the sparse base without loss. The layers are PEFT's LoRA layers with
another product; configuration, names and files of an adapter are PEFT's.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from sparsefit.errors import ConfigError, MaskError
from sparsefit.pruning.layers.base import as_matrix, zero_outside_mask
from sparsefit.pruning.masks import pack_bits, unpack_bits
from sparsefit.quantized import dequantized, is_quantized


def masked_sum(base: Tensor | None, a: Tensor, b: Tensor, scale: float, bits: Tensor) -> Tensor:
    """M (.) (W + s * B A): the effective weight of a masked adapter on a weight that is zero outside its mask.

    Args:
        base: W, (out, in), zero outside the mask; None counts as zeros.
        a: A, (r, in).
        b: B, (out, r).
        scale: s.
        bits: M, (out, in), packed by `pack_bits`.

    Returns:
        (out, in) in the dtype of W, computed in the dtype of the adapter and rounded once.
    """
    changed = torch.mm(b, a).mul_(scale) if base is None else torch.addmm(base.to(a.dtype), b, a, alpha=scale)
    zero_outside_mask(changed, unpack_bits(bits, changed.shape, changed.device))
    return changed if base is None else changed.to(base.dtype)


class _MaskedProduct(torch.autograd.Function):
    """x (M (.) (W + s B A))^T. The backward pass recomputes the sum, so no (out, in) matrix is saved for it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        bits: Tensor,
        layer: nn.Module | None,
    ) -> Tensor:
        ctx.scale, ctx.layer = scale, layer
        ctx.save_for_backward(x, weight, a, b, bits)
        return nn.functional.linear(x, _sum_of(ctx, weight, a, b, bits).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, bits = ctx.saved_tensors
        grad_x = grad_weight = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _sum_of(ctx, weight, a, b, bits).to(grad.dtype)
        if any(ctx.needs_input_grad[1:4]):
            whole = grad.reshape(-1, len(b)).t() @ x.reshape(-1, a.shape[1])  # (out, in)
            zero_outside_mask(whole, unpack_bits(bits, whole.shape, whole.device))
            grad_weight = whole.to(weight.dtype) if ctx.needs_input_grad[1] else None
            whole = whole.to(a.dtype)
            grad_a = torch.mm(b.t(), whole).mul_(ctx.scale)
            grad_b = torch.mm(whole, a.t()).mul_(ctx.scale)
        return grad_x, grad_weight, grad_a, grad_b, None, None, None


def _sum_of(ctx: FunctionCtx, weight: Tensor | None, a: Tensor, b: Tensor, bits: Tensor) -> Tensor:
    base = weight if ctx.layer is None else dequantized(ctx.layer)
    return masked_sum(base, a, b, ctx.scale, bits)


class MaskedLoraLinear(LoraLinear):
    """A LoRA layer whose update is restricted to the mask of its weight; plain LoRA until a mask is set.

    Dropout acts on the inputs of the update during training, as in LoRA.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **settings: Any) -> None:
        super().__init__(base_layer, adapter_name, **settings)
        # One configuration serves both kinds of layers if a model has both.
        self.fan_in_fan_out = self.is_target_conv_1d_layer
        # Not in checkpoints, as the masks are saved separately, by name.
        self.register_buffer("mask_bits", None, persistent=False)

    def take_mask(self, mask: Tensor | None) -> None:
        """Restrict updates to an (out, in) bool mask; None removes the restriction.

        Raises:
            MaskError: if the mask has another shape than the weight.
        """
        layer = self.get_base_layer()
        if mask is not None and tuple(mask.shape) != (self.out_features, self.in_features):
            raise MaskError(
                f"a mask of shape {tuple(mask.shape)} does not fit an adapter on a weight of shape "
                f"{(self.out_features, self.in_features)}: it belongs to another model"
            )
        self.mask_bits = None if mask is None else pack_bits(mask).to(layer.weight.device)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's `merge`, but rounded once, as in the forward pass; PEFT rounds both the update and the sum."""
        layer = self.get_base_layer()
        if self.mask_bits is None or is_quantized(layer) or any(self.lora_bias.values()):
            super().merge(safe_merge, adapter_names)
            return
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                weight = as_matrix(layer.weight.data, self.fan_in_fan_out)
                a, b = self.lora_A[name].weight, self.lora_B[name].weight
                merged = masked_sum(weight, a, b, self.scaling[name], self.mask_bits)
                if safe_merge and not bool(merged.isfinite().all()):
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                weight.copy_(merged)
                self.merged_adapters.append(name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update in the layout of the weight; PEFT's `unmerge` subtracts it."""
        delta = super().get_delta_weight(adapter)
        if self.mask_bits is not None:
            matrix = as_matrix(delta, self.fan_in_fan_out)
            zero_outside_mask(matrix, unpack_bits(self.mask_bits, tuple(matrix.shape), matrix.device))
        return delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x W'^T + bias, for (..., in) inputs."""
        if self.mask_bits is None or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                "a masked adapter cannot serve batches that mix adapters: run each adapter's samples apart"
            )
        layer = self.get_base_layer()
        dtype = _compute_dtype(x, layer)
        names = [name for name in self.active_adapters if name in self.lora_A]
        fused = [name for name in names if not (self.training and isinstance(self.lora_dropout[name], nn.Dropout))][:1]
        inputs = x.to(dtype)
        result = self._product(fused[0], inputs, with_base=True) if fused else layer(x, *args)
        for name in names:
            if name not in fused:
                result = result + self._product(name, self.lora_dropout[name](inputs), with_base=False).to(result.dtype)
        return result if not fused or layer.bias is None else result + layer.bias.to(result.dtype)

    def _product(self, adapter: str, x: Tensor, with_base: bool) -> Tensor:
        layer = self.get_base_layer()
        quantized = layer if with_base and is_quantized(layer) else None
        weight = as_matrix(layer.weight, self.fan_in_fan_out) if with_base and quantized is None else None
        a, b, scale = self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter]
        with torch.autocast(x.device.type, enabled=False):
            return _MaskedProduct.apply(x, weight, a, b, scale, self.mask_bits, quantized)


class MaskedLoraConv1D(MaskedLoraLinear):
    """`MaskedLoraLinear` for GPT-2's Conv1D, which stores its matrix as (in, out)."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **settings: Any) -> None:
        super().__init__(base_layer, adapter_name, is_target_conv_1d_layer=True, **settings)


def _compute_dtype(x: Tensor, layer: nn.Module) -> torch.dtype:
    """The dtype of the product: autocast's, else that of the inputs."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
