"""Zero-shot tasks with lm-eval, the harness that papers on pruning use.

Prompts, metrics and standard errors are the harness's own. Without the hub its tasks read their items from local
files; nothing else about them changes.
"""

from __future__ import annotations

import copy
import difflib
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsefit.errors import ConfigError, DataError
from sparsefit.evaluation.perplexity import evaluation_mode
from sparsefit.evaluation.task_rows import TASK_FILES, read_rows, task_file
from sparsefit.extras import missing
from sparsefit.settings import number

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase

TASKS = tuple(TASK_FILES)
"""The seven tasks of the papers of SparseGPT and Wanda."""

Results = dict[str, dict[str, Any]]

# The harness's folders of these tasks: reading its whole index takes seconds.
_FOLDERS = ("super_glue/boolq", "glue/rte", "hellaswag", "winogrande", "arc", "openbookqa")
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def load_tasks(names: Sequence[str], folder: str | Path | None = None) -> dict[str, Task]:
    """Load tasks of the harness by name, with their items.

    Args:
        names: tasks of the harness; without a folder also its groups and tags.
        folder: a folder with files for tasks of `TASKS`; None lets the harness download its data sets from the hub.

    Raises:
        ConfigError: if lm-eval is not installed, or the harness has no such task.
        DataError: if items cannot be read or fetched.
    """
    check_harness()
    if not names:
        raise ConfigError(f"there are no tasks to evaluate: name some, such as {', '.join(TASKS)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"a task is named twice: {', '.join(names)}")
    files = {name: task_file(name, Path(folder).expanduser()) for name in names} if folder is not None else {}
    specs = [_with_rows(name, files[name]) if name in files else name for name in names]
    with _harness_isolated():
        tasks = _loaded(names, specs)
        for task in tasks.values():  # as the harness does before it evaluates
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(0)
    for name, file in files.items():
        tasks[name].source = str(file)
    return tasks


def check_harness() -> None:
    """Check that lm-eval can be used.

    Raises:
        ConfigError: if it is not installed; names the extra that installs it.
    """
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"zero-shot tasks need {missing('lm_eval')} ({error})") from error


