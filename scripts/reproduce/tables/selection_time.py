"""Measures the time to choose the weights to prune, without the passes of the data through the model.

The statistics of all layers are held at once, including Gram matrices: about twice the bytes of a Llama's blocks in
half precision. `--rows magnitude Wanda` needs none of these.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import nn

from sparsefit import DenseStatistics, PruningConfig, collect_statistics, prune_from_statistics
from tables.layout import Table, markdown
from tables.methods import COMPARED, METHODS, PAPERS, SPARSITIES
from tables.pruned_models import PrunedModels, counted_sparsity
from tables.setup import Figures, Point, Setup
from tables.store import Store


def point_of(setup: Setup, method: str, sparsity: str) -> Point:
    """The point of a method at a sparsity. All points share the statistics of the dense model."""
    settings = METHODS[method] | SPARSITIES[sparsity] | {"update": "none"}
    return setup.point("selection", settings, repeats=setup.repeats)


def cells_of(setup: Setup) -> dict[str, list[str]]:
    """The requested sparsities of each method."""
    found = {method: [sparsity for sparsity in PAPERS if setup.wanted(method, sparsity)] for method in COMPARED}
    return {method: sparsities for method, sparsities in found.items() if sparsities}


def points(setup: Setup) -> list[Point]:
    """All cells."""
    return [point_of(setup, method, sparsity) for method, cells in cells_of(setup).items() for sparsity in cells]


def measure(models: PrunedModels, point: Point) -> Figures:
    """The median seconds from statistics to pruned weights. With several repeats, a further first one is ignored."""
    config, model = PruningConfig(**point["pruning"]), models.dense()
    statistics = statistics_of(models, model)
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    taken = []
    for _ in range(point["repeats"] + (point["repeats"] > 1)):
        restore(model, dense)
        synchronize(models.setup.device)
        start = time.perf_counter()
        result = prune_from_statistics(model, statistics, config)
        synchronize(models.setup.device)
        taken.append(time.perf_counter() - start)
    return {"seconds": median(taken[1:] or taken), "sparsity": counted_sparsity(model, result)}


def statistics_of(models: PrunedModels, model: nn.Module) -> DenseStatistics:
    """The statistics that all cells need, collected once per command."""
    if "statistics" not in models.shared:
        setup = models.setup
        configs = [PruningConfig(**point["pruning"]) for point in points(setup)]
        models.shared["statistics"] = collect_statistics(model, models.windows(setup.seed, setup.samples), configs)
    return models.shared["statistics"]


@torch.no_grad()
def restore(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Restore the weights of a model."""
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])


def synchronize(device: str) -> None:
    """Wait for the work on a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def render(setup: Setup, store: Store) -> str:
    """The table of seconds."""
    lines = []
    for method, cells in cells_of(setup).items():
        found = {cell: store[point_of(setup, method, cell)]["seconds"] for cell in cells}
        lines.append([method, *(f"{found[cell]:.3f}" if cell in found else "-" for cell in PAPERS)])
    note = (
        "From the inputs' statistics to pruned weights; taking the statistics, which goes with the forward passes, is "
        f"left out, as in the paper. Medians of {setup.repeats}.\n"
    )
    return markdown(["seconds", *PAPERS], lines) + f"\n{note}"


TABLE = Table("Seconds to choose what to prune", points, render)
