"""Checks a saved model for damage before it is inspected, converted or pushed."""

from __future__ import annotations

from pathlib import Path

from sparsefit.errors import RunFolderError
from sparsefit.files import check_sums
from sparsefit.recovery.inspection import Inspection, inspect_folder
from sparsefit.recovery.run_files import check_ended, damaged_files, holds_run


def inspect_whole(folder: Path) -> Inspection:
    """Inspect a saved model as `inspect_folder` does, after a check that its files are what was written.

    Args:
        folder: A run folder, or a folder with a model.

    Raises:
        RunFolderError: if there is no model, its run is in progress, or a file is damaged or was changed.
        MaskError: if the mask file is damaged, or its masks do not fit the model.
    """
    check_ended(folder)
    inspection = inspect_folder(folder)
    check_sums(folder)
    if damaged := damaged_files(folder) if holds_run(folder) else {}:
        listed = "; ".join(f"{folder / name}: {reason}" for name, reason in damaged.items())
        raise RunFolderError(
            f"damaged, or changed since the run wrote it: {listed}. Copy it again from an undamaged copy"
        )
    return inspection
