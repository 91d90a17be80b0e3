"""`sparsefit inspect FOLDER` counts the zeros of a saved model."""

from __future__ import annotations

from pathlib import Path

from sparsefit.cli.input_errors import Parser
from sparsefit.recovery.inspection import Inspection, inspect_tensors
from sparsefit.reporting.console import console, summary
from sparsefit.saved_models import inspect_whole


def inspect(arguments: list[str]) -> int:
    """Print the zeros in a model's files and whether its masks hold; return 1 if they do not, or if a weight is NaN."""
    parser = Parser(
        "sparsefit inspect", description="Count the zeros of a saved model and check them against its masks."
    )
    parser.add_argument(
        "folder", type=Path, help="a run folder, a model folder in Hugging Face layout, or a .gguf file"
    )
    folder = parser.parse_args(arguments).folder

    is_gguf = folder.suffix.lower() == ".gguf" and not folder.is_dir()
    inspection = _inspect_gguf(folder) if is_gguf else inspect_whole(folder)
    status = f"counted in {', '.join(str(file) for file in inspection.files)}"
    console.print(summary({"name": str(folder), "status": status, "sparsity": inspection.account()}))
    for name, count in inspection.nonfinite.items():
        console.print(f"{name}: {count:,} numbers are NaN or infinite", markup=False)
    if inspection.masks is None:
        console.print("The folder has no masks to check the model against.")
        return 1 if inspection.nonfinite else 0
    for name, count in inspection.broken.items():
        console.print(f"{name}: {count} weights that its mask prunes are not zero", markup=False)
    if inspection.broken:
        console.print(f"{len(inspection.broken)} of {len(inspection.masks)} masks do not hold.")
        return 1
    console.print(f"All {len(inspection.masks)} masks hold: every weight that they prune is exactly zero.")
    return 1 if inspection.nonfinite else 0


def _inspect_gguf(file: Path) -> Inspection:
    from sparsefit.cli.library_output import silence_libraries
    from sparsefit.modules.loading import load_model

    silence_libraries()
    return inspect_tensors(dict(load_model(str(file)).named_parameters()), file)
