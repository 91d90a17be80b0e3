"""Choosing which weights to prune, and keeping them at zero: functions on tensors that work for any torch module."""

from sparsefit.pruning.config import Pattern, PruningConfig
from sparsefit.pruning.masks import MaskSet
from sparsefit.pruning.prune import collect_statistics, prune, prune_from_statistics
from sparsefit.pruning.results import DenseStatistics, PruningResult
from sparsefit.pruning.scores import register_score

__all__ = [
    "DenseStatistics",
    "MaskSet",
    "Pattern",
    "PruningConfig",
    "PruningResult",
    "collect_statistics",
    "prune",
    "prune_from_statistics",
    "register_score",
]
