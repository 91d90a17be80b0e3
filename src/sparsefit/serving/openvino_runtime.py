"""OpenVINO on the CPU. It can keep sparse weights packed, but only 8-bit weights on CPUs with AMX."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sparsefit.pruning import MaskSet
from sparsefit.serving.decoders import Decoder
from sparsefit.serving.export_libraries import missing_for
from sparsefit.serving.exported_graphs import GraphDecoder, export_graph

NAME = "openvino"
_LEAST_SPARSITY = 0.4
"""The smallest share of zeros with which OpenVINO should keep a matrix packed."""


def why_not(model: nn.Module, masks: MaskSet) -> str:
    """The reason why it cannot run here; empty if it can."""
    if next(model.parameters()).device.type != "cpu":
        return "it runs only on the CPU: --device cpu"
    why = missing_for("openvino")
    return f"it needs {why}" if why else ""


def prepare(model: nn.Module, masks: MaskSet) -> Decoder:
    """The model as an OpenVINO graph, with packed weights if the CPU supports them."""
    settings = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": _LEAST_SPARSITY}
    return GraphDecoder(export_graph(model, "openvino"), torch.get_num_threads(), settings, _note(model))


def _note(model: nn.Module) -> str:
    """The remark that the measured weights are not packed."""
    reason = "" if _has_amx() else " and this CPU has no AMX"
    kind = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"OpenVINO packs sparse 8-bit weights on CPUs with AMX: these are {kind}{reason}, and run as dense ones"


def _has_amx() -> bool:
    try:
        return "amx_int8" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
