"""What a pruning, or a pass over a dense model, gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sparsefit.errors import ConfigError
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.groups import Parts
from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.pruning.masks import MaskSet


@dataclass
class PruningResult:
    """What a pruning decided.

    Attributes:
        config: As it was asked for.
        update: The order that was used: "block" or "none".
        masks: By parameter name; True = kept.
        samples: Calibration samples seen on this rank.
        tokens: Tokens that the statistics of a layer rest on, over all ranks (of the layer that saw most).
        seconds: Wall time of the whole pruning.
        notes: What did not go as asked, and why.
        left_dense: The model's other matrices and why they were not pruned.
        layer_errors: For each pruned matrix the squared error of its outputs on the calibration inputs as a share of
            the squared outputs; only where the method takes Gram matrices (swaps, reconstruction).
    """

    config: PruningConfig
    update: str
    masks: MaskSet = field(default_factory=MaskSet)
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)
    layer_errors: dict[str, float] = field(default_factory=dict)

    def note(self, note: str) -> None:
        """Add a sentence to the notes, once."""
        if note not in self.notes:
            self.notes.append(note)


@dataclass(frozen=True)
class DenseStatistics:
    """Statistics of the inputs of a dense model: taken once, good for any number of prunings of it."""

    parts: Parts
    kinds: frozenset[str]  # names from `statistics.KINDS`
    samples: int  # on this rank
    seconds: float
    notes: tuple[str, ...] = ()

    def check(self, weights: Sequence[PrunableWeight], config: PruningConfig) -> None:
        """A `ConfigError` that says what would do, if they do not do for a pruning."""
        if config.needs_inputs and config.update != "none":
            raise ConfigError(
                f"statistics of the dense model do for update 'none' alone, and not for '{config.update}': give the "
                "configuration update='none', or `prune` with `batches`"
            )
        lacking = sorted(config.statistics - self.kinds)
        unknown = [weight.name for weight in weights if weight.name not in self.parts]
        if lacking or (unknown and config.needs_inputs):
            what = f"{', '.join(lacking)} was not taken" if lacking else f"nothing is known of {unknown[0]}"
            raise ConfigError(
                f"the statistics do not fit the configuration: {what}. Name it when you `collect_statistics`"
            )
