"""`sparsefit speed RUN` measures the speed and memory of a pruned model against its dense twin."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from sparsefit.cli.evaluate import named_device
from sparsefit.cli.input_errors import Parser
from sparsefit.cli.library_output import silence_libraries
from sparsefit.errors import ConfigError
from sparsefit.machine import machine, versions
from sparsefit.pruning import MaskSet
from sparsefit.recovery.inspection import masks_beside, weight_files
from sparsefit.recovery.run_files import check_ended
from sparsefit.reporting.console import console, stage_progress
from sparsefit.reporting.formats import size
from sparsefit.reporting.report import write_json
from sparsefit.serving.decoders import check_cache
from sparsefit.serving.dense_twin import zeros_as_masks
from sparsefit.serving.runtimes import RUNTIMES
from sparsefit.serving.speed_comparison import Row, Settings, compare, verdict
from sparsefit.serving.timing import PHASES, Speed
from sparsefit.settings import number


def speed(arguments: list[str]) -> int:
    """Measure each installed runtime and print a table and a conclusion; `--json` also writes them."""
    given = _parsed(arguments)
    names = _runtimes(given.runtimes)
    device = named_device(given.device)
    if given.processor_time and (device.type != "cpu" or given.threads != 1):
        raise ConfigError("--processor-time needs one thread on the CPU: also give --threads 1 --device cpu")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    check_ended(given.folder)
    source = weight_files(given.folder)[0].parent
    silence_libraries()
    model, masks = _load(source, given.dtype, device)
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is not None and given.prompt + given.tokens > length:
        raise ConfigError(f"--prompt {given.prompt} and --tokens {given.tokens} exceed the model's {length} positions")
    clock = time.process_time if given.processor_time else time.perf_counter
    settings = Settings(given.batch_sizes, given.prompt, given.tokens, given.repeats, clock)
    kind = str(model.dtype).removeprefix("torch.")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    console.print(f"{source}: {kind} on {device}{threads}; its dense twin has no zeros", markup=False, soft_wrap=True)

    rows: list[Row] = []
    not_run = {name: why for name in names if (why := RUNTIMES[name].why_not(model, masks))}
    for name in names:
        if name in not_run:
            continue
        units = 2 * len(settings.batch_sizes) * (settings.repeats + 1)
        with stage_progress(name, units) as advance:
            try:
                for row in compare(model, masks, RUNTIMES[name], settings, advance):
                    rows.append(row)
            except Exception as error:  # errors differ by library; other runtimes are still measured
                not_run[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    sentence = verdict(rows)
    measured = {row.runtime for row in rows}
    lines = [f"{name}: {'failed' if name in measured else 'not run'}, {why}" for name, why in not_run.items()]
    lines += [*notes, sentence]
    if rows:
        console.print(_table(rows))
        lines[:0] = [_weights(rows), _differences(rows)]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    if given.json is not None:
        report: dict[str, Any] = {"command": shlex.join(["sparsefit", "speed", *arguments]), "model": str(source)}
        report |= {"dtype": kind, "device": str(device), "threads": torch.get_num_threads()}
        report |= {"clock": "processor" if given.processor_time else "wall"}
        report |= {"prompt": settings.prompt, "tokens": settings.tokens, "rows": [row.as_json() for row in rows]}
        report |= {"not_run": not_run, "notes": notes, "verdict": sentence}
        report |= {"versions": versions(), "machine": machine()}
        console.print(f"written to {write_json(report, given.json)}", markup=False, soft_wrap=True)
    return 0


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "sparsefit speed",
        description="Measure a pruned language model against its dense twin (the same model with random weights for "
        "zeros) in each installed runtime: tokens per second in prefill and decode, and memory of the weights.",
    )
    parser.add_argument("folder", type=Path, help="a run folder, or a model folder in Hugging Face layout")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], metavar="N", help="by default 1 8")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens (prefill); by default 128")
    parser.add_argument("--tokens", type=int, default=32, help="generated tokens (decode); by default 32")
    parser.add_argument("--repeats", type=int, default=5, help="repeats, of which the median is reported; by default 5")
    parser.add_argument("--runtimes", help=f"separated by commas; by default all: {','.join(RUNTIMES)}")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16; by default the saved model's")
    parser.add_argument("--device", help="cpu, cuda or cuda:1; by default a GPU if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads of every runtime; by default those of torch")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure processor time instead of wall time, for a machine with other work; needs one CPU thread",
    )
    parser.add_argument("--json", type=Path, help="a JSON file for all results")
    given = parser.parse_args(arguments)
    counts = {
        "--prompt": given.prompt,
        "--tokens": given.tokens,
        "--repeats": given.repeats,
        "--threads": given.threads,
    }
    counts |= {f"--batch-sizes[{place}]": value for place, value in enumerate(given.batch_sizes)}
    for name, value in counts.items():
        if value is not None:
            number(name, value, least=1, whole=True)
    if given.json is not None and given.json.is_dir():
        raise ConfigError(f"--json {given.json} is a folder: name a file to write")
    return given


def _runtimes(names: str | None) -> list[str]:
    chosen = list(RUNTIMES) if names is None else [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in RUNTIMES]:
        raise ConfigError(f"--runtimes: there is no {unknown[0]!r}; there are {', '.join(RUNTIMES)}")
    return chosen


def _load(source: Path, dtype: str, device: torch.device) -> tuple[Any, MaskSet]:
    from sparsefit.modules.loading import load_causal_lm

    model = load_causal_lm(str(source), dtype)
    masks = masks_beside(source)
    if masks is None:
        masks = zeros_as_masks(model)
    masks.verify(model)
    if not masks:
        raise ConfigError(f"the model in {source} has no zeros, so there is no pruning to measure")
    check_cache(model)
    return model.to(device), masks


def _table(rows: Iterable[Row]) -> Table:
    table = Table("runtime", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("batch", "phase", "dense", "pruned", "times"):
        table.add_column(column, justify="right")
    for row in rows:
        for phase in PHASES:
            speeds = _tokens(row.dense[phase]), _tokens(row.pruned[phase])
            table.add_row(row.runtime, str(row.batch), phase, *speeds, f"{row.ratio(phase):.2f}")
    table.caption = "tokens per second: median ± half the range between the slowest and the fastest repeat"
    return table


def _weights(rows: Iterable[Row]) -> str:
    """Memory of the weights, independent of the batch size."""
    by_runtime = {row.runtime: (row.dense_bytes, row.pruned_bytes) for row in rows}
    parts = [f"{size(pruned)} in {name} (dense {size(dense)})" for name, (dense, pruned) in by_runtime.items()]
    return f"weights in memory: {', '.join(parts)}"


def _differences(rows: Iterable[Row]) -> str:
    """The largest difference of each runtime's logits from plain torch's."""
    found = {row.runtime: row.difference for row in rows}
    differences = ", ".join(f"{name} {difference:.1e}" for name, difference in found.items())
    return f"largest difference from torch's logits, relative to the largest logit: {differences}"


def _tokens(speed: Speed) -> str:
    slowest, fastest = speed.spread
    return f"{speed.median:,.0f} ±{(fastest - slowest) / 2 / speed.median:.0%}"
