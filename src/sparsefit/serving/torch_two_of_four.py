"""2:4 pruned linear layers as torch's semi-structured tensors, which GPUs multiply up to twice as fast."""

from __future__ import annotations

from torch import nn

from sparsefit.bare_model import base_modules
from sparsefit.errors import ConfigError
from sparsefit.pruning import MaskSet
from sparsefit.recovery.semi_structured import backend_of, to_semi_structured, why_dense
from sparsefit.serving.decoders import Decoder, TorchDecoder

NAME = "torch-2:4"


def why_not(model: nn.Module, masks: MaskSet) -> str:
    """The reason why it cannot run here; empty if it can."""
    layers = base_modules(model)
    reasons = {name: why_dense(name, layers.get(name.removesuffix(".weight")), masks) for name in masks}
    if not reasons:
        return "nothing is pruned"
    if all(reasons.values()):
        return next(iter(reasons.values()))
    return backend_of(next(model.parameters()).device)[1]


def prepare(model: nn.Module, masks: MaskSet) -> Decoder:
    """The model with its 2:4 layers converted.

    Raises:
        ConfigError: if no layer can be converted.
    """
    report = to_semi_structured(model, masks)
    reason = next(iter(report.dense.values()), "")
    if not report.converted:
        raise ConfigError(f"no layer could be converted: {reason}")
    count = len(report.converted) + len(report.dense)
    note = (
        f"{NAME}: {len(report.dense)} of {count} pruned weights stay dense, the first because {reason}"
        if reason
        else ""
    )
    return TorchDecoder(model, note)
