from __future__ import annotations

import json
import shutil
import sys
import time

import pytest
import torch
from huggingface_hub import constants
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

from sparsefit.errors import ConfigError
from sparsefit.modules import ImageClassifierModule
from sparsefit.modules.loading import find_image_processor, load_image_classifier, load_image_processor

SETTINGS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 5,
}


@pytest.fixture
def folder(tmp_path):
    """A small classifier with its image processor."""
    torch.manual_seed(0)
    place = tmp_path / "vit"
    ViTForImageClassification(ViTConfig(**SETTINGS)).save_pretrained(place)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_std=[0.5, 0.25, 0.2]).save_pretrained(place)
    return place


def test_a_folder_gives_the_model_and_its_processor(folder):
    for dtype in ("float32", "bfloat16"):
        model = load_image_classifier(str(folder), dtype, attn_implementation="eager")
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
        assert model.config._attn_implementation == "eager"
        assert not model.training
    for load in (load_image_processor, find_image_processor):
        assert list(load(str(folder)).image_std) == [0.5, 0.25, 0.2]


def test_no_torchvision_is_needed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it fails
    module = ImageClassifierModule(str(folder))
    assert module.evaluate([(torch.zeros(2, 3, 8, 8), torch.tensor([0, 4]))])["accuracy"] in (0.0, 0.5)
    images = module.image_processor([torch.zeros(3, 20, 30, dtype=torch.uint8)], return_tensors="pt")
    assert images["pixel_values"].shape == (1, 3, 8, 8)


def test_a_processor_written_as_a_fast_one_is_read(folder):
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_processor_type": "ViTImageProcessorFast"}))
    assert list(load_image_processor(str(folder)).image_std) == [0.5, 0.25, 0.2]


def test_a_folder_without_a_processor(folder):
    (folder / "preprocessor_config.json").unlink()
    assert ImageClassifierModule(str(folder)).image_processor is None
    with pytest.raises(ConfigError, match=r"holds no preprocessor_config\.json, so no image processor"):
        load_image_processor(str(folder))


@pytest.mark.parametrize("load", [load_image_classifier, load_image_processor])
def test_missing_folders_are_reported_with_their_nearest_neighbour(folder, load):
    with pytest.raises(ConfigError, match=r"no folder .*/vitt to load .*Did you mean .*/vit\?"):
        load(str(folder.with_name("vitt")))
    with pytest.raises(ConfigError, match=r"holds no .*config\.json.*Did you mean .*/vit\?"):
        load(str(folder.parent))
    with pytest.raises(ConfigError, match="name is empty"):
        load("")


def test_a_body_without_its_head_is_refused(tmp_path):
    ViTModel(ViTConfig(**SETTINGS), add_pooling_layer=False).save_pretrained(tmp_path / "body")
    with pytest.raises(
        ConfigError, match=r"holds a ViTModel, .*without a head, which would be random.*new_head=True and num_classes"
    ):
        load_image_classifier(str(tmp_path / "body"))


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match=r"tiny_llama holds a LlamaForCausalLM, and that is no image classifier"):
        load_image_classifier("tiny-llama")


def test_a_damaged_model_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"cannot load the model in .*/vit: "):
        load_image_classifier(str(folder))


@pytest.mark.parametrize("load", [load_image_classifier, load_image_processor])
def test_an_unreachable_hub_is_reported_at_once(monkeypatch, load):
    monkeypatch.setattr("sparsefit.modules.loading.hub_problem", lambda: "it cannot be reached")
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"'nobody/vit'.*it cannot be reached.*hf download nobody/vit --local-dir"):
        load("nobody/vit")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("with_processor", [True, False])
def test_a_cached_hub_model_loads_without_the_hub(monkeypatch, folder, tmp_path, with_processor):
    cached = tmp_path / "cache" / "models--nobody--vit"
    shutil.copytree(folder, cached / "snapshots" / "0123")
    if not with_processor:
        (cached / "snapshots" / "0123" / "preprocessor_config.json").unlink()
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sparsefit.modules.loading.hub_problem", lambda: "it cannot be reached")
    module = ImageClassifierModule("nobody/vit", num_classes=5)
    assert (module.image_processor is not None) == with_processor
