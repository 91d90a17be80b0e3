"""The steps of a pruning on one input group: score, mask, refine, update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from sparsefit.errors import CalibrationError, ConfigError
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.finite import all_finite
from sparsefit.pruning.gram import reconstruction_error
from sparsefit.pruning.granularity import Granularity
from sparsefit.pruning.groups import InputGroup, Rows
from sparsefit.pruning.layers.convolution import channels_side_by_side
from sparsefit.pruning.least_squares import least_squares
from sparsefit.pruning.reconstruction import (
    Factor,
    inverse_diagonal,
    inverse_factor,
    prune_iteratively,
    prune_n_of_m,
    update_sequentially,
)
from sparsefit.pruning.refinement import swap
from sparsefit.pruning.scores import SCORES, sparsegpt_score
from sparsefit.pruning.selection import Products, Scores, select, select_count, select_n_of_m
from sparsefit.pruning.statistics import InputStatistics

ByWeight = dict[str, Tensor]  # (out, in) tensors by the name of the weight


class Steps:
    """The weights of an input group, dense, and what becomes of them by a configuration.

    N:M runs along the input channels. So, with a pattern, the columns of a convolution are handled in an order that
    puts the channels of one kernel position side by side; `in_own_order` takes a result back.

    Args:
        group: The weights and their statistics.
        config: What to prune and how.
        counts: How many go of each matrix; of one not named it is what the sparsity means for each comparison group.
        note: Takes sentences for the report.
    """

    def __init__(
        self, group: InputGroup, config: PruningConfig, counts: Mapping[str, int], note: Callable[[str], None]
    ) -> None:
        self._config, self._counts, self._note = config, counts, note
        self._structure, self._score = config.structure, SCORES[config.score]
        self._dense = {weight.name: weight.matrix() for weight in group.weights}
        self._order = channels_side_by_side(group.weights[0].view) if self._structure else None
        if self._order is not None:
            group = group.with_columns(self._order)
            self._dense = {name: matrix[:, self._order] for name, matrix in self._dense.items()}
        self._parts, self._by_statistics = group.parts, group.by_statistics()
        self._factors: dict[InputStatistics, Factor] = {}

    def select_by_magnitude(self) -> ByWeight:
        """The masks of weights that no token has reached."""
        return {name: self._select(Products(dense), self._counts.get(name)) for name, dense in self._dense.items()}

    def select(self) -> ByWeight:
        """The masks by the scores of all weights; rows that see other inputs are scored apart."""
        masks = {}
        for name, dense in self._dense.items():
            if self._score.needs:
                scores = [self._scores(name, dense[rows], self._needed(own)) for rows, own in self._parts[name]]
            else:
                scores = [self._scores(name, dense, [])]
            masks[name] = self._select(_joined(scores), self._counts.get(name))
        return masks

    def refine(self, masks: ByWeight) -> ByWeight:
        """Better masks of as many weights, by swaps."""
        pattern = (self._structure.n, self._structure.m) if self._structure else None
        refined = self._empty(torch.bool)
        for statistics, rows in self._by_statistics.items():
            dense, mask = _stacked(self._dense, rows), _stacked(masks, rows)
            _unstack(swap(dense, mask, statistics["gram"], self._config.swaps, pattern), rows, refined)
        return refined

    def update(self, masks: ByWeight) -> ByWeight:
        """New values for the kept weights, float32, zero outside the masks."""
        values = self._empty(torch.float32)
        for statistics, rows in self._by_statistics.items():
            dense, mask = _stacked(self._dense, rows).float(), _stacked(masks, rows)
            if self._config.reconstruction == "sequential":
                changed = update_sequentially(dense, mask, self._factor(statistics))
            else:
                changed, damping = least_squares(dense, mask, statistics["gram"], self._config.damping)
                self._note_damping(statistics, damping)
            _unstack(changed, rows, values)
        return values

    def iterate(self) -> tuple[ByWeight, ByWeight]:
        """Masks that are chosen while the kept weights are updated, and the new values (SparseGPT)."""
        structure = self._structure
        masks, values = self._empty(torch.bool), self._empty(torch.float32)
        for statistics, rows in self._by_statistics.items():
            dense, factor = _stacked(self._dense, rows), self._factor(statistics)
            if structure and self._score.function is sparsegpt_score:
                mask, changed = prune_n_of_m(dense, factor, structure.n, structure.m)
            else:
                choose, m = self._block_chooser(statistics, rows), structure.m if structure else None
                mask, changed = prune_iteratively(dense, factor, choose, group=m)
            _unstack(mask, rows, masks)
            _unstack(changed, rows, values)
        return masks, values

    def errors(self, masks: ByWeight, values: ByWeight | None) -> dict[str, float]:
        """||(W' - W) X||^2 / ||W X||^2 of each weight on the calibration inputs, from the Gram matrices."""
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

    def in_own_order(self, matrix: Tensor) -> Tensor:
        """A mask or values with their columns as the weight has them."""
        return matrix if self._order is None else matrix[:, self._order.argsort()]

    def _block_chooser(self, statistics: InputStatistics, rows: Rows) -> Callable[[Tensor, slice, Tensor], Tensor]:
        """Chooses the mask of some columns from their updated weights and the diagonal of the inverse's factor."""
        width = len(statistics["squared_norm"])

        def needed(need: str, columns: slice, diagonal: Tensor) -> Tensor:
            # The weights before these columns are settled: what is left to mend an error are these and later ones.
            if need == "inverse_diagonal":
                return diagonal.square()
            return statistics[need][columns, columns] if need == "gram" else statistics[need][columns]

        def due(name: str, own: slice, columns: slice) -> int | None:
            """How many go of some rows and columns; rounded so that all of them add up to the count of the matrix."""
            if name not in self._counts:
                return None
            by_row = Fraction(self._counts[name], len(self._dense[name]))
            of_rows = int(by_row * own.stop) - int(by_row * own.start)
            return of_rows * columns.stop // width - of_rows * columns.start // width

        def choose(block: Tensor, columns: slice, diagonal: Tensor) -> Tensor:
            inputs = [needed(need, columns, diagonal) for need in self._score.needs]
            parts = zip(rows, block.split([own.stop - own.start for _, own in rows]), strict=True)
            return _joined([self._select(self._scores(n, p, inputs), due(n, own, columns)) for (n, own), p in parts])

        return choose

    def _select(self, scores: Scores, count: int | None) -> Tensor:
        if self._structure:
            return select_n_of_m(scores, self._structure.n, self._structure.m)
        granularity = Granularity.parse(self._config.granularity)
        if count is not None:
            return select_count(scores, granularity, count)
        return select(scores, granularity, self._config.exact_sparsity)

    def _scores(self, name: str, matrix: Tensor, needed: list[Tensor]) -> Scores:
        score = self._config.score
        if self._score.factor is not None:
            scores = Products(matrix, self._score.factor(*needed))
            finite = not matrix.numel() or bool(scores.largest().isfinite())
        else:
            scores = self._score.function(matrix, *needed)
            if not isinstance(scores, Tensor) or scores.shape != matrix.shape:
                given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise ConfigError(
                    f"score '{score}' gave {given} for {tuple(matrix.shape)} weights of {name}; a score gives one "
                    "number for each weight, as a tensor of their shape"
                )
            finite = all_finite(scores)
        if not finite:
            raise CalibrationError(
                f"the scores of {name} are not finite ('{score}'): its weights or their inputs are too large for "
                "float32, or a score of your own divides by zero. The model was left as it was; look at the "
                "calibration data, or exclude the layer"
            )
        return scores

    def _needed(self, statistics: InputStatistics) -> list[Tensor]:
        """What the score needs of them."""
        return [
            inverse_diagonal(self._factor(statistics)) if need == "inverse_diagonal" else statistics[need]
            for need in self._score.needs
        ]

    def _factor(self, statistics: InputStatistics) -> Factor:
        if statistics not in self._factors:
            factor = self._factors[statistics] = inverse_factor(statistics["gram"], self._config.damping)
            self._note_damping(statistics, factor.damping)
        return self._factors[statistics]

    def _note_damping(self, statistics: InputStatistics, damping: float) -> None:
        if damping > self._config.damping:
            name, _ = self._by_statistics[statistics][0]
            self._note(
                f"{name}: the Gram matrix of its inputs could not be inverted with damping {self._config.damping:g}; "
                f"{damping:g} was used"
            )

    def _empty(self, dtype: torch.dtype) -> ByWeight:
        return {name: torch.empty(dense.shape, dtype=dtype, device=dense.device) for name, dense in self._dense.items()}


def _joined(parts: list[Scores]) -> Scores:
    """The scores, or masks, of a matrix from those of its rows."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.scores() if isinstance(part, Products) else part for part in parts])


def _stacked(tensors: ByWeight, rows: Rows) -> Tensor:
    return _joined([tensors[name][own] for name, own in rows])


def _unstack(stacked: Tensor, rows: Rows, tensors: ByWeight) -> None:
    parts = stacked.split([own.stop - own.start for _, own in rows])
    for (name, own), part in zip(rows, parts, strict=True):
        tensors[name][own] = part
