from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsefit.pruning import MaskSet
from sparsefit.recovery.adapter_files import load_adapter

pytestmark = pytest.mark.slow

IDS = torch.arange(12)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(sparsefit, recipe, tmp_path, form="masked_lora", **settings):
    """A finished run."""
    adapter = {"r": 2, "dropout": 0.0, "form": form, "target_modules": "all-linear", **settings}
    recipe["model"]["init_args"]["adapter"] = adapter
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 0, errors
    return tmp_path / "run"


def report_of(run):
    return json.loads((run / "report.json").read_text())


@pytest.mark.parametrize("form", ["masked_lora", "hira"])
def test_a_run_ends_with_the_merged_model_which_is_the_trained_one(sparsefit, recipe, tmp_path, form):
    run = trained(sparsefit, recipe, tmp_path, form, train_norms=True)
    masks = MaskSet.load(run / "masks.safetensors")
    merged = AutoModelForCausalLM.from_pretrained(run / "model")
    masks.verify(load_file(run / "model/model.safetensors"))
    apart = load_adapter(AutoModelForCausalLM.from_pretrained(run / "base"), run / "adapter", masks)
    torch.testing.assert_close(logits(merged), logits(apart), rtol=1e-4, atol=1e-5)
    assert not torch.equal(logits(merged), logits(AutoModelForCausalLM.from_pretrained(run / "base")))
    report = report_of(run)
    assert report["merge"] == {"form": form, "lossless": True, "folder": "model", "sparsity": 0.5}
    assert report["perplexity"]["merged"] == pytest.approx(report["perplexity"]["recovered"], rel=1e-4)
    assert report["sparsity"]["counted_on"] == "model/model.safetensors"
    assert [point["stage"] for point in report["timeline"]] == ["dense", "pruned", "recovered", "merged"]

    before = (run / "model/model.safetensors").read_bytes()
    status, output, _ = sparsefit("merge", run)
    assert (status, "already" in output, "50.00%" in output) == (0, True, True)
    assert (run / "model/model.safetensors").read_bytes() == before

    status, output, _ = sparsefit("merge", run, "--output", tmp_path / "again")
    assert status == 0
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(merged))
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("a").input_ids
    values = [float(value) for value in re.findall(r"([0-9.]+) (?:with a separate adapter|merged \()", output)]
    assert values == pytest.approx([report["perplexity"]["recovered"]] * 2, rel=1e-3)
    assert sparsefit("inspect", tmp_path / "again")[0] == 0


def test_plain_lora_is_refused_unless_the_masks_are_applied_again(sparsefit, recipe, tmp_path):
    run = trained(sparsefit, recipe, tmp_path, "lora")
    assert report_of(run)["merge"]["lossless"] is False
    assert not (run / "model").exists()
    status, _, errors = sparsefit("merge", run)
    assert status == 2
    assert all(word in errors for word in ("bring", "masked_lora", "hira", "--reapply-masks")) or "fill" in errors
    assert not (run / "model").exists()
    status, output, _ = sparsefit("merge", run, "--reapply-masks")
    assert status == 0
    MaskSet.load(run / "masks.safetensors").verify(load_file(run / "merged/model.safetensors"))
    before, after = (
        float(v) for v in re.search(r"([0-9.]+) with a separate adapter, ([0-9.]+) merged", output).groups()
    )
    assert before == pytest.approx(report_of(run)["perplexity"]["recovered"], rel=1e-3)
    assert before != after


