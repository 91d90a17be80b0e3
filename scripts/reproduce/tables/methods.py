"""The pruning methods and sparsities that the tables compare."""

from __future__ import annotations

from sparsefit import register_score
from sparsefit.pruning.scores import Products
from tables.setup import Settings

SPARSITIES: dict[str, Settings] = {
    "50%": {"sparsity": 0.5},
    "60%": {"sparsity": 0.6},
    "4:8": {"pattern": "4:8"},
    "2:4": {"pattern": "2:4"},
}
PAPERS = ("50%", "4:8", "2:4")
"""The sparsities that the paper compares throughout."""

# Layer errors are computed from Gram matrices, which Wanda alone does not collect.
register_score("wanda_with_errors", lambda weight, norm, _: Products(weight, norm.sqrt()), ("squared_norm", "gram"))
SPARSEGPT: Settings = {"score": "sparsegpt", "reconstruction": "iterative"}
METHODS: dict[str, Settings] = {
    "magnitude": {"score": "magnitude"},
    "SparseGPT": SPARSEGPT,
    "Wanda": {},
    "Wanda, variant": {"granularity": "variant"},
    "RIA": {"score": "ria"},
    "Wanda, OWL": {"allocation": "owl"},
    "Wanda, Fisher": {"allocation": "fisher"},
    "Wanda, 10 swaps": {"swaps": 10},
    "Wanda, 100 swaps": {"swaps": 100},
    "Wanda, sequential update": {"reconstruction": "sequential"},
    "Wanda, least squares": {"reconstruction": "least_squares"},
    "Wanda, 10 swaps, least squares": {"swaps": 10, "reconstruction": "least_squares"},
    "Wanda, OWL, 10 swaps, least squares": {"allocation": "owl", "swaps": 10, "reconstruction": "least_squares"},
    "Wanda, Fisher, 10 swaps, least squares": {"allocation": "fisher", "swaps": 10, "reconstruction": "least_squares"},
}
COMPARED = ("magnitude", "SparseGPT", "Wanda", "Wanda, 10 swaps, least squares")
"""The paper's three methods, and the project's best one that also does N:M."""


def cell(row: Settings, column: Settings) -> Settings | None:
    """The settings of a cell, or None where they contradict each other."""
    settings = row | column
    fixed = "pattern" in settings and ("allocation" in settings or settings.get("granularity") == "variant")
    return None if fixed else settings
