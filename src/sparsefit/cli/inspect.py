"""`sparsefit inspect FOLDER`: the true sparsity of a saved model."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsefit.recovery.inspection import inspect_folder
from sparsefit.reporting.console import console, summary


def inspect(arguments: list[str]) -> int:
    """Print the zeros counted on the files of a model, and whether its masks hold; 1 if they do not."""
    parser = argparse.ArgumentParser(
        "sparsefit inspect", description="Count the zeros of a saved model and check them against its masks."
    )
    parser.add_argument("folder", type=Path, help="a run folder, or a model folder in Hugging Face layout")
    folder = parser.parse_args(arguments).folder

    inspection = inspect_folder(folder)
    status = f"counted on {', '.join(str(file) for file in inspection.files)}"
    console.print(summary({"name": str(folder), "status": status, "sparsity": inspection.account()}))
    if inspection.masks is None:
        console.print("There are no masks beside the model to check it against.")
        return 0
    for name, count in inspection.broken.items():
        console.print(f"{name}: {count} weights that its mask prunes are not zero", markup=False)
    if inspection.broken:
        console.print(f"{len(inspection.broken)} of {len(inspection.masks)} masks do not hold.")
        return 1
    console.print(f"All {len(inspection.masks)} masks hold: every weight that they prune is exactly zero.")
    return 0
