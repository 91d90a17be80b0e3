"""What becomes of one matrix: its scores, its mask, and new values for what is kept if they are to be mended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from sparsefit.errors import CalibrationError, ConfigError
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.ranks import of_first_rank
from sparsefit.pruning.reconstruction import (
    Factor,
    inverse_diagonal,
    inverse_factor,
    least_squares,
    prune_iteratively,
    reconstruction_error,
    update_sequentially,
)
from sparsefit.pruning.recording import Part
from sparsefit.pruning.refinement import swap
from sparsefit.pruning.scores import SCORES, Score, magnitude_score
from sparsefit.pruning.selection import Granularity, select, select_count, select_n_of_m, select_variant
from sparsefit.pruning.statistics import InputStatistics
from sparsefit.pruning.weights import PrunableWeight, all_finite


@dataclass(frozen=True)
class Choice:
    """What becomes of one matrix.

    Attributes:
        mask: (out, in) bool, True = kept.
        values: (out, in) its new weights, in float32; None if those that are kept keep their values.
        error: Squared error of the layer's outputs on the calibration inputs, as a share of the squared outputs; None
            where the method takes no Gram matrix.
    """

    mask: Tensor
    values: Tensor | None = None
    error: float | None = None


class Chooser:
    """Chooses masks and new values, one matrix after the other, by one configuration.

    Args:
        config: What to prune and how.
        note: Takes a sentence for the report.

    Attributes:
        unseen: Weights pruned by magnitude, as no calibration token came to them.
    """

    def __init__(self, config: PruningConfig, note: Callable[[str], None]) -> None:
        self.config, self.note = config, note
        self.score: Score = SCORES[config.score]
        self.granularity = Granularity.parse(config.granularity)
        self.unseen: list[str] = []
        self._inverted: tuple[InputStatistics, Factor] | None = None  # q, k and v share theirs

    def choose(self, weight: PrunableWeight, parts: list[Part], count: int | None = None) -> Choice:
        """Choose what becomes of a matrix.

        Args:
            weight: The weight, dense.
            parts: Statistics of its inputs; several where its rows see different ones; none where no score needs any.
            count: How many weights go; None is what the configured sparsity means for each comparison group.

        Raises:
            CalibrationError: if scores are not finite.
        """
        matrix = weight.matrix()
        seen = [part for part in parts if part.statistics.tokens]
        if self.config.statistics and not seen:
            self.unseen.append(weight.name)
            choice = Choice(self._select(magnitude_score(matrix), count))
        elif self.config.reconstruction == "iterative":
            choice = self._iterative(weight, matrix, parts, count)
        else:
            choice = self._mended(matrix, self._mask(weight, matrix, parts, count), parts, weight)
        return _agreed(choice)

    def _mask(self, weight: PrunableWeight, matrix: Tensor, parts: list[Part], count: int | None) -> Tensor:
        scores = [
            self._scores(weight, matrix[part.rows or slice(None)], self._needs(part.statistics, weight))
            for part in parts or [Part(None, None)]
        ]
        mask = self._select(torch.cat(scores) if len(scores) > 1 else scores[0], count)
        if not self.config.swaps:
            return mask
        structure = self.config.structure
        pattern = (structure.n, structure.m) if structure else None
        refined = [
            swap(matrix[rows], mask[rows], part.statistics["gram"], self.config.swaps, pattern)
            for part, rows in _with_rows(parts)
        ]
        return torch.cat(refined)

    def _needs(self, statistics: InputStatistics | None, weight: PrunableWeight) -> list[Tensor]:
        return [
            inverse_diagonal(self._factor(statistics, weight)) if need == "inverse_diagonal" else statistics[need]
            for need in self.score.needs
        ]

    def _factor(self, statistics: InputStatistics, weight: PrunableWeight) -> Factor:
        if self._inverted is None or self._inverted[0] is not statistics:
            factor = inverse_factor(statistics["gram"], self.config.damping)
            self._inverted = (statistics, factor)
            self._note_damping(weight, factor.damping)
        return self._inverted[1]

    def _note_damping(self, weight: PrunableWeight, damping: float) -> None:
        if damping > self.config.damping:
            self.note(
                f"{weight.name}: the Gram matrix of its inputs could not be inverted with damping "
                f"{self.config.damping:g}; {damping:g} was used"
            )

    def _select(self, scores: Tensor, count: int | None) -> Tensor:
        structure = self.config.structure
        if structure is not None:
            return select_n_of_m(scores, structure.n, structure.m)
        if count is not None:
            return select_count(scores, self.granularity, count)
        if self.granularity.axis == "variant":
            return select_variant(scores, self.config.exact_sparsity)
        return select(scores, self.granularity, self.config.exact_sparsity)

    def _scores(self, weight: PrunableWeight, matrix: Tensor, needs: list[Tensor]) -> Tensor:
        scores, name = self.score.function(matrix, *needs), self.config.score
        if not isinstance(scores, Tensor) or scores.shape != matrix.shape:
            given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ConfigError(
                f"score '{name}' gave {given} for {tuple(matrix.shape)} weights of {weight.name}; a score gives one "
                "number for each weight, as a tensor of their shape"
            )
        if not all_finite(scores):
            raise CalibrationError(
                f"the scores of {weight.name} are not finite ('{name}'): its weights or their inputs are too large for "
                "float32, or a score of your own divides by zero. The model was left as it was; look at the "
                "calibration data, or exclude the layer"
            )
        return scores

    def _mended(self, matrix: Tensor, mask: Tensor, parts: list[Part], weight: PrunableWeight) -> Choice:
        """The mask, with new values for the kept weights if the configuration has them updated."""
        if "gram" not in self.config.statistics:
            return Choice(mask)
        values = []
        for part, rows in _with_rows(parts):
            kept, dense = mask[rows], matrix[rows].float()
            if self.config.reconstruction == "sequential":
                values.append(update_sequentially(dense, kept, self._factor(part.statistics, weight)))
            elif self.config.reconstruction == "least_squares":
                solved, damping = least_squares(dense, kept, part.statistics["gram"], self.config.damping)
                self._note_damping(weight, damping)
                values.append(solved)
            else:
                values.append(dense * kept)
        changed = torch.cat(values)
        error = relative_error(matrix, changed, parts)
        return Choice(mask, changed if self.config.reconstruction else None, error)

    def _iterative(self, weight: PrunableWeight, matrix: Tensor, parts: list[Part], count: int | None) -> Choice:
        structure = self.config.structure
        masks, values = [], []
        for part, rows in _with_rows(parts):
            share = _share_of_rows(count, matrix, rows)
            mask, changed = prune_iteratively(
                matrix[rows].float(),
                self._factor(part.statistics, weight),
                self._block_chooser(part.statistics, weight, share, matrix.shape[1]),
                group=structure.m if structure else None,
            )
            masks.append(mask)
            values.append(changed)
        changed = torch.cat(values)
        return Choice(torch.cat(masks), changed, relative_error(matrix, changed, parts))

    def _block_chooser(
        self, statistics: InputStatistics, weight: PrunableWeight, count: int | None, width: int
    ) -> Callable[[Tensor, slice, Tensor], Tensor]:
        """Chooses the mask of some columns from their updated weights and the diagonal of the inverse's factor."""

        def needed(need: str, columns: slice, diagonal: Tensor) -> Tensor:
            # The weights before these columns are settled: what is left to mend an error are these and later ones.
            if need == "inverse_diagonal":
                return diagonal.square()
            return statistics[need][columns, columns] if need == "gram" else statistics[need][columns]

        def choose(block: Tensor, columns: slice, diagonal: Tensor) -> Tensor:
            inputs = [needed(need, columns, diagonal) for need in self.score.needs]
            scores = self._scores(weight, block, inputs)
            # Rounded so that the blocks' counts add up to the whole count.
            due = None if count is None else count * columns.stop // width - count * columns.start // width
            return self._select(scores, due)

        return choose


