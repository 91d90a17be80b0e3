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
from sparsefit.pruning.groups import InputGroup
from sparsefit.pruning.layers.base import PrunableWeight
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
from sparsefit.pruning.scores import SCORES, Score, sparsegpt_score
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
        counts: By weight, how many of its weights go; one that is not named loses what the sparsity means for each
            comparison group.
        note: Takes sentences for the report.
    """

    def __init__(
        self, group: InputGroup, config: PruningConfig, counts: Mapping[str, int], note: Callable[[str], None]
    ) -> None:
        spread = config.structure is not None and group.weights[0].positions > 1
        self._order = channels_side_by_side(group.weights[0].view) if spread else None
        self._group = group if self._order is None else group.with_columns(self._order)
        self._config, self._counts, self._note = config, counts, note
        self._score: Score = SCORES[config.score]
        self._granularity = Granularity.parse(config.granularity)
        matrices = {weight.name: weight.matrix() for weight in group.weights}
        self._dense = {name: m if self._order is None else m[:, self._order] for name, m in matrices.items()}
        self._factors: dict[int, Factor] = {}

    def select_by_magnitude(self) -> ByWeight:
        """The masks of weights that no token has reached."""
        return {name: self._select(Products(dense), self._counts.get(name)) for name, dense in self._dense.items()}

    def select(self) -> ByWeight:
        """The masks by the scores of all weights; rows that see other inputs are scored apart."""
        masks = {}
        for weight in self._group.weights:
            dense, parts = self._dense[weight.name], self._group.parts[weight.name] if self._score.needs else []
            scores = [
                self._scores(
                    weight, dense[rows], [self._needed(need, statistics, weight) for need in self._score.needs]
                )
                for rows, statistics in parts
            ] or [self._scores(weight, dense, [])]
            masks[weight.name] = self._select(_joined(scores), self._counts.get(weight.name))
        return masks

    def refine(self, masks: ByWeight) -> ByWeight:
        """Better masks of as many weights, by swaps."""
        structure = self._config.structure
        pattern = (structure.n, structure.m) if structure else None
        return self._by_rows(
            lambda statistics, dense, mask: swap(dense, mask, statistics["gram"], self._config.swaps, pattern), masks
        )

    def update(self, masks: ByWeight) -> ByWeight:
        """New values for the kept weights, float32, zero outside the masks."""
        return self._by_rows(self._updated, masks)

    def iterate(self) -> tuple[ByWeight, ByWeight]:
        """Masks that are chosen while the kept weights are updated, and the new values (SparseGPT)."""
        structure = self._config.structure
        masks, values = self._empty(torch.bool), self._empty(torch.float32)
        for statistics, rows in self._group.by_statistics():
            dense, factor = self._stacked(self._dense, rows), self._factor(statistics, rows[0][0])
            if structure and self._score.function is sparsegpt_score:
                mask, changed = prune_n_of_m(dense, factor, structure.n, structure.m)
            else:
                chooser, group = self._block_chooser(statistics, rows), structure.m if structure else None
                mask, changed = prune_iteratively(dense, factor, chooser, group=group)
            self._unstack(mask, rows, masks)
            self._unstack(changed, rows, values)
        return masks, values

    def errors(self, masks: ByWeight, values: ByWeight | None) -> dict[str, float]:
        """||(W' - W) X||^2 / ||W X||^2 of each weight on the calibration inputs, from the Gram matrices."""
        found = {}
        for weight in self._group.weights:
            name, lost, whole = weight.name, 0.0, 0.0
            for rows, statistics in self._group.parts[name]:
                dense, gram = self._dense[name][rows], statistics["gram"]
                changed = values[name][rows] if values is not None else dense.float() * masks[name][rows]
                lost += float(reconstruction_error(dense, changed, gram).sum())
                whole += float(reconstruction_error(dense, torch.zeros_like(changed), gram).sum())
            found[name] = lost / whole if whole else 0.0
        return found

    def in_own_order(self, tensors: ByWeight) -> ByWeight:
        """Masks or values with their columns as the weights have them."""
        if self._order is None:
            return tensors
        back = self._order.argsort()
        return {name: tensor[:, back] for name, tensor in tensors.items()}

    def _by_rows(self, function: Callable[[InputStatistics, Tensor, Tensor], Tensor], masks: ByWeight) -> ByWeight:
        """Apply a function to the rows that see the same inputs, dense and masks, all of them stacked."""
        results: ByWeight = {}
        for statistics, rows in self._group.by_statistics():
            result = function(statistics, self._stacked(self._dense, rows), self._stacked(masks, rows))
            if not results:
                results = self._empty(result.dtype)
            self._unstack(result, rows, results)
        return results

    def _updated(self, statistics: InputStatistics, dense: Tensor, mask: Tensor) -> Tensor:
        weight = next(rows[0][0] for own, rows in self._group.by_statistics() if own is statistics)
        if self._config.reconstruction == "sequential":
            return update_sequentially(dense.float(), mask, self._factor(statistics, weight))
        values, damping = least_squares(dense.float(), mask, statistics["gram"], self._config.damping)
        self._note_damping(weight, damping)
        return values

    def _block_chooser(
        self, statistics: InputStatistics, rows: list[tuple[PrunableWeight, slice]]
    ) -> Callable[[Tensor, slice, Tensor], Tensor]:
        """Chooses the mask of some columns from their updated weights and the diagonal of the inverse's factor."""
        shares = [_share_of_rows(self._counts.get(weight.name), self._dense[weight.name], own) for weight, own in rows]
        width = len(statistics["squared_norm"])

        def needed(need: str, columns: slice, diagonal: Tensor) -> Tensor:
            # The weights before these columns are settled: what is left to mend an error are these and later ones.
            if need == "inverse_diagonal":
                return diagonal.square()
            return statistics[need][columns, columns] if need == "gram" else statistics[need][columns]

        def choose(block: Tensor, columns: slice, diagonal: Tensor) -> Tensor:
            inputs = [needed(need, columns, diagonal) for need in self._score.needs]
            masks = []
            sizes = [own.stop - own.start for _, own in rows]
            for (weight, _), share, some in zip(rows, shares, block.split(sizes), strict=True):
                # Rounded so that the blocks' counts add up to the whole count.
                due = None if share is None else share * columns.stop // width - share * columns.start // width
                masks.append(self._select(self._scores(weight, some, inputs), due))
            return masks[0] if len(masks) == 1 else torch.cat(masks)

        return choose

    def _select(self, scores: Scores, count: int | None) -> Tensor:
        structure = self._config.structure
        if structure is not None:
            return select_n_of_m(scores, structure.n, structure.m)
        if count is not None:
            return select_count(scores, self._granularity, count)
        return select(scores, self._granularity, self._config.exact_sparsity)

    def _scores(self, weight: PrunableWeight, matrix: Tensor, needs: list[Tensor]) -> Scores:
        name = self._config.score
        if self._score.factor is not None:
            scores = Products(matrix, self._score.factor(*needs))
            finite = not matrix.numel() or bool(scores.largest().isfinite())
        else:
            scores = self._score.function(matrix, *needs)
            if not isinstance(scores, Tensor) or scores.shape != matrix.shape:
                given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise ConfigError(
                    f"score '{name}' gave {given} for {tuple(matrix.shape)} weights of {weight.name}; a score gives "
                    "one number for each weight, as a tensor of their shape"
                )
            finite = all_finite(scores)
        if not finite:
            raise CalibrationError(
                f"the scores of {weight.name} are not finite ('{name}'): its weights or their inputs are too large for "
                "float32, or a score of your own divides by zero. The model was left as it was; look at the "
                "calibration data, or exclude the layer"
            )
        return scores

    def _needed(self, need: str, statistics: InputStatistics, weight: PrunableWeight) -> Tensor:
        if need == "inverse_diagonal":
            return inverse_diagonal(self._factor(statistics, weight))
        return statistics[need]

    def _factor(self, statistics: InputStatistics, weight: PrunableWeight) -> Factor:
        if id(statistics) not in self._factors:
            factor = self._factors[id(statistics)] = inverse_factor(statistics["gram"], self._config.damping)
            self._note_damping(weight, factor.damping)
        return self._factors[id(statistics)]

    def _note_damping(self, weight: PrunableWeight, damping: float) -> None:
        if damping > self._config.damping:
            self._note(
                f"{weight.name}: the Gram matrix of its inputs could not be inverted with damping "
                f"{self._config.damping:g}; {damping:g} was used"
            )

    def _empty(self, dtype: torch.dtype) -> ByWeight:
        return {name: torch.empty(dense.shape, dtype=dtype, device=dense.device) for name, dense in self._dense.items()}

    @staticmethod
    def _stacked(tensors: ByWeight, rows: list[tuple[PrunableWeight, slice]]) -> Tensor:
        found = [tensors[weight.name][own] for weight, own in rows]
        return found[0] if len(found) == 1 else torch.cat(found)

    @staticmethod
    def _unstack(stacked: Tensor, rows: list[tuple[PrunableWeight, slice]], tensors: ByWeight) -> None:
        parts = stacked.split([own.stop - own.start for _, own in rows])
        for (weight, own), part in zip(rows, parts, strict=True):
            tensors[weight.name][own] = part


def _joined(scores: list[Scores]) -> Scores:
    """The scores of a matrix from those of its rows."""
    if len(scores) == 1:
        return scores[0]
    return torch.cat([some.scores() if isinstance(some, Products) else some for some in scores])


def _share_of_rows(count: int | None, matrix: Tensor, rows: slice) -> int | None:
    """What of a matrix's count falls to some of its rows; the shares of all parts add up to the count."""
    if count is None:
        return None
    share = Fraction(count, len(matrix))
    return int(share * rows.stop) - int(share * rows.start)


def describe_unseen(names: list[str]) -> list[str]:
    """A sentence for the report on each parameter whose weights, or some experts of which, saw no token.

    >>> describe_unseen(["experts.down_proj[1]", "experts.down_proj[3]"])[0][:48]
    'experts.down_proj of the experts 1, 3 saw no cal'
    """
    experts: dict[str, list[str]] = {}
    for name in names:
        parameter, _, number = name.removesuffix("]").partition("[")
        experts.setdefault(parameter, []).extend([number] if number else [])
    described = []
    for parameter, numbers in experts.items():
        which = f"{parameter} of the experts {', '.join(numbers)}" if numbers else parameter
        described.append(f"{which} saw no calibration token (no product with it was seen); pruned by magnitude")
    return described
