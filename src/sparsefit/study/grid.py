"""The points of a study: scores x granularities x orders x sparsities, and N:M patterns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from sparsefit.errors import ConfigError
from sparsefit.pruning import PruningConfig

AXES = ("score", "granularity", "update", "pattern", "sparsity")


@dataclass(frozen=True)
class Point:
    """One pruning of a study.

    Attributes:
        config: The pruning configuration.
    """

    config: PruningConfig

    @property
    def key(self) -> dict[str, Any]:
        """The values that identify the point in its grid, one for each of `AXES`."""
        config, patterned = self.config, self.config.pattern is not None
        return {
            "score": config.score,
            "granularity": "" if patterned else config.granularity,
            "update": config.update if config.needs_inputs else "none",
            "pattern": config.pattern or "",
            "sparsity": float(config.exact_sparsity),
        }

    def __str__(self) -> str:
        key = self.key
        share = key["pattern"] or f"{key['sparsity']:.10g}"
        return " ".join(str(part) for part in (key["score"], key["granularity"], share, key["update"]) if part)


@dataclass(frozen=True)
class Grid:
    """A grid with a point for every combination of the lists; a pattern replaces granularity and sparsity.

    Args:
        scores: Names of scores: "magnitude", "wanda", "ria", ...
        granularities: Which weights compete: "output", "layer", "input", ...; "own" is the default of each score.
        sparsities: Shares of the weights to remove.
        patterns: N:M patterns, such as "2:4", in addition to the sparsities.
        updates: Orders: "none" (statistics of the dense network, collected once for the whole grid), "block".
        settings: Other fields of `PruningConfig`, the same for all points.
    """

    scores: list[str] = field(default_factory=lambda: ["magnitude", "wanda"])
    granularities: list[str] = field(default_factory=lambda: ["output", "layer"])
    sparsities: list[float] = field(default_factory=lambda: [0.5, 0.6, 0.7, 0.8])
    patterns: list[str] = field(default_factory=list)
    updates: list[str] = field(default_factory=lambda: ["none"])
    settings: Mapping[str, Any] = field(default_factory=dict)

    def points(self) -> list[Point]:
        """All points in order, without duplicates such as magnitude pruning in another block order.

        Raises:
            ConfigError: If a setting is invalid, or the grid is empty.
        """
        fixed = sorted({*self.settings} & {*AXES})
        if fixed:
            raise ConfigError(f"grid.settings gives {fixed[0]}, which the grid's own lists say: give it there")
        shares = [{"granularity": g, "sparsity": s} for g, s in product(self.granularities, self.sparsities)]
        shares += [{"pattern": pattern} for pattern in self.patterns]
        points: dict[tuple[Any, ...], Point] = {}
        for score, update, share in product(self.scores, self.updates, shares):
            own = {name: value for name, value in share.items() if value != "own"}
            point = Point(PruningConfig(**{**self.settings, **own, "score": score, "update": update}))
            points.setdefault(tuple(point.key.values()), point)
        if not points:
            raise ConfigError("the grid is empty: give at least one score, one update, and a sparsity or a pattern")
        return list(points.values())