def test_full_fine_tuning_leaves_the_model_itself(sparsefit, recipe, tmp_path):
    run = trained(sparsefit, recipe, tmp_path, "full")
    MaskSet.load(run / "masks.safetensors").verify(load_file(run / "model/model.safetensors"))
    base, model = load_file(run / "base/model.safetensors"), load_file(run / "model/model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], model[name])}
    assert changed
    assert all(name.endswith("proj.weight") for name in changed)
    assert not (run / "adapter").exists()
    assert sparsefit("merge", run)[0] == 0


def test_what_cannot_be_merged_says_why_and_overwrites_nothing(sparsefit, recipe, tmp_path):
    status, _, errors = sparsefit("merge", tmp_path / "nowhere")
    assert (status, "no run folder" in errors) == (2, True)
    run = trained(sparsefit, recipe, tmp_path, "masked_lora")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("precious")
    status, _, errors = sparsefit("merge", run, "--output", tmp_path / "full")
    assert (status, "not empty" in errors, (tmp_path / "full/file").read_text()) == (2, True, "precious")

    (run / "base").rename(run / "elsewhere")
    status, _, errors = sparsefit("merge", run, "--output", tmp_path / "out")
    assert (status, str(run / "base") in errors) == (2, True)
    (run / "elsewhere").rename(run / "base")

    whole = (run / "base/model.safetensors").read_bytes()
    changed = load_file(run / "base/model.safetensors")
    changed["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(changed, run / "base/model.safetensors", metadata={"format": "pt"})
    status, _, errors = sparsefit("merge", run, "--output", tmp_path / "out")
    assert (status, "base/model.safetensors: not what SHA256SUMS says" in errors) == (2, True)
    (run / "base/SHA256SUMS").unlink()
    status, _, errors = sparsefit("merge", run, "--output", tmp_path / "out")
    assert (status, "another base" in errors) == (2, True)
    (run / "base/model.safetensors").write_bytes(whole)

    masks = MaskSet.load(run / "masks.safetensors")
    others = MaskSet()
    for name, mask in masks.items():
        others.add(name, mask.flip(1))
    others.save(run / "masks.safetensors")
    status, _, errors = sparsefit("merge", run, "--output", tmp_path / "out")
    assert (status, "do not fit" in errors) == (2, True)
    masks.save(run / "masks.safetensors")
    (run / "adapter/adapter_model.safetensors").write_bytes(b"damaged")
    status, _, errors = sparsefit("merge", run, "--output", tmp_path / "out")
    assert (status, "adapter" in errors) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_recipe_with_everything(sparsefit, recipe, tmp_path):
    """Reconstruction, distillation, a split budget and a quantized base, each in its section."""
    recipe["model"]["init_args"]["distill"] = {"weight": 0.5}
    recipe["reconstruction"] = {"passes": 1, "batch_size": 2}
    recipe["budget"]["split"] = {"reconstruction": 0.2, "training": 0.8}
    run = trained(sparsefit, recipe, tmp_path)
    report = report_of(run)
    assert [point["stage"] for point in report["timeline"]] == [
        "dense",
        "pruned",
        "reconstructed",
        "recovered",
        "merged",
    ]
    assert len(report["reconstruction"]["blocks"]) == 2
    assert report["gpu_hours"]["stages"]["reconstruction"] > 0
    reconstructed = AutoModelForCausalLM.from_pretrained(run / "base")
    MaskSet.load(run / "masks.safetensors").verify(reconstructed)
    assert "reconstruction" in (run / "report.html").read_text().lower()


def test_an_adapter_on_a_quantized_base_merges_into_the_values_that_it_was_trained_on(sparsefit, recipe, tmp_path):
    pytest.importorskip("bitsandbytes")
    recipe["quantization"] = {"kind": "nf4"}
    run = trained(sparsefit, recipe, tmp_path)
    report = report_of(run)
    assert report["merge"]["lossless"] is True
    assert report["quantization"]["kind"] == "nf4"
    status, output, errors = sparsefit("merge", run, "--output", tmp_path / "again")
    assert status == 0, errors
    found = []
    for folder in (run / "model", tmp_path / "again"):
        MaskSet.load(run / "masks.safetensors").verify(load_file(folder / "model.safetensors"))
        found.append(logits(AutoModelForCausalLM.from_pretrained(folder)))
    torch.testing.assert_close(*found)
    apart = float(re.search(r"([0-9.]+) with a separate adapter", output).group(1))
    assert apart == pytest.approx(report["perplexity"]["recovered"], rel=1e-3)
