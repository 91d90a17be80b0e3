"""How important each weight is. One short function for each score; a larger score is kept first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


def magnitude_score(weight: Tensor, statistic: Tensor | None = None) -> Tensor:
    """|W|: the magnitude of each weight (Han et al. 2015, arXiv 1506.02626).

    Args:
        weight: (out, in), any floating dtype.
        statistic: not used.

    Returns:
        (out, in) in float32.
    """
    return weight.float().abs()


def wanda_score(weight: Tensor, statistic: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2 (Sun et al. 2023, arXiv 2306.11695, Equation 1).

    Args:
        weight: (out, in), any floating dtype; the score is computed in float32.
        statistic: (in,) squared l2 norm of each input feature over all calibration tokens, float32.
            A constant factor changes no mask.

    Returns:
        (out, in) in float32.
    """
    return weight.float().abs() * statistic.sqrt()


class Score(NamedTuple):
    """A score and what it needs."""

    function: Callable[[Tensor, Tensor], Tensor]
    granularity: str  # what its authors compare by
    needs_inputs: bool


SCORES: dict[str, Score] = {
    "wanda": Score(wanda_score, granularity="output", needs_inputs=True),
    "magnitude": Score(magnitude_score, granularity="layer", needs_inputs=False),
}
