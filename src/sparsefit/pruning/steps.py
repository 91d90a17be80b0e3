"""The steps of pruning one input group: score, mask, refine, update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from sparsefit.errors import CalibrationError, ConfigError
from sparsefit.pruning import weight_updates
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.gram import reconstruction_error
from sparsefit.pruning.input_groups import InputGroup, Rows
from sparsefit.pruning.layers.convolution import channels_side_by_side
from sparsefit.pruning.least_squares import least_squares
from sparsefit.pruning.refinement import swap
from sparsefit.pruning.scores import SCORES, Products, Scores, computed, scaled, sparsegpt_score
from sparsefit.pruning.selection import Granularity, select, select_n_of_m
from sparsefit.pruning.statistics import InputStatistics, all_finite

ByWeight = dict[str, Tensor]  # (out, in) tensors by the name of the weight


@dataclass
class Solution:
    """The masks and new values of the weights of an input group.

    Attributes:
        masks: The mask of each weight, (out, in) bool, True = kept.
        values: New values, (out, in), zero outside the masks; None if kept weights do not change.
        errors: ||(W' - W) X||^2 / ||W X||^2 of each weight, if there are Gram matrices.
        notes: Sentences for the user.
    """

    masks: ByWeight
    values: ByWeight | None = None
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Steps:
    """The steps that choose masks and new values for the weights of one input group.

    N:M sparsity runs along the input channels. So with a pattern, the columns of a convolution are reordered to put the
    channels of one kernel position next to each other; `solution` restores the order.

    Args:
        group: The weights and the statistics of their inputs.
        dense: The dense (out, in) matrices of the weights.
        config: The pruning configuration.
        counts: How many weights to remove from each matrix; for one that is not named, the sparsity applies to each
            comparison group.
        scales: Factors that make the rows of a matrix comparable, (out,), if there are any; for a score of degree 1.
    """

    def __init__(
        self,
        group: InputGroup,
        dense: Mapping[str, Tensor],
        config: PruningConfig,
        counts: Mapping[str, int],
        scales: Mapping[str, Tensor],
    ) -> None:
        self._config, self._counts, self._scales, self._notes = config, counts, scales, []
        self._pattern, self._score = config.structure, SCORES[config.score]
        self._dense = dict(dense)
        self._order = channels_side_by_side(group.weights[0].view) if self._pattern else None
        if self._order is not None:
            group = group.with_columns(self._order)
            self._dense = {name: matrix[:, self._order] for name, matrix in self._dense.items()}
        kept = config.existing_zeros == "keep"
        self._zeros = {name: matrix == 0 for name, matrix in self._dense.items()} if kept else {}
        self._group, self._parts, self._by_statistics = group, group.parts, group.by_statistics()
        self._factors: dict[InputStatistics, weight_updates.Factor] = {}

    def select_by_magnitude(self) -> ByWeight:
        """Masks by magnitude, for weights whose inputs are unknown or all zero."""
        return {name: self._mask(name, Products(dense)) for name, dense in self._dense.items()}

    def adopt(self) -> ByWeight:
        """Masks that remove the existing zeros of the weights."""
        masks = {name: dense != 0 for name, dense in self._dense.items()}
        for name, mask in masks.items() if self._pattern else ():
            if bool((mask.unflatten(1, (-1, self._pattern.m)).sum(2) > self._pattern.n).any()):
                raise ConfigError(
                    f"the zeros of {name} do not fit the pattern '{self._pattern}': leave out the pattern, or take "
                    "existing_zeros 'keep', which prunes on until it holds"
                )
        return masks

    def select(self) -> ByWeight:
        """Masks by the scores of all weights; rows with different inputs are scored separately."""
        masks = {}
        for name, dense in self._dense.items():
            parts = [(rows, self._needed(own)) for rows, own in self._parts[name]]
            parts = parts if self._score.needs else [(slice(None), [])]
            scores = [self._scores(name, rows, dense[rows], needed) for rows, needed in parts]
            masks[name] = self._mask(name, _joined(scores))
        return masks

    def refine(self, masks: ByWeight) -> ByWeight:
        """Improve the masks by swaps, at the same sparsity."""
        refined = self._empty(torch.bool)
        for statistics, rows in self._by_statistics.items():
            dense, mask = _stacked(self._dense, rows), _stacked(masks, rows)
            _unstack(swap(dense, mask, statistics["gram"], self._config.swaps, self._pattern), rows, refined)
        return refined

    def update(self, masks: ByWeight) -> ByWeight:
        """New values for the kept weights, float32, zero outside the masks."""
        values = self._empty(torch.float32)
        for statistics, rows in self._by_statistics.items():
            dense, mask = _stacked(self._dense, rows).float(), _stacked(masks, rows)
            if self._config.reconstruction == "sequential":
                changed = weight_updates.update_sequentially(dense, mask, self._factor(statistics))
            else:
                changed, damping = least_squares(dense, mask, statistics["gram"], self._config.damping)
                self._note_damping(statistics, damping)
            _unstack(changed, rows, values)
        return values

    def iterate(self) -> tuple[ByWeight, ByWeight]:
        """Choose masks while the kept weights are updated (SparseGPT); returns the masks and the new values."""
        masks, values = self._empty(torch.bool), self._empty(torch.float32)
        n, m = self._pattern or (None, None)
        own = self._score.function is sparsegpt_score and not self._zeros  # then a GPU's kernel can choose N of M
        for statistics, rows in self._by_statistics.items():
            dense, factor = _stacked(self._dense, rows), self._factor(statistics)
            choose = self._block_chooser(statistics, rows)
            mask, changed = weight_updates.prune_iteratively(dense, factor, choose, group=m, keep=n if own else None)
            _unstack(mask, rows, masks)
            _unstack(changed, rows, values)
        return masks, values

    def solution(self, masks: ByWeight, values: ByWeight | None = None) -> Solution:
        """The solution, with the columns in the weights' own order."""
        told = "gram" in self._config.statistics and self._group.has_nonzero_inputs
        errors = self._errors(masks, values) if told else {}
        in_order = {name: self._in_own_order(mask) for name, mask in masks.items()}
        changed = None if values is None else {name: self._in_own_order(own) for name, own in values.items()}
        return Solution(in_order, changed, errors, self._notes)

    def _errors(self, masks: ByWeight, values: ByWeight | None) -> dict[str, float]:
        found = {}
        for name, parts in self._parts.items():
            lost = whole = 0.0
            for rows, statistics in parts:
                dense, gram = self._dense[name][rows], statistics["gram"]
                changed = dense.float() * masks[name][rows] if values is None else values[name][rows]
                lost += float(reconstruction_error(dense, changed, gram).sum())
                whole += float(reconstruction_error(dense, torch.zeros_like(changed), gram).sum())
            found[name] = lost / whole if whole else 0.0
        return found

    def _in_own_order(self, matrix: Tensor) -> Tensor:
        return matrix if self._order is None else matrix[:, self._order.argsort()]

    def _block_chooser(self, statistics: InputStatistics, rows: Rows) -> weight_updates.Choose:
        """The `choose` function for `prune_iteratively`, for some rows of several weights stacked."""
        width = len(statistics["squared_norm"])

        def due(name: str, own: slice, columns: slice) -> int | None:
            """How many weights to remove from some rows and columns, rounded so that the sum over the matrix is its
            count."""
            if name not in self._counts:
                return None
            by_row = Fraction(self._counts[name], len(self._dense[name]))
            of_rows = int(by_row * own.stop) - int(by_row * own.start)
            return of_rows * columns.stop // width - of_rows * columns.start // width

        def choose(block: Tensor, columns: slice, diagonal: Tensor) -> Tensor:
            # Earlier columns are final: only these and later ones can still compensate an error.
            needed = self._needed(statistics, columns, diagonal.square())
            masks = []
            for (name, own), part in zip(rows, block.split([own.stop - own.start for _, own in rows]), strict=True):
                zeros = self._zeros[name][own, columns] if self._zeros else None
                masks.append(self._select(self._scores(name, own, part, needed), due(name, own, columns), zeros))
            return _joined(masks)

        return choose

    def _mask(self, name: str, scores: Scores) -> Tensor:
        """The mask of a whole matrix by its scores."""
        return self._select(scores, self._counts.get(name), self._zeros.get(name))

    def _select(self, scores: Scores, count: int | None, zeros: Tensor | None) -> Tensor:
        granularity = Granularity.parse(self._config.granularity)
        if zeros is not None:  # all of them are removed, before any other weight
            least = 0 if granularity.axis == "variant" else -torch.inf
            scores = computed(scores)
            chosen = self._select(scores.masked_fill(zeros, least), count, None)
            return chosen & ~zeros if self._pattern else _with_all_zeros(chosen, scores, zeros)
        if self._pattern:
            return select_n_of_m(scores, *self._pattern)
        return select(scores, granularity, self._config.exact_sparsity if count is None else count)

    def _scores(self, name: str, rows: slice, matrix: Tensor, needed: list[Tensor]) -> Scores:
        """The scores of some rows of a matrix (and some of its columns)."""
        score = self._config.score
        scores = self._score.function(matrix, *needed)
        given = scores.weight if isinstance(scores, Products) else scores
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        if shape != tuple(matrix.shape):
            raise ConfigError(
                f"score '{score}' gave {shape} for {tuple(matrix.shape)} weights of {name}; a score gives one "
                "number for each weight, as a tensor of their shape"
            )
        if not (scores.are_finite() if isinstance(scores, Products) else all_finite(scores)):
            raise CalibrationError(
                f"the scores of {name} are not finite ('{score}'): its weights or their inputs are too large for "
                "float32, or a score of your own divides by zero. The model was left as it was; look at the "
                "calibration data, or exclude the layer"
            )
        if name not in self._scales or self._score.degree is None:
            return scores
        return scaled(scores, self._scales[name][rows].pow(self._score.degree))

    def _needed(
        self, statistics: InputStatistics, columns: slice = slice(None), inverse: Tensor | None = None
    ) -> list[Tensor]:
        """The statistics that the score needs, for some columns; `inverse` is the diagonal of the inverse, if known."""

        def one(need: str) -> Tensor:
            if need == "inverse_diagonal":
                return weight_updates.inverse_diagonal(self._factor(statistics)) if inverse is None else inverse
            return statistics[need][columns, columns] if need == "gram" else statistics[need][columns]

        return [one(need) for need in self._score.needs]

    def _factor(self, statistics: InputStatistics) -> weight_updates.Factor:
        if statistics not in self._factors:
            factor = self._factors[statistics] = weight_updates.inverse_factor(statistics["gram"], self._config.damping)
            self._note_damping(statistics, factor.damping)
        return self._factors[statistics]

    def _note_damping(self, statistics: InputStatistics, damping: float) -> None:
        asked = self._config.damping
        if damping > asked:
            name, _ = self._by_statistics[statistics][0]
            why = f"the Gram matrix of its inputs could not be inverted with damping {asked:g}"
            self._notes.append(f"{name}: {why}; {damping:g} was used")

    def _empty(self, dtype: torch.dtype) -> ByWeight:
        return {name: torch.empty(dense.shape, dtype=dtype, device=dense.device) for name, dense in self._dense.items()}


def _with_all_zeros(kept: Tensor, scores: Tensor, zeros: Tensor) -> Tensor:
    """Remove all existing zeros from a mask. For each zero that was kept because its comparison group had already lost
    its share, the removed weight with the highest score is kept instead, so that the total does not change."""
    surplus = int((kept & zeros).sum())
    mask, going = (kept & ~zeros).contiguous(), ~(kept | zeros)
    order = scores.masked_fill(~going, -torch.inf).flatten().argsort(descending=True, stable=True)
    mask.view(-1)[order[: min(surplus, int(going.sum()))]] = True
    return mask


def _joined(parts: list[Scores]) -> Scores:
    """Concatenate scores or masks of rows."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([computed(part) for part in parts])


def _stacked(tensors: ByWeight, rows: Rows) -> Tensor:
    return _joined([tensors[name][own] for name, own in rows])


def _unstack(stacked: Tensor, rows: Rows, tensors: ByWeight) -> None:
    parts = stacked.split([own.stop - own.start for _, own in rows])
    for (name, own), part in zip(rows, parts, strict=True):
        tensors[name][own] = part
