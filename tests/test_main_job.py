"""The whole path on real models and texts: prune at fit start, recover with LoRA, export, report, inspect."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from sparsefit.callbacks import GPUHourBudget, RunReport, WandaPruning
from sparsefit.cli.inspect import inspect
from sparsefit.data import PythonDocsDataModule, TextFilesDataModule
from sparsefit.evaluation import perplexity
from sparsefit.modules import CausalLMModule
from sparsefit.modules.loading import load_causal_lm
from sparsefit.pruning import MaskSet
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.reporting.report import read_json

pytestmark = [pytest.mark.slow, pytest.mark.figures]

LORA = AdapterSettings(r=8, alpha=16, dropout=0.05, target_modules="all-linear")


def run(folder, model, data, steps, lora=LORA, learning_rate=2e-3, **pruning):
    seed_everything(0, verbose=False)
    module = CausalLMModule(model, adapter=lora, learning_rate=learning_rate)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[WandaPruning(**pruning), GPUHourBudget(gpu_hours=1.0), RunReport(str(folder))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return module, data, read_json(folder / "report.json")


def texts(shared_data, kind):
    """Calibrated and trained on one corpus, evaluated on held-out text."""
    sources = {
        "tinystories": ("tinystories/train_sample.jsonl", f"{shared_data}/tinystories/val.jsonl[:300]"),
        "c4": ("c4_sample/c4_train_1000.jsonl[:300]", f"wikitext:{shared_data}/wikitext2/test_raw.txt"),
    }
    train, test = sources[kind]
    return TextFilesDataModule(
        tokenizer=str(shared_data / "tinystories656K"),
        train_source=f"{shared_data}/{train}",
        test_source=test,
        sequence_length=256,
        batch_size=8,
        calibration="pack",
        calibration_samples=64,
        test_windows=16,
    )


@pytest.mark.parametrize(("kind", "pattern"), [("tinystories", None), ("tinystories", "2:4"), ("c4", None)])
def test_a_real_model_is_pruned_recovered_and_exported_exactly_sparse(shared_data, tmp_path, kind, pattern, capsys):
    folder = tmp_path / "run"
    model = str(shared_data / "tinystories656K")
    _, data, report = run(folder, model, texts(shared_data, kind), steps=15, pattern=pattern)

    figures = report["perplexity"]
    assert figures["dense"] < figures["pruned"]
    assert figures["recovered"] < figures["pruned"]  # below dense, even, where the text is new to the model
    assert report["status"] == "finished"
    assert report["training"]["steps"] == 15
    assert 0 < report["gpu_hours"]["total"] < 1

    # What the saved file holds, counted here by hand.
    masks = MaskSet.load(folder / "masks.safetensors")
    with safe_open(folder / "base" / "model.safetensors", framework="pt") as file:
        for name in masks:
            weight = file.get_tensor(name)
            assert torch.equal(weight != 0, masks[name] & (weight != 0))
            assert (masks[name].sum(dim=1) == weight.shape[1] - weight.shape[1] // 2).all()
            if pattern:
                assert (masks[name].view(-1, 4).sum(dim=1) == 2).all()
    assert report["sparsity"]["total"] == 0.5
    assert inspect([str(folder)]) == 0
    assert "masks hold" in " ".join(capsys.readouterr().out.split())

    # from_pretrained alone brings back the recovered model.
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert perplexity(base, data.test_dataloader()) == pytest.approx(figures["pruned"], rel=1e-4)
    recovered = PeftModel.from_pretrained(base, folder / "adapter")
    assert perplexity(recovered, data.test_dataloader()) == pytest.approx(figures["recovered"], rel=1e-4)


@pytest.mark.parametrize("kind", ["tinystories", "c4"])
def test_wanda_beats_magnitude_on_a_real_model(shared_data, tmp_path, kind):
    model = str(shared_data / "tinystories656K")
    pruned = {
        score: run(tmp_path / score, model, texts(shared_data, kind), steps=0, lora=None, score=score)[2]
        for score in ("wanda", "magnitude")
    }
    assert pruned["wanda"]["perplexity"]["pruned"] < pruned["magnitude"]["perplexity"]["pruned"]
    assert pruned["wanda"]["sparsity"]["total"] == pruned["magnitude"]["sparsity"]["total"] == 0.5


def test_full_fine_tuning_keeps_the_masks_bit_for_bit(shared_data, tmp_path):
    folder = tmp_path / "run"
    model = str(shared_data / "tinystories656K")
    module, _, report = run(
        folder, model, texts(shared_data, "tinystories"), steps=20, lora=None, learning_rate=1e-3, sparsity=0.6
    )
    dense = load_causal_lm(model).state_dict()
    masks = MaskSet.load(folder / "masks.safetensors")
    masks.verify(module.model)
    trained = module.model.state_dict()
    assert all(not torch.equal(trained[name], dense[name] * masks[name]) for name in masks)
    assert report["perplexity"]["recovered"] < report["perplexity"]["pruned"]
    assert inspect([str(folder)]) == 0


def test_the_embedded_model_is_real_small_and_recovers(tmp_path):
    model = load_causal_lm("tiny-llama")
    assert 2_000_000 <= model.num_parameters() <= 5_000_000
    data = {
        "calibration": "pack",
        "calibration_samples": 8,
        "batch_size": 8,
        "test_windows": 16,
        "sequence_length": 128,
    }
    figures = {}
    for score, steps in (("wanda", 10), ("magnitude", 0)):
        _, _, report = run(tmp_path / score, "tiny-llama", PythonDocsDataModule(**data), steps, score=score)
        figures[score] = report["perplexity"]
    assert figures["wanda"]["dense"] < figures["wanda"]["recovered"] < figures["wanda"]["pruned"]
    assert figures["wanda"]["pruned"] < figures["magnitude"]["pruned"]


def test_the_same_seed_gives_the_same_masks_whatever_the_calibration_batch_size(tmp_path):
    digests = set()
    for size in (1, 5, 16):
        data = PythonDocsDataModule(
            calibration="pack", calibration_samples=16, calibration_batch_size=size, test_windows=4, sequence_length=64
        )
        digests.add(run(tmp_path / str(size), "tiny-llama", data, steps=0)[2]["pruning"]["digest"])
    assert len(digests) == 1
