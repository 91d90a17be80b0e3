"""The results of a pruning run, and of collecting the statistics of a dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsefit.errors import ConfigError
from sparsefit.pruning.config import PruningConfig
from sparsefit.pruning.input_groups import Parts
from sparsefit.pruning.layers.base import INTEGERS, PrunableWeight
from sparsefit.pruning.layers.sharded import counted
from sparsefit.pruning.masks import MaskSet
from sparsefit.pruning.tracing import Trace
from sparsefit.sharded import shard_of


@dataclass
class PruningResult:
    """The masks of a pruning run, and a record of it.

    Attributes:
        config: The configuration that was given.
        update: The order that was used: "block" or "none".
        masks: The masks by parameter name; True = kept.
        samples: Number of calibration samples over all ranks.
        tokens: Number of tokens in a layer's statistics over all ranks (of the layer with most).
        seconds: Wall time of the whole run.
        notes: What was not done as configured, and why.
        left_dense: The reason why each other matrix of the model was not pruned, by name.
        dense_sizes: The number of weights of each of those, except embeddings that are only looked up.
        dense_zeros: How many of these weights are zero.
        layer_errors: For each pruned matrix the squared error of its outputs on the calibration inputs as a share of
            the squared outputs; only for methods that use Gram matrices (swaps, reconstruction).
    """

    config: PruningConfig
    update: str
    masks: MaskSet = field(default_factory=MaskSet)
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)
    dense_sizes: dict[str, int] = field(default_factory=dict)
    dense_zeros: int = 0
    layer_errors: dict[str, float] = field(default_factory=dict)

    @property
    def coverage(self) -> float:
        """The share of the weights in the model's matrices that have a mask."""
        pruned = sum(weights for weights, _ in self.masks.counts().values())
        return pruned / ((pruned + sum(self.dense_sizes.values())) or 1)

    @property
    def overall_sparsity(self) -> float:
        """The share of zeros over all matrices of the model, including those left dense."""
        counts = self.masks.counts().values()
        weights = sum(weights for weights, _ in counts) + sum(self.dense_sizes.values())
        return (sum(zeros for _, zeros in counts) + self.dense_zeros) / (weights or 1)

    def note_coverage(self) -> None:
        """If less than half of the model's weights were pruned, add a note of what stayed dense and what to do."""
        if self.coverage >= 0.5:
            return
        by_reason: dict[str, dict[str, int]] = {}
        for name, size in self.dense_sizes.items():
            by_reason.setdefault(self.left_dense[name], {})[name] = size
        in_all = sum(self.dense_sizes.values()) / (1 - self.coverage)
        told = []
        for reason, sizes in sorted(by_reason.items(), key=lambda found: -sum(found[1].values()))[:3]:
            more = f" and {len(sizes) - 1} more" if len(sizes) > 1 else ""
            told.append(f"{sum(sizes.values()) / in_all:.1%} {reason} ({max(sizes, key=sizes.get)}{more})")
        self.note(
            f"only {self.coverage:.1%} of the weights in the model's matrices were pruned, so that "
            f"{self.overall_sparsity:.1%} of them are zero. Left dense: {'; '.join(told)}. To prune more, name layers "
            "in `targets`; the calibration data must reach them"
        )

    def note(self, note: str) -> None:
        """Add a sentence to the notes, once."""
        if note not in self.notes:
            self.notes.append(note)


@dataclass(frozen=True)
class DenseStatistics:
    """Input statistics of a dense model, collected once for any number of pruning runs of it."""

    parts: Parts
    kinds: frozenset[str]  # names from `statistics.KINDS`
    trace: Trace | None  # of the model; None without samples
    checksums: dict[str, str]  # by weight, to detect another or a changed model
    samples: int  # over all ranks
    seconds: float
    notes: tuple[str, ...] = ()

    def check(self, weights: Sequence[PrunableWeight], config: PruningConfig) -> None:
        """Raise a `ConfigError`, with the way out, if the statistics cannot be used for a configuration."""
        if config.needs_inputs and config.update != "none":
            raise ConfigError(
                f"statistics of the dense model can only be used with update 'none', not with '{config.update}': set "
                "update='none' in the configuration, or call `prune` with `batches`"
            )
        if config.allocation == "fisher":
            raise ConfigError(
                "allocation 'fisher' needs gradients of the model, which statistics do not hold: call `prune` with "
                "`batches`"
            )
        others = [name for name, own in checksums(weights).items() if self.checksums.get(name, own) != own]
        if others:
            raise ConfigError(
                f"the statistics are of another model, or this one has changed since: {others[0]} has other weights. "
                "Collect them again with `collect_statistics`, from the model that you prune, while it is dense"
            )
        lacking = sorted(config.statistics - self.kinds)
        unknown = [weight.name for weight in weights if weight.name not in self.parts]
        if lacking or (unknown and config.needs_inputs):
            what = f"{', '.join(lacking)} was not collected" if lacking else f"they lack {unknown[0]}"
            raise ConfigError(
                f"the statistics do not fit the configuration: {what}. Pass this configuration to `collect_statistics`"
            )


def checksums(weights: Sequence[PrunableWeight]) -> dict[str, str]:
    """For each weight its shape and the sum of its bits read as integers, which changes with its values.

    >>> from sparsefit.pruning.layers import matrices_of
    >>> layer = torch.nn.Linear(2, 1)
    >>> _ = layer.weight.data.fill_(1.0)
    >>> checksums(matrices_of(layer))
    {'weight': '(1, 2) 2130706432'}
    """
    first = {id(weight.parameter): weight for weight in reversed(weights)}
    sums = counted(first.values(), _sum_of_bits)
    return {weight.name: f"{weight.shape} {sums[first[id(weight.parameter)].name]}" for weight in weights}


def _sum_of_bits(weight: PrunableWeight) -> Tensor:
    held = shard_of(weight.parameter)
    return held.view(INTEGERS[held.element_size()]).sum(dtype=torch.int64)