def zero_shot(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Mapping[str, Task],
    limit: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Results:
    """Evaluate a causal language model on tasks with the harness.

    The model is called as it is, on its device and under the caller's autocast; afterwards modes, weights and tokenizer
    are unchanged.

    Args:
        model: a transformers model, PEFT-wrapped or not.
        tokenizer: the model's tokenizer.
        tasks: tasks from `load_tasks`; they can be reused.
        limit: evaluate only this many first items of each task; None takes all.
        batch_size: requests in a batch.
        progress: called with the number of tasks done, after each of them.

    Returns:
        For each task its metrics ("acc", "acc_norm", ...) and their standard errors ("acc_stderr", ...), the number of
        "items", the "version" of the task in the harness, the examples in the prompt ("shots"), how many requests were
        longer than the model's context and lost their beginning ("truncated"), and the "source" of the items.

    Raises:
        ConfigError: if it is not a transformers model, there is no tokenizer, or a number is not positive.
    """
    check_counts(limit, batch_size)
    if not hasattr(model, "config"):
        raise ConfigError(f"zero-shot tasks need a transformers language model, which {type(model).__name__} is not")
    if tokenizer is None:
        raise ConfigError(
            f"zero-shot tasks need the tokenizer of {type(model).__name__}, and there is none: save it with the "
            "model (tokenizer.save_pretrained), or set the module's `tokenizer`"
        )
    from lm_eval.evaluator import evaluate

    results: Results = {}
    with evaluation_mode(model), _harness_isolated():
        harness = _harness_model(model, tokenizer, batch_size)
        for number, (name, task) in enumerate(tasks.items(), 1):
            told = evaluate(harness, {"tasks": {name: task}}, limit=limit, log_samples=False)
            results[name] = _figures(told["results"][name]) | {
                "items": told["n-samples"][name]["effective"],
                "version": told["versions"].get(name),
                "shots": told["n-shot"].get(name),
                "truncated": _truncated(harness, task),
                "source": getattr(task, "source", None) or task.config.dataset_path,
            }
            if progress is not None:
                progress(number)
    return results


def check_counts(limit: int | None, batch_size: int) -> None:
    """Check `limit` and `batch_size` of `zero_shot`.

    Raises:
        ConfigError: if one is not a positive whole number.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None:
            number(name, value, least=1, whole=True)


def mean_accuracy(results: Results) -> float | None:
    """The mean of "acc" over the tasks that have it, as reported in papers on pruning; None if no task has it.

    >>> mean_accuracy({"boolq": {"acc": 0.5}, "hellaswag": {"acc": 0.25, "acc_norm": 0.5}})
    0.375
    """
    found = [task["acc"] for task in results.values() if task.get("acc") is not None]
    return sum(found) / len(found) if found else None


@contextmanager
def _harness_isolated() -> Iterator[None]:
    """Restore the random state after the harness has run; hide its log messages, and its progress bars unless stderr is
    a terminal."""
    from lightning.pytorch.utilities.seed import isolate_rng

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with isolate_rng(), redirect_stderr(sys.stderr if sys.stderr.isatty() else StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _with_rows(name: str, file: Path) -> dict[str, Any]:
    """The changed settings of a task whose items are in a file: its data set, which has a single split."""
    from datasets import Dataset, DatasetDict

    split = TASK_FILES[name].split
    items = DatasetDict({split: Dataset.from_list(read_rows(name, file))})
    # The harness passes the task's metadata to the function.
    changes: dict[str, Any] = {"task": name, "custom_dataset": lambda **_: items}
    return changes | {key: split if key == f"{split}_split" else None for key in _SPLITS}


def _loaded(names: Sequence[str], specs: Sequence[str | dict[str, Any]]) -> dict[str, Task]:
    import lm_eval.tasks

    # A task inside a group can override some settings; outside one, it would need all of them.
    wanted = [{"group": "sparsefit", "task": [spec]} if isinstance(spec, dict) else spec for spec in specs]
    places = [Path(lm_eval.tasks.__file__).parent / folder for folder in _FOLDERS]
    index = lm_eval.tasks.TaskManager(include_defaults=False, include_path=places)
    if not set(names) <= set(index.all_tasks):
        index = lm_eval.tasks.TaskManager()
    for name in names:
        if name not in index.all_tasks:
            near = difflib.get_close_matches(name, index.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"those of the papers are {', '.join(TASKS)}"
            raise ConfigError(f"lm-eval has no task {name!r}: {hint}")
    try:
        return dict(index.load(wanted)["tasks"])
    except Exception as error:  # from the hub client, `datasets` or a task's own code
        text = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            f"cannot load the tasks {', '.join(names)}: {text or type(error).__name__}. Without the hub, give a folder "
            f"with files of the items (for {', '.join(TASKS)})"
        ) from error


def _harness_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The harness's wrapper class around an existing transformers model."""
    from lm_eval.models.huggingface import HFLM

    device = next(model.parameters()).device.type
    # The harness disables the caller's autocast unless it is given the dtype.
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    own = copy.deepcopy(tokenizer)  # the harness sets its padding token
    own.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True  # the harness truncates
    return HFLM(_CallableModel(model), tokenizer=own, batch_size=batch_size, mixed_precision_dtype=autocast)


class _CallableModel:
    """A model that is not a torch module: the harness would tie the weights of a module again, in the middle of a
    fit."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _truncated(harness: Any, task: Task) -> int:
    """How many of the requests that were just evaluated were too long for the model."""
    texts = ("".join(request.args) for request in task.instances if request.request_type == "loglikelihood")
    return sum(len(harness.tok_encode(text)) > harness.max_length + 1 for text in texts)


def _figures(told: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of a task by metric; names lose their filter if it is "none" ("acc,none" becomes "acc")."""
    found: dict[str, float | None] = {}
    for key, value in told.items():
        metric, _, kind = key.partition(",")
        if kind and isinstance(value, int | float):
            number = float(value)
            found[metric if kind == "none" else key] = number if math.isfinite(number) else None
    return found
