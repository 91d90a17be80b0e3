"""Choosing and keeping sparse weights: a library of pure functions on tensors, for any torch module."""

from sparsefit.pruning.config import Pattern, PruningConfig
from sparsefit.pruning.masks import MaskSet
from sparsefit.pruning.prune import DenseStatistics, PruningResult, calibrate, prune
from sparsefit.pruning.scores import register_score

__all__ = [
    "DenseStatistics",
    "MaskSet",
    "Pattern",
    "PruningConfig",
    "PruningResult",
    "calibrate",
    "prune",
    "register_score",
]
