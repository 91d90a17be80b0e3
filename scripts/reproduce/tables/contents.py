"""All tables and figures by name, and the functions that measure their points."""

from __future__ import annotations

from collections.abc import Callable

from tables import figures, finetuning, perplexities, selection_time, speedup, zero_shot
from tables.layout import Table
from tables.perplexities import grid_table
from tables.pruned_models import PrunedModels, measure_perplexity
from tables.setup import Figures, Point

MEASURES: dict[str, Callable[[PrunedModels, Point], Figures]] = {
    "perplexity": measure_perplexity,
    "task": zero_shot.measure,
    "selection": selection_time.measure,
    "speedup": speedup.measure,
    "finetuning": finetuning.measure,
}

# Tables have names, as versions of the paper number them differently.
TABLES: dict[str, Table] = {
    "perplexity": grid_table("Perplexity of pruned models", perplexities.METHODS_GRID),
    "zero-shot": zero_shot.TABLE,
    "time": selection_time.TABLE,
    "speedup": speedup.TABLE,
    "finetuning": finetuning.TABLE,
    "groups": grid_table("Metric and comparison group, 50%", perplexities.GROUPS_GRID),
    "updates": grid_table("Weight update", perplexities.UPDATES_GRID),
    "sparsities": figures.SPARSITIES_TABLE,
    "samples": figures.SAMPLES_TABLE,
    "seeds": Table("Calibration sets", perplexities.seeds_points, perplexities.render_seeds),
}
"""Tables in the paper."""

MORE_TABLES: dict[str, Table] = {
    "costs": Table("Seconds, layer errors and sparsity counted", perplexities.costs_points, perplexities.render_costs),
    "norms": grid_table("Norm of the inputs", perplexities.NORMS_GRID),
    "orders": grid_table("Order: what the statistics come from", perplexities.ORDERS_GRID),
    "allocation": grid_table("Allocation of the sparsity", perplexities.ALLOCATION_GRID),
}
"""Tables that are not in the paper; `--tables all` does not make them."""
