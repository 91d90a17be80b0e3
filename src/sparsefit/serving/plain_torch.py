"""Dense tensors in torch, for which zeros make no difference."""

from __future__ import annotations

from torch import nn

from sparsefit.pruning import MaskSet
from sparsefit.serving.decoders import Decoder, TorchDecoder

NAME = "torch"


def why_not(model: nn.Module, masks: MaskSet) -> str:
    """Always empty: torch runs everywhere."""
    return ""


def prepare(model: nn.Module, masks: MaskSet) -> Decoder:
    """The model, unchanged."""
    return TorchDecoder(model)
