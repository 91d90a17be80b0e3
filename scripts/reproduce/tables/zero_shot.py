"""Accuracies of the dense and pruned models on the paper's seven zero-shot tasks."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from sparsefit.errors import ConfigError
from sparsefit.evaluation.zero_shot import TASKS, check_harness, load_tasks, zero_shot
from tables.layout import Table, markdown
from tables.methods import COMPARED, METHODS, PAPERS, SPARSITIES
from tables.pruned_models import PrunedModels
from tables.setup import Figures, Point, Settings, Setup
from tables.store import Store


def rows_of(setup: Setup) -> dict[str, Settings | None]:
    """The requested pruned models, and the dense one."""
    rows = {
        f"{method}, {sparsity}": METHODS[method] | SPARSITIES[sparsity]
        for sparsity in PAPERS
        for method in COMPARED
        if setup.wanted(method, sparsity)
    }
    return {"dense": None, **rows} if rows else {}


def point_of(setup: Setup, settings: Settings | None, task: str) -> Point:
    """One model on one task."""
    return setup.point("task", settings, task=task, limit=setup.limit, items=setup.tasks_folder or "hub")


def points(setup: Setup) -> list[Point]:
    """All points, model by model, so that each is pruned only once."""
    return [point_of(setup, settings, task) for settings in rows_of(setup).values() for task in TASKS]


def measure(models: PrunedModels, point: Point) -> Figures:
    """The accuracies of a model on a task, measured with lm-eval."""
    tasks = load_tasks([point["task"]], models.setup.tasks_folder)
    model, account = models.model(point)
    return account | zero_shot(model, models.tokenizer, tasks, point["limit"])[point["task"]]


def render(setup: Setup, store: Store) -> str:
    """Accuracies in percent."""
    lines = []
    for name, settings in rows_of(setup).items():
        found = [store[point_of(setup, settings, task)]["acc"] for task in TASKS]
        lines.append([name, *(f"{100 * acc:.1f}" for acc in found), f"{100 * mean(found):.1f}"])
    dense = [store[point_of(setup, None, task)] for task in TASKS]
    items = [f"{found['items']:,}" for found in dense]
    errors = [f"{100 * found['acc_stderr']:.1f}" for found in dense]
    lines += [["standard error of dense", *errors, "-"], ["items", *items, "-"]]
    return markdown(["acc, %", *TASKS, "mean"], lines)


def problem(setup: Setup) -> str | None:
    """Why the tasks cannot be run, or None if they can."""
    if setup.tasks_folder is not None and not Path(setup.tasks_folder).is_dir():
        return f"there is no folder {setup.tasks_folder}"
    try:
        check_harness()
    except ConfigError as error:
        return str(error)
    return None


TABLE = Table("Zero-shot tasks", points, render, problem=problem)
