"""ONNX Runtime on the CPU: a fast dense runtime for comparison, as it does not use zeros."""

from __future__ import annotations

import torch
from torch import nn

from sparsefit.pruning import MaskSet
from sparsefit.serving.decoders import Decoder
from sparsefit.serving.export_libraries import missing_for
from sparsefit.serving.exported_graphs import GraphDecoder, export_graph

NAME = "onnxruntime"


def why_not(model: nn.Module, masks: MaskSet) -> str:
    """The reason why it cannot run here; empty if it can."""
    weight = next(model.parameters())
    if weight.device.type != "cpu":
        return "it is measured only on the CPU: --device cpu"
    if weight.dtype == torch.bfloat16:
        return "on the CPU it cannot multiply in bfloat16: --dtype float32"
    why = missing_for("onnx")
    return f"it needs {why}" if why else ""


def prepare(model: nn.Module, masks: MaskSet) -> Decoder:
    """The model as an ONNX graph with ONNX Runtime's own operators for attention and norms."""
    return GraphDecoder(export_graph(model, "onnx", fused=True), torch.get_num_threads())
