"""How important each weight is. One short function for each score; a larger score is kept first.

Each takes an (out, in) weight of any floating dtype and the statistics of the inputs that it needs, and returns
(out, in) scores in float32, or the two factors whose `Products` they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefit.errors import ConfigError
from sparsefit.pruning.statistics import DERIVED, KINDS, all_finite


class Products(NamedTuple):
    """The scores |W_ij| * f_j in float32, kept as two factors and computed only when they are compared.

    >>> Products(torch.tensor([[1.0, -3.0]]), torch.tensor([4.0, 1.0])).scores()
    tensor([[4., 3.]])
    """

    weight: Tensor  # (out, in), any floating dtype
    factor: Tensor | None = None  # (in,) float32, >= 0; repeated along a row that joins several rows; None means ones

    def scores(self) -> Tensor:
        """The scores, (out, in) float32."""
        magnitude = self.weight.float().abs()
        if self.factor is not None and magnitude.numel():
            magnitude.unflatten(1, (-1, len(self.factor))).mul_(self.factor)
        return magnitude

    def are_finite(self) -> bool:
        """Whether no score is infinite or NaN. The scores are computed only if the largest weight times the largest
        factor is not finite."""
        if not self.weight.numel():
            return True
        largest = torch.stack(self.weight.aminmax()).float().abs().max()
        largest = largest if self.factor is None else largest * self.factor.max()
        return bool(largest.isfinite()) or all_finite(self.scores())


Scores = Tensor | Products


def computed(scores: Scores) -> Tensor:
    """Scores as an (out, in) tensor.

    >>> computed(torch.ones(1, 2)), computed(Products(torch.ones(1, 2)))
    (tensor([[1., 1.]]), tensor([[1., 1.]]))
    """
    return scores.scores() if isinstance(scores, Products) else scores


def scaled(scores: Scores, scales: Tensor) -> Scores:
    """Scores with each row multiplied by its factor, (out,) >= 0.

    >>> computed(scaled(Products(torch.ones(2, 1)), torch.tensor([1.0, 2.0])))
    tensor([[1.],
            [2.]])
    """
    factors = scales[:, None].to(scores.weight.device if isinstance(scores, Products) else scores.device)
    return scores._replace(weight=scores.weight * factors) if isinstance(scores, Products) else scores * factors


def wanda_score(weight: Tensor, squared_norm: Tensor) -> Products:
    """|W_ij| * ||X_j||_2 (Sun et al. 2023, arXiv 2306.11695, Equation 1); a constant factor changes no mask.

    >>> wanda_score(torch.tensor([[1.0, -2.0]]), torch.tensor([9.0, 4.0])).scores()
    tensor([[3., 4.]])
    """
    return Products(weight, squared_norm.sqrt())


def sparsegpt_score(weight: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """W_ij^2 / [H^-1]_jj: the loss of removing one weight and updating the others of its row to compensate
    (Frantar and Alistarh 2023, arXiv 2301.00774, Equation 3; Hassibi et al. 1993). H is the damped Gram matrix.

    >>> sparsegpt_score(torch.tensor([[1.0, -2.0]]), torch.tensor([0.5, 1.0]))
    tensor([[2., 4.]])
    """
    return weight.float().square().div_(inverse_diagonal)


def _ria_score(weight: Tensor, squared_norm: Tensor, exponent: float = 0.5) -> Tensor:
    """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^a: relative importance and activations
    (Zhang et al. 2024, "Plug-and-Play: an efficient post-training pruning method for LLMs", Equation 4, a = 0.5)."""
    magnitude = weight.float().abs()
    # A row or column of zeros has no relative importance: 0, not NaN.
    by_column = magnitude / magnitude.sum(dim=0, keepdim=True).clamp_min(1e-38)
    by_row = magnitude / magnitude.sum(dim=1, keepdim=True).clamp_min(1e-38)
    return (by_column + by_row) * squared_norm.pow(exponent / 2)


class Score(NamedTuple):
    """A score function and the statistics it needs.

    Attributes:
        function: Called with an (out, in) weight and one tensor for each name in `needs`; returns (out, in).
        granularity: The comparison group that its authors use.
        needs: Statistics of the inputs: names in `statistics.KINDS`, or "inverse_diagonal", (in,).
        degree: The power with which it grows with a row of the weight: 1 for |W|, 2 for W^2. None if it is not known,
            so that no factor of a row can be put on it.
    """

    function: Callable[..., Scores]
    granularity: str
    needs: tuple[str, ...]
    degree: float | None = 1


SCORES: dict[str, Score] = {
    "wanda": Score(wanda_score, "output", ("squared_norm",)),
    "magnitude": Score(Products, "layer", ()),  # |W| (Han et al. 2015, arXiv 1506.02626)
    "wanda_l1": Score(Products, "output", ("abs_sum",)),  # |W_ij| * ||X_j||: the paper's ablation of norms
    "wanda_linf": Score(Products, "output", ("abs_max",)),
    "sparsegpt": Score(sparsegpt_score, "(input, 128)", ("inverse_diagonal",), 2),
    "ria": Score(_ria_score, "output", ("squared_norm",)),
}


def register_score(
    name: str,
    function: Callable[..., Tensor],
    needs: Iterable[str] = ("squared_norm",),
    granularity: str = "output",
    degree: float | None = None,
) -> None:
    """Add a custom score, for use as `PruningConfig(score=name)`.

    Args:
        name: Its name in a configuration.
        function: Called with an (out, in) weight (any floating dtype) and one tensor for each of `needs`; returns
            finite (out, in) scores. Weights with the largest scores are kept.
        needs: The input statistics that it takes, in order: see `Score`.
        granularity: The comparison group if the configuration does not set one.
        degree: The power with which it grows with a row of the weight, if it does so: 1 for |W|, 2 for W^2. Allocation
            "fisher" makes the rows of a matrix comparable by factors of their weights, and leaves other scores alone.

    Raises:
        ConfigError: if the name is taken by another function or a statistic does not exist.

    >>> register_score("wanda", torch.mul)
    Traceback (most recent call last):
    sparsefit.errors.ConfigError: there is a score 'wanda' already; give yours another name
    """
    needs = (needs,) if isinstance(needs, str) else tuple(needs)
    unknown = [need for need in needs if need not in (*KINDS, *DERIVED)]
    if unknown:
        raise ConfigError(f"score '{name}' needs {unknown}; the statistics are {', '.join((*KINDS, *DERIVED))}")
    if name in SCORES and getattr(SCORES[name].function, "__wrapped__", None) is not function:
        raise ConfigError(f"there is a score '{name}' already; give yours another name")

    @wraps(function)
    def on_copies(*tensors: Tensor) -> Scores:  # so that the function cannot change the model's weights
        return function(*(tensor.clone() for tensor in tensors))

    SCORES[name] = Score(on_copies, granularity, needs, degree)
