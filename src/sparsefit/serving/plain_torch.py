"""Dense tensors in torch, in which a zero is a number like any other."""

from __future__ import annotations

from torch import nn

from sparsefit.pruning import MaskSet
from sparsefit.serving.decoders import Decoder, TorchDecoder

NAME = "torch"


def why_not(model: nn.Module, masks: MaskSet) -> str:
    """It can always run."""
    return ""


def prepare(model: nn.Module, masks: MaskSet) -> Decoder:
    """The model as it is."""
    return TorchDecoder(model)
