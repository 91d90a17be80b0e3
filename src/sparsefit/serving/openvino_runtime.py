"""OpenVINO on the CPU, which may unpack sparse weights as it multiplies them: 8-bit ones, on CPUs with AMX."""

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
"""The share of zeros from which on OpenVINO is asked to hold a matrix packed."""


def why_not(model: nn.Module, masks: MaskSet) -> str:
    """Why it cannot run a model; the empty string if it can."""
    if next(model.parameters()).device.type != "cpu":
        return "it runs on the CPU: --device cpu"
    why = missing_for("openvino")
    return f"it needs {why}" if why else ""


def prepare(model: nn.Module, masks: MaskSet) -> Decoder:
    """The model as an OpenVINO graph, with packed weights where the CPU has them."""
    settings = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": _LEAST_SPARSITY}
    return GraphDecoder(export_graph(model, "openvino"), torch.get_num_threads(), settings, _note(model))


def _note(model: nn.Module) -> str:
    """Why packed weights are not what is measured."""
    why = "" if _has_amx() else " and this CPU has no AMX"
    kind = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"OpenVINO packs sparse weights of 8 bits, on CPUs with AMX: these are {kind}{why}, and run as dense ones"


def _has_amx() -> bool:
    try:
        return "amx_int8" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
