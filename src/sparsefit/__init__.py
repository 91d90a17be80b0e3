"""Prune a network at fit start with Wanda, keep its masks fixed, recover it inside a GPU-hour budget."""

from sparsefit.pruning import MaskSet, PruningConfig, PruningResult, prune

__all__ = ["MaskSet", "PruningConfig", "PruningResult", "prune"]
__version__ = "0.1.0"
