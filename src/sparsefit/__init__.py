"""Prune a network at fit start with Wanda, keep its masks fixed, recover it inside a GPU-hour budget."""

from sparsefit.pruning import MaskSet, PruningConfig, PruningResult, prune, register_score

__all__ = ["MaskSet", "PruningConfig", "PruningResult", "prune", "register_score"]
__version__ = "0.1.0"
