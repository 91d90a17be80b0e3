"""`sparsefit export FOLDER --output OUT --format gguf` writes a pruned model in a format that other programs read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsefit.cli.input_errors import Parser
from sparsefit.cli.library_output import silence_libraries
from sparsefit.cli.merge import copy_other_files
from sparsefit.errors import ConfigError, RunFolderError
from sparsefit.files import check_sums, replacing
from sparsefit.recovery.inspection import (
    MODEL_FOLDER,
    SavedMatrix,
    check_finite_folder,
    inspect_folder,
    weight_files,
)
from sparsefit.recovery.run_files import check_ended
from sparsefit.reporting.console import console
from sparsefit.serving.export_libraries import LIBRARIES, check_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GGUF_FILE = "model.gguf"


@dataclass(frozen=True)
class Exported:
    """Results of checking an exported file.

    Args:
        zeros: Zeros counted in its pruned matrices.
        weights: All weights in these matrices.
        difference: The largest difference of a logit, as a share of the largest logit.
    """

    zeros: int
    weights: int
    difference: float


def export(arguments: list[str]) -> int:
    """Write a model in another format, count the zeros of the file and compare its logits with the model's."""
    parser = Parser(
        "sparsefit export",
        description="Write a pruned model in a format that other programs read, with that format's own library. The "
        "file is loaded again, its zeros are counted, and its logits are compared with the model's.",
    )
    parser.add_argument("folder", type=Path, help="a run folder, or a model folder in Hugging Face layout")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write, new or empty")
    parser.add_argument("--format", choices=tuple(LIBRARIES), required=True, help="the format to write")
    given = parser.parse_args(arguments)
    output = given.output.absolute()

    check_ended(given.folder)
    source = weight_files(given.folder)[0].parent
    check_finite_folder(given.folder)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise RunFolderError(f"{output} exists and is not an empty folder: give another name, or remove it first")
    check_sums(source)
    check_libraries(given.format)
    silence_libraries()
    pruned = inspect_folder(given.folder).pruned
    from sparsefit.modules.loading import load_model

    model = load_model(str(source), dtype="auto", allow_unused=True)
    if str(model.dtype) == "torch.float64":
        raise ConfigError("a model in float64 is not exported: save it in float32 first")
    write = _write_gguf if given.format == "gguf" else _write_graph
    with replacing(output) as folder:
        found = write(model, source, folder, given.format, pruned)
        copy_other_files(source, folder)
    _print_results(given.folder, output, found)
    return 0


def _write_gguf(model: PreTrainedModel, source: Path, folder: Path, kind: str, pruned: list[SavedMatrix]) -> Exported:
    from sparsefit.modules.loading import load_model
    from sparsefit.serving.decoders import TorchDecoder
    from sparsefit.serving.gguf_file import matrices_in, write_gguf
    from sparsefit.serving.logit_checks import check_difference, decoder_difference
    from sparsefit.serving.zero_checks import check_zeros

    file = folder / GGUF_FILE
    write_gguf(model, source, file)
    zeros, weights = check_zeros(pruned, matrices_in(file), file)
    # Both in float32, so that the difference is not rounding.
    found = decoder_difference(model.float(), TorchDecoder(load_model(str(file))))
    check_difference(found, str(file))
    return Exported(zeros, weights, found)


def _write_graph(model: PreTrainedModel, source: Path, folder: Path, kind: str, pruned: list[SavedMatrix]) -> Exported:
    import torch

    from sparsefit.serving.exported_graphs import EXACT, GraphDecoder, export_graph, load_graph, weights_of
    from sparsefit.serving.logit_checks import check_difference, decoder_difference, graph_difference
    from sparsefit.serving.zero_checks import check_zeros

    if kind == "onnx" and model.dtype != torch.float32:
        # On the CPU, ONNX Runtime cannot multiply in bfloat16, and its float16 products are rounded.
        console.print(f"the ONNX file is written in float32: the model is {model.dtype}", markup=False, soft_wrap=True)
        model = model.float()
    graph = export_graph(model, kind)
    graph.exported.save_pretrained(folder)
    loaded = load_graph(folder, graph)
    zeros, weights = check_zeros(pruned, weights_of(loaded.exported), folder)
    model = model.float()  # both in float32, so that the difference is not rounding
    if graph.generates:
        found = decoder_difference(model, GraphDecoder(loaded, torch.get_num_threads(), EXACT))
    else:
        found = graph_difference(model, loaded)
    check_difference(found, str(folder))
    return Exported(zeros, weights, found)


def _print_results(source: Path, output: Path, found: Exported) -> None:
    size = sum(file.stat().st_size for file in output.iterdir() if file.suffix in (".gguf", ".data", ".bin"))
    lines = [
        f"{source}: written to {output}, {size:,} bytes of weights",
        f"zeros: {found.zeros:,} of {found.weights:,} pruned weights, counted in the file",
        f"logits: largest difference {found.difference:.1e} of the largest logit",
    ]
    adapter = source / "adapter"
    if adapter.is_dir() and not (source / MODEL_FOLDER).is_dir():
        lines.append(
            f"The adapter in {adapter} is not included: this is the base. `sparsefit merge` makes one model of both."
        )
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
