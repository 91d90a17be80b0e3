"""Prune a network at fit start with Wanda, keep its masks fixed, recover it inside a GPU-hour budget."""

from sparsefit.pruning import (
    DenseStatistics,
    MaskSet,
    PruningConfig,
    PruningResult,
    collect_statistics,
    prune,
    prune_from_statistics,
    register_score,
)
from sparsefit.pruning.targets import CHECKS
from sparsefit.recovery.tuners import check_tuners

CHECKS.append(check_tuners)

__all__ = [
    "DenseStatistics",
    "MaskSet",
    "PruningConfig",
    "PruningResult",
    "collect_statistics",
    "prune",
    "prune_from_statistics",
    "register_score",
]
__version__ = "0.1.0"
