"""ONNX and OpenVINO IR with transformers' exporters, which trace a model and convert the trace.

A language model becomes one graph that reads a prompt into an empty cache and further tokens into a filled one. In
ONNX the cache is an input and an output of the graph; an OpenVINO graph keeps it as its state.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsefit.errors import ConfigError
from sparsefit.serving.zero_checks import Array

if TYPE_CHECKING:
    from openvino import Core
    from transformers import PreTrainedModel
    from transformers.exporters import ExportedModel
    from transformers.exporters.runners import ModelRunner


EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
"""OpenVINO's settings to compute in float32, whatever the dtype of the weights."""


@dataclass(frozen=True)
class Graph:
    """A model as a graph of another library.

    Attributes:
        exported: transformers' object for the graph, which can save and run it.
        sample: The inputs with which it was traced.
        generates: Whether it is a language model with a cache.
    """

    exported: ExportedModel
    sample: dict[str, Any]
    generates: bool

    @property
    def kind(self) -> str:
        """The format: "onnx" or "openvino"."""
        return str(self.exported.export_format)


def export_graph(model: PreTrainedModel, kind: str, fused: bool = False) -> Graph:
    """Trace a model and convert the trace.

    Args:
        model: A decoder, or a classifier of images or texts, in evaluation mode on the CPU.
        kind: "onnx" or "openvino".
        fused: Whether an ONNX graph may have ONNX Runtime's own operators, which are faster.

    Raises:
        ConfigError: if the model takes other inputs, or cannot be traced.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter, OpenVINOConfig, OpenVINOExporter
    from transformers.exporters.utils import decompose_for_generation

    sample = sample_inputs(model)
    generates = model.can_generate()
    with _silenced():
        try:
            traced: Any = model
            if generates:
                parts = decompose_for_generation(model, sample, multi_token_decode=True)
                traced, sample = parts["decode"]
            if kind == "onnx":
                config = OnnxConfig(dynamic=True, ort_fusions="cpu" if fused else None)
                exported = OnnxExporter().export(traced, copy.deepcopy(sample), config)
                for component in exported.components.values():
                    _clear_metadata(component.program)
                return Graph(exported, sample, generates)
            config = OpenVINOConfig(dynamic=True)
            return Graph(OpenVINOExporter().export(traced, copy.deepcopy(sample), config), sample, generates)
        except Exception as error:  # the error depends on the model
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"a {type(model).__name__} cannot be exported to {kind} by the installed libraries: {reason}"
            ) from error


def _clear_metadata(model: Any) -> None:
    """Remove from an ONNX model the stack traces of tracing, which contain local paths."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()


