"""Models pruned by Wanda and then trained with fixed masks: LoRA and full fine-tuning."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer, seed_everything

from sparsefit.callbacks import GPUHourBudget, WandaPruning
from sparsefit.modules import CausalLMModule
from sparsefit.recovery.adapters import AdapterSettings
from tables.layout import Table, markdown
from tables.methods import PAPERS, SPARSITIES
from tables.pruned_models import PrunedModels, counted_sparsity
from tables.setup import Figures, Point, Setup
from tables.store import Store

FORMS: dict[str, AdapterSettings | None] = {
    "LoRA": AdapterSettings(),  # as in the paper: r 8 on q and v, not merged into the sparse base
    "full": None,  # all weights but the pruned ones
}


def point_of(setup: Setup, sparsity: str, form: str | None) -> Point:
    """The point of a pruned and trained model; with form None, it is not trained."""
    pruning = SPARSITIES[sparsity]
    if form is None:
        return setup.point("perplexity", pruning)
    rate = setup.full_rate if FORMS[form] is None else setup.lora_rate
    return setup.point("finetuning", pruning, form=form, steps=setup.steps, rate=rate, train=setup.train)


def points(setup: Setup) -> list[Point]:
    """The dense model, and each form at each sparsity."""
    columns = [sparsity for sparsity in PAPERS if setup.wanted("Wanda", sparsity)]
    found = [point_of(setup, sparsity, form) for sparsity in columns for form in (None, *FORMS)]
    return [setup.point("perplexity", None), *found] if found else []


def measure(models: PrunedModels, point: Point) -> Figures:
    """Run one fit: prune at its start, train, evaluate, and count the zeros again."""
    setup, adapter, device = models.setup, FORMS[point["form"]], torch.device(models.setup.device)
    # If the weights themselves are trained, half precision would round the small steps of AdamW to nothing.
    mixed = adapter is None and setup.dtype != "float32"
    dtype = "float32" if mixed else setup.dtype
    models.forget()
    seed_everything(point["seed"], verbose=False)
    module = CausalLMModule(setup.model, adapter, learning_rate=point["rate"], dtype=dtype)
    wanda = WandaPruning(**point["pruning"])
    trainer = Trainer(
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        precision="bf16-mixed" if mixed else None,
        max_steps=point["steps"],
        max_epochs=1000,
        gradient_clip_val=1.0,
        callbacks=[wanda, GPUHourBudget(1e4)],  # the learning rate warms up, and falls to zero at the last step
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, models.data(point["samples"], point["seed"]))
    recovered = module.to(device).evaluate(models.test)["perplexity"]
    sparsity = counted_sparsity(module, wanda.result)
    return {"recovered": recovered, "sparsity": sparsity, "steps": trainer.global_step}


def render(setup: Setup, store: Store) -> str:
    """Perplexities before and after training."""
    columns = [sparsity for sparsity in PAPERS if setup.wanted("Wanda", sparsity)]
    dense = store[setup.point("perplexity", None)]["perplexity"]
    lines = [["dense", *[f"{dense:.2f}"] * len(columns)]]
    lines += [["pruned", *(f"{store[point_of(setup, c, None)]['perplexity']:.2f}" for c in columns)]]
    for form in FORMS:
        lines.append([form, *(f"{store[point_of(setup, column, form)]['recovered']:.2f}" for column in columns)])
    note = (
        f"{setup.steps} steps of {max(1, 4096 // setup.length)} windows; LoRA (r 8, alpha 16, q and v, kept apart) at "
        f"{setup.lora_rate:g}, full at {setup.full_rate:g}. The sparsity was counted again after training.\n"
    )
    return markdown(["perplexity", *columns], lines) + f"\n{note}"


TABLE = Table("LoRA and full fine-tuning after Wanda", points, render)
