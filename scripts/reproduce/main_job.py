"""Makes a table of docs/results.md: the recipes of configs/ with several settings, each as a `sparsefit` command.

    python scripts/reproduce/main_job.py --output runs/main_job [--only embedded] [--threads 2]

The recipes on TinyStories and C4 expect the folder data/ (see their headers). Prints a line in Markdown
after each run. Runs whose folder has a report are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

RECIPES = {
    "embedded": "configs/quickstart.yaml",
    "tinystories": "configs/paper/tinystories_lora.yaml",
    "c4": "configs/paper/tinystories_c4_lora.yaml",
}
SETTINGS = {
    "wanda 50%": [],
    "magnitude 50%": ["--pruning.score=magnitude"],
    "wanda 60%": ["--pruning.sparsity=0.6"],
    "magnitude 60%": ["--pruning.score=magnitude", "--pruning.sparsity=0.6"],
    "wanda 2:4": ["--pruning.pattern=2:4"],
    "magnitude 2:4": ["--pruning.score=magnitude", "--pruning.pattern=2:4"],
}


def run(recipe: str, setting: str, folder: Path, threads: int) -> dict:
    """Run a command and return its report. Magnitude pruning is run without recovery, for comparison."""
    if not (folder / "report.json").exists():
        command = "prune" if setting.startswith("magnitude") else "fit"
        sparsefit = str(Path(sys.executable).with_name("sparsefit"))
        arguments = [sparsefit, command, "--config", RECIPES[recipe], *SETTINGS[setting], f"--run.folder={folder}"]
        log = folder.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            subprocess.run(arguments, check=True, stdout=output, stderr=output, env=environment)
    return json.loads((folder / "report.json").read_text())


def row(recipe: str, setting: str, report: dict) -> str:
    """One line of the table."""
    figures, training = report["perplexity"], report["training"]
    recovered = figures.get("recovered")
    cells = [
        recipe,
        setting,
        f"{figures['dense']:.2f}",
        f"{figures['pruned']:.2f}",
        f"{recovered:.2f}" if recovered else "-",
        str(training["steps"]) if recovered else "-",
        f"{report['sparsity']['total']:.4%}",
        f"{report['gpu_hours']['total']:.4f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/main_job"))
    parser.add_argument("--only", choices=RECIPES)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    print("| recipe | pruning | dense | pruned | recovered | steps | sparsity counted | GPU-hours |")
    print("|---|---|---|---|---|---|---|---|")
    for recipe in [args.only] if args.only else RECIPES:
        for setting in SETTINGS:
            folder = args.output / recipe / setting.replace(" ", "-").replace("%", "").replace(":", "of")
            print(row(recipe, setting, run(recipe, setting, folder, args.threads)), flush=True)


if __name__ == "__main__":
    main()