def sample_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Small inputs for a model; one sequence is padded, so that the padding mask is traced, too.

    Raises:
        ConfigError: if it does not take tokens or images, has an encoder and a decoder, or has no head.
    """
    config = model.config
    main = model.main_input_name
    if getattr(config, "is_encoder_decoder", False) or main not in ("input_ids", "pixel_values"):
        raise ConfigError(
            f"a {type(model).__name__} cannot be exported to ONNX or OpenVINO, only decoders and classifiers of images "
            "and texts"
        )
    if model.base_model is model and not model.can_generate():
        raise ConfigError(
            f"a {type(model).__name__} has no head and so no logits, with which an export is checked: export the "
            "classifier that was built on it"
        )
    if main == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        return {main: torch.randn(2, getattr(config, "num_channels", 3), height, width)}
    ids = torch.arange(12).view(2, 6) % config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    return {main: ids, "attention_mask": mask}


class GraphDecoder:
    """An exported language model in its own runtime.

    Args:
        graph: A graph of `export_graph` with `generates`.
        threads: CPU threads.
        settings: Further properties of OpenVINO's compilation.
        note: A remark on its measurements.

    Raises:
        ConfigError: if the graph has no cache.
    """

    def __init__(self, graph: Graph, threads: int, settings: dict[str, Any] | None = None, note: str = "") -> None:
        self.note = note
        if "past_key_values" not in graph.sample:
            raise ConfigError("the exported graph takes no cache (past_key_values), so it cannot continue a prompt")
        self._kind = graph.kind
        self._layers = graph.sample["past_key_values"]
        self.weight_bytes = sum(array.nbytes for array in weights_of(graph.exported))
        if self._kind == "openvino":
            precision = {"float16": "f16", "bfloat16": "bf16"}.get(str(graph.exported.dtype).split(".")[1], "f32")
            config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision} | (settings or {})
            self._request = _openvino_runner(graph, config).request
        else:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            graph.exported.to("cpu", session_options=options)
        self._exported = graph.exported
        self._cache: Any = None
        self._read = 0

    def start(self, ids: Tensor) -> Tensor:
        """See `Decoder`."""
        self._read = 0
        if self._kind == "openvino":
            self._request.reset_state()
        else:
            self._cache = _emptied(self._layers, len(ids))
        return self.step(ids)

    def step(self, token: Tensor) -> Tensor:
        """See `Decoder`."""
        batch, count = token.shape
        positions = torch.arange(self._read, self._read + count).expand(batch, count)
        self._read += count
        feed = {
            "input_ids": token,
            "attention_mask": torch.ones(batch, self._read, dtype=torch.long),
            "position_ids": positions,
        }
        if self._kind == "openvino":
            feed["beam_idx"] = torch.arange(batch, dtype=torch.int32)
            taken = {name for port in self._request.model_inputs for name in port.get_names()}
            arrays = {name: value.numpy() for name, value in feed.items() if name in taken}
            return torch.from_numpy(self._request.infer(arrays, share_inputs=True)["logits"])
        out = self._exported(**feed, past_key_values=self._cache)
        self._cache = out.past_key_values
        return out.logits


def sample_logits(graph: Graph) -> Tensor:
    """Logits of a graph for its traced inputs; OpenVINO computes them in float32."""
    run = _openvino_runner(graph, EXACT) if graph.kind == "openvino" else graph.exported
    return run(**graph.sample).logits


def _openvino_runner(graph: Graph, config: dict[str, Any]) -> ModelRunner:
    from transformers.exporters.runners import OpenVINOModelRunner

    (component,) = graph.exported.components.values()
    settings = {"PERFORMANCE_HINT": "LATENCY"} | config
    return OpenVINOModelRunner(_core().compile_model(component.program, "CPU", settings), component.metadata)


@functools.cache
def _core() -> Core:
    """The only OpenVINO `Core` of this process.

    Each `Core` sets a stack for signal handlers and, when it is deleted, restores the stack of the previous `Core`,
    which may already be freed: the next signal (such as the end of a subprocess) then crashes the process. transformers
    creates a `Core` for each model that it runs, so models are compiled here instead.
    """
    import openvino

    return openvino.Core()


def _emptied(cache: Any, batch: int) -> Any:
    """An empty cache of the same form."""
    empty = copy.deepcopy(cache)
    for layer in empty.layers:
        layer.keys = layer.keys.new_zeros(batch, layer.keys.shape[1], 0, layer.keys.shape[3])
        layer.values = layer.values.new_zeros(batch, layer.values.shape[1], 0, layer.values.shape[3])
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = 0
    return empty


def weights_of(exported: ExportedModel) -> Iterator[Array]:
    """The constants of a graph with at least two dimensions: its matrices, and precomputed tables."""
    for component in exported.components.values():
        if str(exported.export_format) == "onnx":
            values = component.program.graph.initializers.values()
            tensors = (value.const_value.numpy() for value in values if value.const_value is not None)
        else:
            constants = (one for one in component.program.get_ops() if one.get_type_name() == "Constant")
            tensors = (one.get_data() for one in constants if len(one.get_output_shape(0)) > 1)
        yield from (tensor for tensor in tensors if tensor.ndim > 1)


def load_graph(folder: Path, like: Graph) -> Graph:
    """Load a saved graph with its library; `like` is the graph that was saved."""
    from transformers.exporters import ExportedComponent, ExportedModel, OpenVINOExporter

    with _silenced():
        if like.kind == "onnx":
            exported = ExportedModel.from_pretrained(folder, device="cpu", local_files_only=True)
        else:  # from_pretrained would also compile the graph, with another Core: see _core
            ((name, component),) = like.exported.components.items()
            file = folder / f"{OpenVINOExporter.program_prefix}{name}{OpenVINOExporter.program_suffix}"
            read = ExportedComponent(_core().read_model(file), component.metadata)
            exported = ExportedModel({name: read}, like.kind)
    return Graph(exported, like.sample, like.generates)


@contextmanager
def _silenced() -> Iterator[None]:
    """Silence the exporters' messages about versions, unneeded libraries and progress."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # their loggers have no common parent
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
