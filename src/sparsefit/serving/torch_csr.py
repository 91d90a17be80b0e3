"""Linear layers in torch's compressed sparse rows (CSR), which store each kept weight's value and column."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from sparsefit.pruning import MaskSet
from sparsefit.serving.decoders import Decoder, TorchDecoder

NAME = "torch-csr"


class SparseRows(nn.Module):
    """A linear layer that stores its weight (out, in) in compressed sparse rows."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the format is in beta, and that invariants are not checked
            rows = layer.weight.detach().to_sparse_csr()
            # 32 bits are enough for the column numbers of any layer; torch uses 64 by default.
            index = rows.crow_indices().int(), rows.col_indices().int()
            self.register_buffer("weight", torch.sparse_csr_tensor(*index, rows.values(), rows.shape))
        self.bias = layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's product: (..., in) to (..., out)."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        out = (self.weight @ flat.t()).t().reshape(*inputs.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def why_not(model: nn.Module, masks: MaskSet) -> str:
    """The reason why it cannot run here; empty if it can."""
    if not _layers(model, masks):
        return "no pruned weight belongs to an nn.Linear"
    if next(model.parameters()).device.type == "cpu":
        if not torch.backends.mkl.is_available():
            return "this torch has no MKL, which multiplies sparse rows on the CPU"
        if next(model.parameters()).dtype != torch.float32:
            return "on the CPU sparse rows are multiplied only in float32: --dtype float32"
    return ""


def prepare(model: nn.Module, masks: MaskSet) -> Decoder:
    """The model with its pruned linear layers replaced."""
    for name in _layers(model, masks):
        outer, _, own = name.rpartition(".")
        setattr(model.get_submodule(outer), own, SparseRows(model.get_submodule(name)))
    return TorchDecoder(model)


def _layers(model: nn.Module, masks: MaskSet) -> list[str]:
    """The names of the linear layers whose weights have masks."""
    layers = {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
    return [name for mask in masks if (name := mask.removesuffix(".weight")) in layers]
