"""Compares the zeros of an exported file with those of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from sparsefit.errors import ExportError
from sparsefit.recovery.inspection import SavedMatrix

Array: TypeAlias = np.ndarray[Any, Any]


def check_zeros(pruned: Iterable[SavedMatrix], matrices: Iterable[Array], file: Path) -> tuple[int, int]:
    """Check that a file has every pruned matrix of a model, with the same number of zeros.

    Libraries rename, transpose and reorder matrices, so matrices are identified by their sorted shape and their zeros.

    >>> check_zeros([SavedMatrix("fc.weight", (2, 3), 6, 2)], [np.array([[0, 1], [2, 0], [3, 4]])], Path("x.onnx"))
    (2, 6)

    Args:
        pruned: The pruned matrices of the model, with their counted zeros.
        matrices: All matrices of the file.
        file: The file, for the message.

    Returns:
        Zeros and weights of the pruned matrices in the file.

    Raises:
        ExportError: if a matrix is missing, or has another number of zeros.
    """
    found = Counter(_identity(array.shape, array.size - int(np.count_nonzero(array))) for array in matrices)
    zeros = weights = 0
    for matrix in pruned:
        identity = _identity(matrix.shape, matrix.zeros)
        if not found[identity]:
            raise ExportError(
                f"{file} has no matrix with the {matrix.zeros:,} zeros of {matrix.name} {matrix.shape}: its pruned "
                "weights were not exported, so nothing was written"
            )
        found[identity] -= 1
        zeros, weights = zeros + matrix.zeros, weights + matrix.weights
    return zeros, weights


def _identity(shape: Iterable[int], zeros: int) -> tuple[tuple[int, ...], int]:
    return tuple(sorted(side for side in shape if side > 1)), zeros
