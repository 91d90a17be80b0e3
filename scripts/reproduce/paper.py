"""Makes the tables and figures of the Wanda paper (arXiv 2306.11695) for any causal language model.

    python scripts/reproduce/paper.py --tables all --model embedded --output runs/paper
    python scripts/reproduce/paper.py --tables all --model smollm2 --quick
    python scripts/reproduce/paper.py --tables perplexity seeds --model meta-llama/Llama-3.2-1B --dtype bfloat16

`--model` is embedded (the package's), tinystories, smollm2, or any folder, file or hub name. A named model is
calibrated on C4 and evaluated on WikiText-2, from the hub or from files in `--data` (c4_sample/, wikitext2/,
zeroshot/). Every finished point is kept in OUTPUT/points.jsonl, so an interrupted command continues.
Writes OUTPUT/tables.md, and each figure as PNG, SVG and CSV. Zeros are counted on the weights after each pruning.

`--quick` takes 32 calibration samples of 512 tokens, 8 test windows and 50 items a task: enough to check that all works
and how methods rank, too little to compare figures with published ones.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
import time
import warnings
from pathlib import Path

import torch
from tables.contents import MEASURES, MORE_TABLES, TABLES
from tables.layout import Table
from tables.pruned_models import PrunedModels, device_of
from tables.setup import FULL, QUICK, Point, Setup, default_texts, presets
from tables.store import Store

from sparsefit.cli.library_output import interrupts, silence_libraries
from sparsefit.errors import ConfigError, SparsefitError
from sparsefit.machine import machine, versions

ALL = TABLES | MORE_TABLES


def main() -> int:
    """Command line."""
    args = parsed(sys.argv[1:])
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    silence_libraries()
    try:
        with interrupts():
            names = list(TABLES) if "all" in args.tables else args.tables
            made = run(setup_of(args), {name: ALL[name] for name in names}, args.output)
    except SparsefitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: the same command continues from {args.output}/points.jsonl", file=sys.stderr)
        return 130
    return 0 if made else 1


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=["all", *ALL], default=["all"], metavar="NAME",
                        help=f"all ({', '.join(TABLES)}), some of them, or {', '.join(MORE_TABLES)}")  # fmt: skip
    parser.add_argument("--model", default="embedded", help=f"{', '.join(presets(Path('data')))}, or a model's name")
    parser.add_argument("--output", type=Path, default=Path("runs/paper"))
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of local texts and task items")
    parser.add_argument("--quick", action="store_true", help="small sizes, see above, unless others are given")
    parser.add_argument("--samples", type=int, help="calibration windows (128)")
    parser.add_argument("--length", type=int, help="tokens in a window (2048)")
    parser.add_argument("--windows", type=int, help="test windows (all)")
    parser.add_argument("--most-samples", type=int, help="largest number in the figure on calibration samples (256)")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the table on seeds")
    parser.add_argument("--train", help="text to fine-tune on, as a recipe names it")
    parser.add_argument("--calibration", help="text to calibrate on")
    parser.add_argument("--test", help="text to measure perplexities on")
    parser.add_argument("--drawing", choices=("crop", "pack"), help="crops of long documents, or documents joined")
    parser.add_argument("--tasks-folder", help="items of the zero-shot tasks (data/zeroshot, else the hub)")
    parser.add_argument("--limit", type=int, help="items of each task (all)")
    parser.add_argument("--steps", type=int, help="of fine-tuning (100)")
    parser.add_argument("--lora-rate", type=float, help="learning rate of LoRA (1e-4)")
    parser.add_argument("--full-rate", type=float, help="learning rate of full fine-tuning (2e-5)")
    parser.add_argument("--repeats", type=int, help="measurements of a duration (3)")
    parser.add_argument("--rows", nargs="+", default=[], help="of the tables: methods (all)")
    parser.add_argument("--columns", nargs="+", default=[], help="of the tables: sparsities (all)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", help="auto takes a GPU if there is one")
    parser.add_argument("--threads", type=int, help="of the CPU")
    return parser.parse_args(arguments)


def setup_of(args: argparse.Namespace) -> Setup:
    """The setup from the options, else from `--quick`, else from the model's preset, else from the paper's sizes.

    Raises:
        ConfigError: for an invalid number.
    """
    special = presets(args.data).get(args.model, {"model": args.model})
    settings = FULL | default_texts(args.data) | special
    if args.quick:  # models with a short context keep their shorter windows
        settings |= QUICK | {"length": min(QUICK["length"], settings["length"])}
    given = {name: value for name, value in vars(args).items() if name in Setup.__dataclass_fields__}
    settings |= {name: value for name, value in given.items() if value is not None and name not in ("model", "device")}
    settings |= {name: tuple(settings[name]) for name in ("seeds", "rows", "columns")}
    for name in ("samples", "length", "windows", "most_samples", "limit", "steps", "repeats"):
        if settings[name] is not None and settings[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {settings[name]}: give a whole number of 1 or more")
    return Setup(**settings, device=device_of(args.device))


def run(setup: Setup, tables: dict[str, Table], output: Path) -> bool:
    """Measure missing points, table by table, and write each table as soon as it is complete.

    Returns:
        Whether all tables were made. The page gives the reason for each missing table.

    Raises:
        ConfigError: if the rows and columns asked for are in none of the tables.
    """
    store, models = Store(output / "points.jsonl"), PrunedModels(setup)
    problems = {name: table.problem(setup) for name, table in tables.items()}
    wanted = {name: [] if problems[name] else table.points(setup) for name, table in tables.items()}
    if not any(wanted.values()) and not any(problems.values()):
        raise ConfigError(f"no table has the rows {list(setup.rows)} and the columns {list(setup.columns)}")
    sections: dict[str, str] = {}
    for name, table in tables.items():
        try:
            measure_all(models, store, name, wanted)
            text = table.render(setup, store) if wanted[name] else ""
            if text and table.draw is not None:
                table.draw(setup, store, output)
        except SparsefitError as error:  # the other tables can still be made
            problems[name] = str(error)
            print(flush=True)
        models.shared.clear()
        if problems[name]:
            text = f"Not measured: {problems[name].rstrip('.')}.\n"
        if text:
            sections[table.title] = text
            print(f"\n## {table.title}\n\n{text}", flush=True)
            write_page(setup, sections, output)
    print(f"written to {output / 'tables.md'}")
    return not any(problems.values())


def measure_all(models: PrunedModels, store: Store, name: str, wanted: dict[str, list[Point]]) -> None:
    """Measure the missing points of a table."""
    for number, point in enumerate(wanted[name], 1):
        if point in store:
            continue
        print(f"{name} {number}/{len(wanted[name])}: {described(point)} ...", end=" ", flush=True)
        start = time.perf_counter()
        figures = MEASURES[point["kind"]](models, point)
        seconds = time.perf_counter() - start
        store.add(point, figures, seconds)
        rest = {json.dumps(p, sort_keys=True): p for points in wanted.values() for p in points if p not in store}
        left = store.seconds_for(rest.values()) or 0.0
        print(f"{headline(figures)} in {seconds:.1f} s; {len(rest)} points left, about {duration(left)}", flush=True)


def described(point: Point) -> str:
    """A short description of a point."""
    names = ("task", "form", "shape", "samples", "seed")
    pruning = (
        "dense" if point["pruning"] is None else " ".join(str(v) for v in point["pruning"].values() if v is not None)
    )
    return " ".join([pruning or "wanda", *(f"{name} {point[name]}" for name in names if name in point)])


def headline(figures: dict) -> str:
    """The most important figure of a point."""
    found = [name for name in ("perplexity", "recovered", "acc", "seconds", "speedup") if figures.get(name) is not None]
    return f"{found[0]} {figures[found[0]]:.4g}" if found else "done"


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def write_page(setup: Setup, sections: dict[str, str], output: Path) -> None:
    """Write tables.md: the command, the machine, the settings, and the tables."""
    found = machine()
    cpu = f"{found['cpu']}, {torch.get_num_threads()} of its threads"
    where = cpu if setup.device == "cpu" else ", ".join(found["devices"])
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    windows = "all" if setup.windows is None else f"the first {setup.windows}"
    page = [
        "# The paper's tables\n",
        f"`{shlex.join(['python', *sys.argv])}`\n",
        f"- Model: {setup.model}, {setup.dtype}\n- Machine: {where} ({found['platform']})\n- Versions: {software}",
        f"- Calibration: {setup.samples} windows of {setup.length} tokens of {setup.calibration} ({setup.drawing}), "
        f"seed {setup.seed}",
        f"- Perplexity: {windows} windows of {setup.length} tokens of {setup.test}",
        "- Zeros were counted on the weights after each pruning\n",
    ]
    if setup.windows is not None or any(getattr(setup, name) < FULL[name] for name in ("samples", "length")):
        page.append(
            f"The paper takes {FULL['samples']} windows of {FULL['length']:,} tokens and all of the test text: these "
            "figures are of less, and compare with each other only.\n"
        )
    page += [f"## {title}\n\n{text}" for title, text in sections.items()]
    output.mkdir(parents=True, exist_ok=True)
    (output / "tables.md").write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
