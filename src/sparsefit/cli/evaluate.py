"""`sparsefit evaluate MODEL` measures zero-shot tasks and the perplexity of a saved language model."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table

from sparsefit.callbacks.run_folder import RunFolder
from sparsefit.cli.input_errors import Parser
from sparsefit.cli.library_output import silence_libraries
from sparsefit.cli.merge import recovered_model
from sparsefit.cli.model_data_checks import check_vocabulary
from sparsefit.errors import ConfigError, DataError
from sparsefit.evaluation.perplexity import perplexity
from sparsefit.evaluation.zero_shot import check_counts, load_tasks, mean_accuracy, zero_shot
from sparsefit.machine import machine, versions
from sparsefit.pruning import MaskSet
from sparsefit.reporting.console import console, stage_progress
from sparsefit.reporting.report import write_json
from sparsefit.reporting.run_tables import task_rows, truncated_notes, with_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WINDOW = 2048  # tokens; the papers' window, if the context is long enough


def evaluate(arguments: list[str]) -> int:
    """Evaluate a model and print the results; `--output` also writes them as JSON."""
    given = _parsed(arguments)
    silence_libraries()
    names = [name.strip() for name in (given.tasks or "").split(",") if name.strip()]
    if not names and given.perplexity is None:
        raise ConfigError("there is nothing to evaluate: give --tasks NAMES, --perplexity FILE, or both")
    if given.tasks_folder is not None and not names:
        raise ConfigError("--tasks-folder holds the items of tasks: name the tasks with --tasks")
    if given.output is not None and given.output.is_dir():
        raise ConfigError(f"--output {given.output} is a folder: name a JSON file to write")
    device = named_device(given.device)
    check_counts(given.limit, given.batch_size)
    tasks = load_tasks(names, given.tasks_folder) if names else {}  # before a large model is loaded
    model, tokenizer, source = _load(given.model, given.dtype)
    batches = _windows(given.perplexity, tokenizer, model, given) if given.perplexity is not None else []
    model.to(device)
    console.print(f"{source}: {model.dtype} on {model.device}".replace("torch.", ""), markup=False, soft_wrap=True)

    report: dict[str, Any] = {"model": given.model, "evaluated": source}
    report |= {"dtype": str(model.dtype).removeprefix("torch."), "limit": given.limit, "batch_size": given.batch_size}
    report |= {"command": shlex.join(["sparsefit", "evaluate", *arguments])}
    report |= {"versions": versions(), "machine": machine()}
    if batches:
        with stage_progress("perplexity", len(batches)) as advance:
            value = perplexity(model, batches, lambda _: advance())
        length = batches[0]["input_ids"].shape[1]
        windows = sum(len(batch["input_ids"]) for batch in batches)
        report["perplexity"] = {"value": value, "text": given.perplexity, "length": length, "windows": windows}
    if tasks:
        with stage_progress("zero-shot tasks", len(tasks)) as advance:
            report["tasks"] = zero_shot(model, tokenizer, tasks, given.limit, given.batch_size, lambda _: advance())
        report["mean_acc"] = mean_accuracy(report["tasks"])
    _print_results(report)
    if given.output is not None:
        console.print(f"written to {write_json(report, given.output)}", markup=False, soft_wrap=True)
    return 0


def _print_results(report: dict[str, Any]) -> None:
    if text := report.get("perplexity"):
        windows = f"{text['windows']:,} windows of {text['length']:,} tokens"
        console.print(f"perplexity: {text['value']:.4f} on {text['text']}, {windows}", markup=False, soft_wrap=True)
    if not report.get("tasks"):
        return
    rows = {(row.task, row.metric): row for row in task_rows({"tasks": {"dense": report["tasks"]}})}
    table = Table("task", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("acc", "acc_norm", "items", "version"):
        table.add_column(column, justify="right")
    for task, results in report["tasks"].items():
        found = (rows.get((task, metric)) for metric in ("acc", "acc_norm"))
        accuracies = (with_error(row.accuracies["dense"] if row is not None else None, "-") for row in found)
        table.add_row(task, *accuracies, f"{results['items']:,}", str(results["version"]))
    if report["mean_acc"] is not None:
        table.add_section()
        table.add_row("mean", f"{report['mean_acc']:.2%}", style="bold")
    console.print(table)
    for note in truncated_notes(list(rows.values())):
        console.print(note, markup=False, soft_wrap=True)


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "sparsefit evaluate",
        description="Measure zero-shot tasks (with lm-eval) and the perplexity of a saved language model. Of a run, "
        "the recovered model is measured, or the pruned one if nothing was trained.",
    )
    parser.add_argument("model", help="a run folder, a model folder in Hugging Face layout, or a name on the hub")
    parser.add_argument("--tasks", help="lm-eval's tasks, separated by commas: boolq,rte,hellaswag,winogrande,...")
    parser.add_argument("--tasks-folder", help="a folder with the tasks' data files, for use without the hub")
    parser.add_argument("--limit", type=int, help="evaluate only the first LIMIT items of each task")
    parser.add_argument("--perplexity", metavar="SOURCE", help="a text, named as in a recipe: a file, or wikitext:FILE")
    parser.add_argument("--length", type=int, help=f"tokens per window; by default the context, at most {_WINDOW}")
    parser.add_argument("--batch-size", type=int, default=8, help="windows or task items per batch; by default 8")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16; by default the saved model's")
    parser.add_argument("--device", help="cpu, cuda or cuda:1; by default a GPU if there is one")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    return parser.parse_args(arguments)


def _load(name: str, dtype: str) -> tuple[Any, PreTrainedTokenizerBase | None, str]:
    """The model, its tokenizer, and which part of the run it is."""
    from sparsefit.modules.loading import find_tokenizer, load_causal_lm, torch_dtype

    run = RunFolder(Path(name).expanduser())
    if not run.holds_run():
        return load_causal_lm(name, dtype), find_tokenizer(name), name
    if not run.model.is_dir() and run.adapter.is_dir():
        model, base = recovered_model(run, MaskSet.load(run.masks))
        model = model.eval() if dtype == "auto" else model.eval().to(torch_dtype(dtype))
        return model, find_tokenizer(str(base)), f"{base} with {run.adapter}"
    found = next((place for place in (run.model, run.trained_base, run.base) if place.is_dir()), None)
    if found is None:
        raise ConfigError(f"the run in {run.path} has written no model: it ended before pruning")
    return load_causal_lm(str(found), dtype), find_tokenizer(str(found)), str(found)


def named_device(name: str | None) -> torch.device:
    """The named device, by default a GPU if there is one.

    Raises:
        ConfigError: if it does not exist.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an invalid name, or a missing device
        raise ConfigError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _windows(
    source: str, tokenizer: PreTrainedTokenizerBase | None, model: Any, given: argparse.Namespace
) -> list[Any]:
    """Windows of the text in batches, cut like a recipe's test data."""
    from sparsefit.data.text import shards_of
    from sparsefit.data.windows import Windows, evaluation_windows, loader

    if tokenizer is None:
        raise ConfigError(f"there is no tokenizer in the folder of the model {given.model} to read {source} with")
    check_vocabulary(model, tokenizer)
    context = getattr(model.config, "max_position_embeddings", None) or _WINDOW
    length = given.length or min(context, _WINDOW)
    if length < 2:
        raise ConfigError(f"--length {length}: a window needs at least 2 tokens")
    windows = list(evaluation_windows(shards_of(source), tokenizer, length))
    if not windows:
        raise DataError(f"{source} has fewer than the {length} tokens of one window: give a longer text, or --length")
    return list(loader(Windows(windows), given.batch_size, num_workers=0))
