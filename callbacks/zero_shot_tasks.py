"""The zero-shot tasks that a run's report evaluates its models on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sparsefit.errors import ConfigError
from sparsefit.evaluation.zero_shot import Results, check_counts, load_tasks, mean_accuracy, zero_shot
from sparsefit.recovery.export import adapted_part, pretrained_part
from sparsefit.reporting.console import stage_progress

LEDGER_STAGE = "zero-shot tasks"
METRIC = "zero_shot_accuracy"
"""The mean accuracy over the tasks, a metric in the report."""


class ZeroShotTasks:
    """Zero-shot tasks, loaded once and evaluated on several models.

    Args:
        names: Names of lm-eval tasks; empty or None evaluates nothing.
        folder: Folder with the files of their items; None lets lm-eval download them.
        limit: Number of items per task; None takes all.
        batch_size: Requests sent through the model at once.

    Raises:
        ConfigError: if a number is not positive, or a folder is given without tasks.
    """

    stages = ("dense", "pruned", "reconstructed", "recovered")
    """The stages that are evaluated; "merged" is not, as it equals the recovered model up to rounding."""

    def __init__(self, names: Sequence[str] | None, folder: str | None, limit: int | None, batch_size: int) -> None:
        check_counts(limit, batch_size)
        if folder is not None and not names:
            raise ConfigError(f"there is a folder of tasks ({folder}) and no task: name those of the report's `tasks`")
        self.names = list(names or ())
        self.folder = folder
        self.limit = limit
        self.batch_size = batch_size
        self._tasks: dict[str, Any] = {}

    def load(self, module: nn.Module) -> None:
        """Read the items of all tasks, and check that they can be evaluated on the module.

        Raises:
            ConfigError: if lm-eval is not installed, a task is unknown, or there is no language model with a tokenizer.
            DataError: if items cannot be read.
        """
        if self.names and not self._tasks:
            self._parts(module)
            self._tasks = load_tasks(self.names, self.folder)

    def measure(self, module: nn.Module, stage: str, visible: bool) -> tuple[dict[str, float], Results]:
        """The mean accuracy under its metric name (empty if there is none), and the results of each task."""
        model, tokenizer = self._parts(module)
        with stage_progress(f"zero-shot tasks of the {stage} model", len(self._tasks), visible=visible) as advance:
            results = zero_shot(
                model, tokenizer, self._tasks, self.limit, self.batch_size, progress=lambda _: advance()
            )
        mean = mean_accuracy(results)
        return {} if mean is None else {METRIC: mean}, results

    def _parts(self, module: nn.Module) -> tuple[nn.Module, Any]:
        model = adapted_part(module)
        if model is None and (found := pretrained_part(module)) is not None:
            model = found[1]
        tokenizer = getattr(module, "tokenizer", None)
        if model is None or tokenizer is None:
            lacks = "model of transformers" if model is None else "`tokenizer`"
            raise ConfigError(
                f"zero-shot tasks need a language model of transformers and its tokenizer, and {type(module).__name__} "
                f"has no {lacks}: set one, or leave the tasks out"
            )
        return model, tokenizer
