"""Makes the tables of docs/results.md on recovery: forms of adapters, reconstruction and distillation.

    python scripts/reproduce/recovery.py --output runs/recovery [--model embedded] [--stage tune] [--threads 1]
    python scripts/reproduce/recovery.py --model smollm2 --stage headline [--steps 50] [--seeds 0 1 2]

Stages: "headline" runs only the paper's recipe and the best one, each with the best of four learning rates, and as a
control trains the dense model with each, on several seeds (of calibration, training text and adapters). "tune" finds
the learning rate of each form (at 50%, with plain Wanda). "steps" gives each recipe the same number of optimizer steps.
"pace" measures the seconds of a step of each (on an idle machine). "seconds" gives each recipe the steps that fit into
the same seconds, reconstruction included. Every point is a fit by `Trainer` with the project's callbacks. Its figures
are kept in a file of the output folder, so a stopped run continues. Pruned and reconstructed models are kept, too, and
shared by the points that start from them. The model on TinyStories expects the
folder data/ (see configs/tinystories.yaml), and so does SmolLM2 (see configs/smollm2-135m_c4.yaml): in bfloat16
autocast, 128 calibration windows and batches of 4 x 512 tokens of C4, and 24 windows of WikiText-2.

The column "seconds" is the time of the training, with loading the model, and of the reconstruction before it; the
column "pruning s" is that of the pruning, which the point may share with others. Reading the data, evaluations and
merging are in neither. The steps of the stage "seconds" follow from the first column.
"""

from __future__ import annotations

import argparse
import math
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from recovery_fits import cached, pace, point, prepare
from recovery_subjects import DENSE, FORMS, PATTERNS, SUBJECTS, Settings

BEST = "full"
PASSES = 5  # of the reconstruction


def best_rates(output: Path, model: str, steps: int) -> dict[str, float]:
    """The best learning rate of each form."""
    found = {}
    for form, rates in SUBJECTS[model].rates.items():
        figures = [cached(output, point(model, form, rate, {"steps": steps})) for rate in rates]
        found[form] = min(figures, key=lambda figures: figures["recovered"])["rate"]
    return found


def ways() -> list[tuple[str, int, float]]:
    """All combinations of form, passes of the reconstruction and weight of the distillation."""
    forms = [form for form in FORMS if form != "lora, all linears"]
    return [(form, passes, distill) for passes in (0, PASSES) for distill in (0.0, 0.5) for form in forms]


def fitting(output: Path, model: str, rates: dict[str, float], pattern: str) -> list[Settings]:
    """Each combination with the steps that fit into the seconds, at the pace measured at 50%; those for which no step
    fits are left out."""
    rows, seconds = [], SUBJECTS[model].seconds
    for form, passes, distill in ways():
        start = point(model, form, rates[form], {}, pattern=pattern, passes=passes)
        before = prepare(output, start)[1]["reconstruction_seconds"]
        steps = int((seconds - before) / pace(output, model, form, rates[form], distill))
        if steps < 1:
            print(f"{model}, {pattern}, {form}: left out, as {seconds - before:.0f} s of {seconds} s are left to train")
            continue
        limit = {"seconds": seconds, "steps": steps}
        rows.append(point(model, form, rates[form], limit, pattern=pattern, passes=passes, distill=distill))
    return rows


def whole(model: str, rates: dict[str, float], limit: Settings, pattern: str) -> list[Settings]:
    """Each form with and without reconstruction, with and without distillation."""
    return [
        point(model, form, rates[form], limit, pattern=pattern, passes=passes, distill=distill)
        for form, passes, distill in ways()
    ]


def refined(model: str, rates: dict[str, float], limit: Settings, pattern: str) -> list[Settings]:
    """The best form and masked LoRA with reconstruction and distillation, starting from refined masks."""
    both = {"passes": PASSES, "distill": 0.5, "pruning": "refined"}
    return [point(model, form, rates[form], limit, pattern=pattern, **both) for form in (BEST, "masked_lora")]


PAPERS: Settings = {"form": "lora q, v (the paper's)"}


def ours(pattern: str) -> Settings:
    """The best recipe. With an N:M pattern, all matrices have the same sparsity, so it has no Fisher allocation."""
    return {"form": BEST, "passes": 2, "pruning": "refined" if ":" in pattern else "refined, Fisher"}