def describe_unseen(names: list[str]) -> list[str]:
    """A sentence for the report on each parameter whose weights, or some experts of which, saw no token."""
    experts: dict[str, list[str]] = {}
    for name in names:
        parameter, _, number = name.removesuffix("]").partition("[")
        experts.setdefault(parameter, []).extend([number] if number else [])
    described = []
    for parameter, numbers in experts.items():
        which = f"{parameter} of the experts {', '.join(numbers)}" if numbers else parameter
        described.append(f"{which} saw no calibration token (its layer was called with none); pruned by magnitude")
    return described


def relative_error(dense: Tensor, changed: Tensor, parts: list[Part]) -> float:
    """||(W' - W) X||^2 / ||W X||^2 on the calibration inputs, from the Gram matrices."""
    lost = whole = 0.0
    for part, rows in _with_rows(parts):
        gram = part.statistics["gram"]
        lost += float(reconstruction_error(dense[rows], changed[rows], gram).sum())
        whole += float(reconstruction_error(dense[rows], torch.zeros_like(changed[rows]), gram).sum())
    return lost / whole if whole else 0.0


def _with_rows(parts: list[Part]) -> list[tuple[Part, slice]]:
    return [(part, part.rows or slice(None)) for part in parts]


def _share_of_rows(count: int | None, matrix: Tensor, rows: slice) -> int | None:
    """What of a matrix's count falls to some of its rows; the shares of all parts add up to the count."""
    if count is None:
        return None
    start, stop, _ = rows.indices(len(matrix))
    share = Fraction(count, len(matrix))
    return int(share * stop) - int(share * start)


def _agreed(choice: Choice) -> Choice:
    """The choice of the first rank, for all: rounding on other hardware must not make models differ."""
    values = choice.values
    return replace(choice, mask=of_first_rank(choice.mask), values=None if values is None else of_first_rank(values))
