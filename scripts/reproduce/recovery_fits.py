"""Measures the points of scripts/reproduce/recovery.py: prunes, trains, evaluates and merges a model, once each."""

from __future__ import annotations

import json
import tempfile
import time
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from recovery_subjects import DENSE, FORMS, PATTERNS, PRUNINGS, SUBJECTS, Settings
from safetensors.torch import load_file

from sparsefit.bare_model import canonical_name
from sparsefit.callbacks import BlockwiseReconstruction, GPUHourBudget, WandaPruning
from sparsefit.modules import CausalLMModule
from sparsefit.pruning import MaskSet
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.distill import DistillSettings
from sparsefit.recovery.export import export_base, pretrained_part
from sparsefit.recovery.inspection import inspect_folder
from sparsefit.recovery.merge import merge

PACE_STEPS = 8


class FromFolder(WandaPruning):
    """Loads a model that was pruned (and reconstructed) before, instead of pruning again."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the weights and masks."""
        _, model = pretrained_part(pl_module)
        saved = load_file(self._folder / "model.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if canonical_name(name) in saved and "modules_to_save" not in name:
                    parameter.copy_(saved[canonical_name(name)])
        self.masks = MaskSet.load(self._folder / "masks.safetensors").renamed(lambda name: f"model.{name}")


class StepClock(Callback):
    """Measures the median seconds of an optimizer step, without the first two if there are more."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Record the time."""
        self._times.append(time.perf_counter())

    @property
    def median(self) -> float | None:
        """Median seconds of a step; None after fewer than two steps, as the start of the first is not known."""
        times = self._times[1:] if len(self._times) > 3 else self._times
        return median(later - earlier for earlier, later in pairwise(times)) if len(times) > 1 else None


@cache
def data_of(model: str, seed: int) -> tuple[Any, list[Any]]:
    """The data module of a model and its test batches."""
    data = SUBJECTS[model].data(seed)
    data.setup("fit")
    return data, list(data.test_dataloader())


def trainer_with(callbacks: list[Callback], **settings: Any) -> Trainer:
    """A trainer that writes nothing."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="auto", devices=1, callbacks=callbacks, enable_model_summary=False, use_distributed_sampler=False,
        **quiet, **settings,
    )  # fmt: skip


def prepare(output: Path, point: Settings) -> tuple[Path, Settings]:
    """The folder of the pruned model that a point starts from, and its figures. It is created only once."""
    model, pattern, pruning, passes = (point[name] for name in ("model", "pattern", "pruning", "passes"))
    seed, subject = point["seed"], SUBJECTS[model]
    named = [model, pattern.replace(":", "of"), pruning, str(passes), *([f"seed{seed}"] if seed else [])]
    folder = output / "bases" / "-".join(named)
    if not (folder / "figures.json").exists():
        data, test = data_of(model, seed)
        module = CausalLMModule(subject.model)
        dense = module.evaluate(test)["perplexity"]
        wanda = WandaPruning(**PATTERNS[pattern], **PRUNINGS[pruning])
        tuned = BlockwiseReconstruction(passes, **subject.block)
        seed_everything(seed, verbose=False)
        trainer_with([wanda, tuned], max_steps=0, **subject.trainer).fit(module, data)
        export_base(module, wanda.masks, folder).save(folder / "masks.safetensors")
        figures = {
            "dense": dense,
            "pruned": module.evaluate(test)["perplexity"],
            "pruning_seconds": wanda.result.seconds,
            "reconstruction_seconds": tuned.account.get("seconds", 0.0),
        }
        (folder / "figures.json").write_text(json.dumps(figures))
    return folder, json.loads((folder / "figures.json").read_text())


def fitted(output: Path, point: Settings) -> tuple[CausalLMModule, MaskSet | None, Trainer, float | None]:
    """A model prepared and trained for a point, its masks, its trainer, and the seconds of an optimizer step, if it has
    two."""
    subject, form = SUBJECTS[point["model"]], FORMS[point["form"]]
    data, _ = data_of(point["model"], point["seed"])
    seed_everything(point["seed"], verbose=False)
    distill = DistillSettings(point["distill"]) if point["distill"] else None
    module = CausalLMModule(subject.model, AdapterSettings(**form), distill, learning_rate=point["rate"])
    pruned = None if point["pattern"] == DENSE else FromFolder(prepare(output, point)[0])
    budget, clock = GPUHourBudget(1e3), StepClock()  # the budget lowers the learning rate with the steps
    callbacks = [budget, clock] if pruned is None else [pruned, budget, clock]
    ends = {"max_steps": point["steps"], "max_epochs": 1000, "gradient_clip_val": 1.0}
    trainer = trainer_with(callbacks, **ends, **subject.trainer)
    trainer.fit(module, data)
    masks = None if pruned is None else pruned.masks.renamed(lambda name: name.removeprefix("model."))
    return module, masks, trainer, clock.median


def run(output: Path, point: Settings) -> Settings:
    """Measure a point: prepare, train, evaluate and merge a model, and count its zeros. A control is only evaluated.

    `training_seconds` is the time of the training and of loading the model and its pruned weights. It contains neither
    reading the data nor the pruning and the reconstruction, which the first point that needs them makes for all others.
    """
    _, test = data_of(point["model"], point["seed"])
    before = {} if point["pattern"] == DENSE else prepare(output, point)[1]
    start = time.perf_counter()
    module, masks, trainer, step = fitted(output, point)
    spent = time.perf_counter() - start
    recovered = module.evaluate(test)["perplexity"]
    figures = {"recovered": recovered, "steps_taken": trainer.global_step, "training_seconds": spent, "step": step}
    if masks is None:
        dense = CausalLMModule(SUBJECTS[point["model"]].model).evaluate(test)["perplexity"]
        return point | figures | {"dense": dense, "pruned": dense, "merged": recovered, "sparsity": 0.0}
    lossless = AdapterSettings(**FORMS[point["form"]]).lossless
    module.model = merge(module.model, masks, reapply_masks=not lossless)
    merged = module.evaluate(test)["perplexity"]
    with tempfile.TemporaryDirectory() as saved:
        export_base(module, masks.renamed(lambda name: f"model.{name}"), Path(saved)).save(
            Path(saved) / "masks.safetensors"
        )
        inspection = inspect_folder(saved)
    counted = {"merged": merged, "sparsity": inspection.sparsity, "masks_broken": len(inspection.broken)}
    return point | before | figures | counted


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
    """A point's figures from the file, or measured if the file does not have them."""
    file = output / f"{point['model']}.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for figures in done:
        if all({"seed": 0, **figures}.get(key) == value for key, value in ({"seconds": None} | point).items()):
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


def point(model: str, form: str, rate: float, limit: Settings, **settings: Any) -> Settings:
    """A point of plain Wanda at 50% without distillation, unless `settings` differ; `limit` ends its training."""
    plain = {"pattern": "50%", "pruning": "wanda", "passes": 0, "distill": 0.0, "seed": 0}
    return {"model": model, "form": form, "rate": rate} | plain | settings | limit
