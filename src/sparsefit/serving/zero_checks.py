"""Zeros counted in an exported file, against those of the model that it was made from."""

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
    """See that every pruned matrix of a model is in a file, with as many zeros.

    Libraries rename, transpose and reorder matrices, so a matrix is known again by its sorted shape and its zeros.

    >>> check_zeros([SavedMatrix("fc.weight", (2, 3), 6, 2)], [np.array([[0, 1], [2, 0], [3, 4]])], Path("x.onnx"))
    (2, 6)

    Args:
        pruned: The pruned matrices of the model, counted.
        matrices: All matrices of the file.
        file: The file, for the message.

    Returns:
        Zeros and weights of the pruned matrices, as the file has them.

    Raises:
        ExportError: if one is missing, or has other zeros.
    """
    found = Counter(_known(array.shape, array.size - int(np.count_nonzero(array))) for array in matrices)
    zeros = weights = 0
    for matrix in pruned:
        known = _known(matrix.shape, matrix.zeros)
        if not found[known]:
            raise ExportError(
                f"{file} holds no matrix with the {matrix.zeros:,} zeros of {matrix.name} {matrix.shape}: its pruned "
                "weights did not get there, so nothing was written"
            )
        found[known] -= 1
        zeros, weights = zeros + matrix.zeros, weights + matrix.weights
    return zeros, weights


def _known(shape: Iterable[int], zeros: int) -> tuple[tuple[int, ...], int]:
    return tuple(sorted(side for side in shape if side > 1)), zeros