def headline(output: Path, model: str, steps: int, patterns: list[str], seeds: list[int]) -> list[Settings]:
    """The paper's recipe and ours, each at its best learning rate, chosen on the first seed; and their controls."""
    rows = []
    for pattern in patterns:
        for recipe in (PAPERS, ours(pattern)):
            settings = recipe | {"pattern": pattern, "seed": seeds[0]}
            tried = [
                cached(output, point(model, rate=rate, limit={"steps": steps}, **settings))
                for rate in SUBJECTS[model].rates[recipe["form"]]
            ]
            best = min(tried, key=lambda figures: figures["merged"])["rate"]
            for seed in seeds:
                again = recipe | {"rate": best, "limit": {"steps": steps}, "seed": seed}
                rows.append(point(model, pattern=pattern, **again))
                rows.append(point(model, pattern=DENSE, **again | {"passes": 0, "pruning": "wanda"}))  # a control
    return rows


def points(args: argparse.Namespace, stage: str, model: str, rates: dict[str, float]) -> list[Settings]:
    """The points of a stage."""
    steps, patterns = {"steps": args.steps}, [args.pattern] if args.pattern else list(PATTERNS)
    if stage == "tune":
        tried = SUBJECTS[model].rates
        return [point(model, form, rate, steps) for form, rates_of in tried.items() for rate in rates_of]
    if stage == "steps":
        rows = [row for p in patterns for row in whole(model, rates, steps, p)]
        return rows + (refined(model, rates, steps, "50%") if "50%" in patterns else [])
    if stage == "headline":
        return headline(args.output, model, args.steps, patterns, args.seeds)
    return [row for p in patterns for row in fitting(args.output, model, rates, p)]


def table(rows: list[Settings]) -> str:
    """The points as a Markdown table."""
    lines = [
        "| model | pattern | masks | form | passes | distilled | rate | seed | limit | steps | pruning s | seconds "
        "| dense | pruned | recovered | merged | nats lost | won back | zeros counted |",
        "|" + "---|" * 19,
    ]
    for f in rows:
        lost = math.log(f["merged"] / f["dense"])
        wanda = math.log(f["wanda"] / f["dense"]) if "wanda" in f else math.nan
        limit = f"{f['seconds']} s" if f.get("seconds") else f"{f['steps']} steps"
        seconds = f["training_seconds"] + f.get("reconstruction_seconds", 0.0)
        cells = [f["model"], f["pattern"], f["pruning"], f["form"], str(f["passes"]), f"{f['distill']:g}"]
        cells += [
            f"{f['rate']:g}",
            str(f.get("seed", 0)),
            limit,
            str(f["steps_taken"]),
            f"{f.get('pruning_seconds', 0.0):.0f}",
            f"{seconds:.0f}",
            f"{f['dense']:.2f}",
        ]
        cells += [f"{f['pruned']:.2f}", f"{f['recovered']:.2f}", f"{f['merged']:.2f}", f"{lost:.3f}"]
        cells += [f"{1 - lost / wanda:.0%}", f"{f['sparsity']:.4%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--model", choices=SUBJECTS, help="by default all but smollm2")
    parser.add_argument("--stage", choices=("headline", "tune", "steps", "pace", "seconds"))
    parser.add_argument("--pattern", choices=PATTERNS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the headline")
    parser.add_argument("--precision", help="of the trainer, instead of the model's: use a new output folder for it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.precision:
        for model, subject in SUBJECTS.items():
            SUBJECTS[model] = replace(subject, trainer=subject.trainer | {"precision": args.precision})
    for model in [args.model] if args.model else [name for name in SUBJECTS if name != "smollm2"]:
        rates = {} if args.stage == "headline" else best_rates(args.output, model, args.steps)
        print(model, rates, flush=True)
        if args.stage == "pace":
            for form, passes, distill in ways():
                if not passes:
                    pace(args.output, model, form, rates[form], distill)
            continue
        for name in [args.stage] if args.stage else ("tune", "steps", "seconds"):
            rows = [cached(args.output, wanted) for wanted in points(args, name, model, rates)]
            for row in rows:
                if row["pattern"] != DENSE:
                    _, plain = prepare(args.output, {"seed": 0, **row, "pruning": "wanda", "passes": 0})
                    row["wanda"] = plain["pruned"]
            print(f"\n{model}, {name}\n\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
