"""The tables of docs/results.md on recovery: forms of adapter, reconstruction, distillation; tuned alike, merged.

    python scripts/reproduce/recovery.py --output runs/recovery [--model embedded] [--stage tune] [--threads 1]

Stages: "tune" finds the learning rate of each form (at 50%, plain); "steps" gives each recipe the same number of
optimizer steps; "pace" measures what a step of each takes (on an idle machine, please); "seconds" gives each the steps
that fit into the same seconds at that pace, beside those of a reconstruction. Every point is a fit by `Trainer` with
the project's callbacks, kept in a file of the output folder, so a run that was stopped goes on where it was. What a
pruning or a reconstruction gives is kept, too, and shared by the points that start from it. The model on TinyStories
expects the folder data/ (see configs/tinystories.yaml).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

from sparsefit.callbacks import BlockwiseReconstruction, GPUHourBudget, WandaPruning
from sparsefit.data import PythonDocsDataModule
from sparsefit.modules import CausalLMModule
from sparsefit.modules.loading import load_tokenizer
from sparsefit.pruning import MaskSet
from sparsefit.pruning.naming import canonical_name
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.distill import DistillSettings
from sparsefit.recovery.export import export_base, pretrained_part
from sparsefit.recovery.inspection import inspect_folder
from sparsefit.recovery.merge import merge

Settings = dict[str, Any]

SAMPLES = 128


class Stories(LightningDataModule):
    """One story in each row, as the model on TinyStories was trained on them; padded on the right."""

    def __init__(self, tokenizer: str, folder: str, batch_size: int = 8) -> None:
        super().__init__()
        self.folder, self.batch_size = Path(folder), batch_size
        self.tokenizer = load_tokenizer(tokenizer)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def train_dataloader(self) -> DataLoader:
        """All training stories but those calibrated on, shuffled alike in each run."""
        return self._loader("train_sample.jsonl", slice(SAMPLES, None), shuffle=True)

    def calibration_dataloader(self) -> DataLoader:
        """The first training stories."""
        return self._loader("train_sample.jsonl", slice(SAMPLES))

    def test_dataloader(self) -> DataLoader:
        """Held-out stories."""
        return self._loader("val.jsonl", slice(200))

    def _loader(self, file: str, part: slice, shuffle: bool = False) -> DataLoader:
        lines = (self.folder / file).read_text(encoding="utf-8").splitlines()[part]
        stories = [json.loads(line)["text"] for line in lines]
        rows = [{"input_ids": self.tokenizer(story, truncation=True, max_length=512)["input_ids"]} for story in stories]
        collate = DataCollatorForLanguageModeling(self.tokenizer, mlm=False)
        order = torch.Generator().manual_seed(0)
        return DataLoader(rows, self.batch_size, shuffle, collate_fn=collate, generator=order)


MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "embedded": ("tiny-llama", lambda: PythonDocsDataModule("tiny-llama", calibration="pack", test_windows=200)),
    "tinystories": ("data/tinystories656K", lambda: Stories("data/tinystories656K", "data/tinystories")),
}
PATTERNS: dict[str, Settings] = {"50%": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
REFINED = {"swaps": 10, "reconstruction": "least_squares"}
PRUNINGS: dict[str, Settings] = {"wanda": {}, "refined": REFINED, "refined, OWL": REFINED | {"allocation": "owl"}}
RANK_16 = {"r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}
FORMS: dict[str, Settings] = {
    "lora q, v (the paper's)": {"form": "lora"},
    "lora, all linears": {"form": "lora", **RANK_16},
    "masked_lora": {"form": "masked_lora", **RANK_16},
    "hira": {"form": "hira", **RANK_16},
    "full": {"form": "full", "target_modules": "all-linear", "train_norms": True},
}
RATES = {  # three each
    "lora q, v (the paper's)": (3e-3, 1e-2, 3e-2),
    "lora, all linears": (1e-3, 3e-3, 1e-2),
    "masked_lora": (1e-3, 3e-3, 1e-2),
    "hira": (3e-3, 1e-2, 3e-2),
    "full": (1e-3, 3e-3, 1e-2),
}
BEST = "full"
PASSES = 5  # of the reconstruction
SECONDS = {"embedded": 90, "tinystories": 60}
PACE_STEPS = 8


class FromFolder(WandaPruning):
    """Starts from what an earlier pruning (and reconstruction) of the same model left, instead of pruning again."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the weights and masks over."""
        _, model = pretrained_part(pl_module)
        saved = load_file(self._folder / "model.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if canonical_name(name) in saved and "modules_to_save" not in name:
                    parameter.copy_(saved[canonical_name(name)])
        self.masks = MaskSet.load(self._folder / "masks.safetensors").renamed(lambda name: f"model.{name}")


class StepClock(Callback):
    """The time of an optimizer step: the median of all but the first two."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time."""
        self._times.append(time.perf_counter())

    @property
    def median(self) -> float:
        """Seconds."""
        times = self._times[1:] if len(self._times) > 3 else self._times
        return median(later - earlier for earlier, later in pairwise(times))


@cache
def data_of(model: str) -> tuple[Any, list[Any]]:
    """The data module of a model and its test batches."""
    data = MODELS[model][1]()
    data.setup("fit")
    return data, list(data.test_dataloader())


def trainer_with(callbacks: list[Callback], **settings: Any) -> Trainer:
    """A trainer that writes nothing."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="auto", devices=1, callbacks=callbacks, enable_model_summary=False, use_distributed_sampler=False,
        **quiet, **settings,
    )  # fmt: skip


def prepare(output: Path, model: str, pattern: str, pruning: str, passes: int) -> tuple[Path, Settings]:
    """The folder of a pruned model, and its figures; made once."""
    folder = output / "bases" / "-".join([model, pattern.replace(":", "of"), pruning, str(passes)])
    if not (folder / "figures.json").exists():
        data, test = data_of(model)
        module = CausalLMModule(MODELS[model][0])
        dense = module.evaluate(test)["perplexity"]
        wanda = WandaPruning(**PATTERNS[pattern], **PRUNINGS[pruning])
        tuned = BlockwiseReconstruction(passes, learning_rate=3e-3)
        seed_everything(0, verbose=False)
        trainer_with([wanda, tuned], max_steps=0).fit(module, data)
        export_base(module, wanda.masks, folder).save(folder / "masks.safetensors")
        figures = {
            "dense": dense,
            "pruned": module.evaluate(test)["perplexity"],
            "pruning_seconds": wanda.result.seconds,
            "reconstruction_seconds": tuned.account.get("seconds", 0.0),
        }
        (folder / "figures.json").write_text(json.dumps(figures))
    return folder, json.loads((folder / "figures.json").read_text())


def fitted(output: Path, point: Settings) -> tuple[CausalLMModule, MaskSet, Trainer, float]:
    """A model prepared and trained as a point says, its masks, and the seconds of an optimizer step."""
    model, form = point["model"], FORMS[point["form"]]
    folder, _ = prepare(output, model, point["pattern"], point["pruning"], point["passes"])
    data, _ = data_of(model)
    seed_everything(0, verbose=False)
    distill = DistillSettings(point["distill"]) if point["distill"] else None
    module = CausalLMModule(MODELS[model][0], AdapterSettings(**form), distill, learning_rate=point["rate"])
    pruned, clock = FromFolder(folder), StepClock()
    callbacks = [pruned, GPUHourBudget(1e3), clock]  # the rate falls with the steps
    trainer = trainer_with(callbacks, max_steps=point["steps"], max_epochs=1000, gradient_clip_val=1.0)
    trainer.fit(module, data)
    return module, pruned.masks.renamed(lambda name: name.removeprefix("model.")), trainer, clock.median


def run(output: Path, point: Settings) -> Settings:
    """One point: a model prepared, trained, evaluated, merged and counted."""
    start = time.perf_counter()
    module, masks, trainer, _ = fitted(output, point)
    spent = time.perf_counter() - start
    _, test = data_of(point["model"])
    recovered = module.evaluate(test)["perplexity"]
    lossless = AdapterSettings(**FORMS[point["form"]]).lossless
    module.model = merge(module.model, masks, reapply_masks=not lossless)
    merged = module.evaluate(test)["perplexity"]
    with tempfile.TemporaryDirectory() as saved:
        export_base(module, masks.renamed(lambda name: f"model.{name}"), Path(saved)).save(
            Path(saved) / "masks.safetensors"
        )
        inspection = inspect_folder(saved)
    _, figures = prepare(output, point["model"], point["pattern"], point["pruning"], point["passes"])
    return point | figures | {
        "recovered": recovered,
        "merged": merged,
        "steps_taken": trainer.global_step,
        "training_seconds": spent,
        "sparsity": inspection.sparsity,
        "masks_broken": len(inspection.broken),
    }  # fmt: skip


def pace(output: Path, model: str, form: str, rate: float, distill: float) -> float:
    """The seconds of an optimizer step, measured once."""
    file = output / f"{model}-pace.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    name = f"{form}, {'distilled' if distill else 'on the text alone'}"
    if name not in known:
        *_, known[name] = fitted(output, point(model, form, rate, {"steps": PACE_STEPS}, distill=distill))
        file.write_text(json.dumps(known, indent=2))
        print(f"{model}: {name}: {known[name]:.3f} s a step", flush=True)
    return known[name]


def cached(output: Path, point: Settings) -> Settings:
    """A point's figures, from the file where they are."""
    file = output / f"{point['model']}.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for figures in done:
        if all(figures.get(key) == value for key, value in ({"seconds": None} | point).items()):
            return figures
    figures = run(output, point)
    with file.open("a") as lines:
        lines.write(json.dumps(figures) + "\n")
    print(
        f"{json.dumps(point)} pruned {figures['pruned']:.2f} recovered {figures['recovered']:.3f} "
        f"merged {figures['merged']:.3f} in {figures['training_seconds']:.0f} s",
        flush=True,
    )
    return figures


def point(model: str, form: str, rate: float, limit: Settings, **others: Any) -> Settings:
    """A point of plain Wanda at 50%, trained on the text, unless `others` say otherwise; `limit` is what ends it."""
    plain = {"pattern": "50%", "pruning": "wanda", "passes": 0, "distill": 0.0}
    return {"model": model, "form": form, "rate": rate} | plain | others | limit


def best_rates(output: Path, model: str, steps: int) -> dict[str, float]:
    """The learning rate with which each form comes out best."""
    found = {}
    for form, rates in RATES.items():
        figures = [cached(output, point(model, form, rate, {"steps": steps})) for rate in rates]
        found[form] = min(figures, key=lambda figures: figures["recovered"])["rate"]
    return found


def ways() -> list[tuple[str, int, float]]:
    """Form, passes of a reconstruction and weight of the distillation: each with each."""
    forms = [form for form in FORMS if form != "lora, all linears"]
    return [(form, passes, distill) for passes in (0, PASSES) for distill in (0.0, 0.5) for form in forms]


def fitting(output: Path, model: str, rates: dict[str, float], pattern: str) -> list[Settings]:
    """Each way with the steps that fit into the seconds, at the pace measured at 50%."""
    rows = []
    for form, passes, distill in ways():
        before = prepare(output, model, pattern, "wanda", passes)[1]["reconstruction_seconds"]
        steps = int((SECONDS[model] - before) / pace(output, model, form, rates[form], distill))
        limit = {"seconds": SECONDS[model], "steps": steps}
        rows.append(point(model, form, rates[form], limit, pattern=pattern, passes=passes, distill=distill))
    return rows


def whole(model: str, rates: dict[str, float], limit: Settings, pattern: str) -> list[Settings]:
    """Each form with and without a reconstruction before, with and without distillation."""
    return [
        point(model, form, rates[form], limit, pattern=pattern, passes=passes, distill=distill)
        for form, passes, distill in ways()
    ]


def refined(model: str, rates: dict[str, float], limit: Settings, pattern: str) -> list[Settings]:
    """The best form and masked LoRA, with everything, from masks that were refined before."""
    both = {"passes": PASSES, "distill": 0.5, "pruning": "refined"}
    return [point(model, form, rates[form], limit, pattern=pattern, **both) for form in (BEST, "masked_lora")]


def points(args: argparse.Namespace, stage: str, model: str, rates: dict[str, float]) -> list[Settings]:
    """The points of a stage."""
    steps, patterns = {"steps": args.steps}, [args.pattern] if args.pattern else list(PATTERNS)
    if stage == "tune":
        return [point(model, form, rate, steps) for form, rates_of in RATES.items() for rate in rates_of]
    if stage == "steps":
        rows = [row for p in patterns for row in whole(model, rates, steps, p)]
        return rows + (refined(model, rates, steps, "50%") if "50%" in patterns else [])
    return [row for p in patterns for row in fitting(args.output, model, rates, p)]


def table(rows: list[Settings]) -> str:
    """Markdown: a line for each point."""
    lines = [
        "| model | pattern | masks | form | passes | distilled | rate | limit | steps | seconds | dense | pruned | "
        "recovered | merged | nats lost | won back | zeros counted |",
        "|" + "---|" * 17,
    ]
    for f in rows:
        lost = math.log(f["merged"] / f["dense"])
        wanda = math.log(f["wanda"] / f["dense"])
        limit = f"{f['seconds']} s" if f.get("seconds") else f"{f['steps']} steps"
        seconds = f["training_seconds"] + f["reconstruction_seconds"]
        cells = [f["model"], f["pattern"], f["pruning"], f["form"], str(f["passes"]), f"{f['distill']:g}"]
        cells += [f"{f['rate']:g}", limit, str(f["steps_taken"]), f"{seconds:.0f}", f"{f['dense']:.2f}"]
        cells += [f"{f['pruned']:.2f}", f"{f['recovered']:.2f}", f"{f['merged']:.2f}", f"{lost:.3f}"]
        cells += [f"{1 - lost / wanda:.0%}", f"{f['sparsity']:.4%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--stage", choices=("tune", "steps", "pace", "seconds"))
    parser.add_argument("--pattern", choices=PATTERNS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    args.output.mkdir(parents=True, exist_ok=True)
    for model in [args.model] if args.model else MODELS:
        rates = best_rates(args.output, model, args.steps)
        print(model, rates, flush=True)
        if args.stage == "pace":
            for form, passes, distill in ways():
                if not passes:
                    pace(args.output, model, form, rates[form], distill)
            continue
        for name in [args.stage] if args.stage else ("tune", "steps", "seconds"):
            rows = [cached(args.output, wanted) for wanted in points(args, name, model, rates)]
            for row in rows:
                _, plain = prepare(args.output, model, row["pattern"], "wanda", 0)
                row["wanda"] = plain["pruned"]
            print(f"\n{model}, {name}\n\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
