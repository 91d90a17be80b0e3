"""Choosing and keeping sparse weights: a library of pure functions on tensors, for any torch module."""

from sparsefit.pruning.config import Pattern, PruningConfig
from sparsefit.pruning.masks import MaskSet
from sparsefit.pruning.prune import PruningResult, prune
from sparsefit.pruning.scores import register_score

__all__ = ["MaskSet", "Pattern", "PruningConfig", "PruningResult", "prune", "register_score"]
