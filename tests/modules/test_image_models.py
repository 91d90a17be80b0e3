"""Image classifiers by their type, from a folder, from a checkpoint or given; exported and read again."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import load_file
from small_classifiers import PATCHES, QUIET, SETTINGS, Plain, images, loader, module_of
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTImageProcessorPil

from sparsefit import PruningConfig, prune
from sparsefit.errors import ConfigError
from sparsefit.modules import ImageClassifierModule
from sparsefit.recovery.export import export_base
from sparsefit.recovery.inspection import inspect_folder


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_pruned_model_is_exported_and_read_again(tmp_path, kind):
    torch.manual_seed(0)
    dense = module_of(kind)
    dense.image_processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3])
    batches = [images(seed=3)[0]]
    config = PruningConfig(sparsity=0.6, granularity="layer", update="none")
    masks = prune(dense, batches, config, forward=dense.predict_step).masks
    assert masks.sparsity == pytest.approx(0.6, abs=0.02)
    assert not any("head" in name or "classifier" in name or "embeddings" in name for name in masks)
    saved = export_base(dense, masks, tmp_path / "base")
    saved.save(tmp_path / "masks.safetensors")

    again = ImageClassifierModule(str(tmp_path / "base"), num_classes=7)
    assert torch.equal(again.eval()(images()[0]), dense.eval()(images()[0]))
    saved.verify(again.model)
    inspection = inspect_folder(tmp_path)
    assert not inspection.broken
    assert inspection.sparsity == pytest.approx(masks.sparsity, abs=1e-3)
    assert list(again.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert again.image_processor.size["height"] == 16


def test_a_plain_module_is_exported_as_its_state(tmp_path):
    module = module_of("plain")
    masks = prune(module, [images()[0]], PruningConfig(granularity="layer", update="none")).masks
    assert len(masks) == 2
    export_base(module, masks, tmp_path).verify(module)
    assert masks.keys() <= load_file(tmp_path / "model.safetensors").keys()


def test_a_deit_with_a_distillation_token_keeps_its_two_heads(tmp_path):
    torch.manual_seed(0)
    model = DeiTForImageClassificationWithTeacher(DeiTConfig(num_labels=4, **PATCHES)).eval()
    model.save_pretrained(tmp_path)
    module = ImageClassifierModule(str(tmp_path))
    assert type(module.model) is type(model)
    pixels = images(classes=4)[0]
    assert torch.equal(module.eval()(pixels), model(pixels).logits)
    assert module.classes == 4


@pytest.mark.parametrize("kind", ["convnext", "deit"])
def test_a_checkpoint_loads_with_weights_only(tmp_path, kind):
    module = module_of(kind, optimizer="sgd", label_smoothing=0.1)
    trainer = Trainer(default_root_dir=tmp_path, enable_checkpointing=False, **QUIET, max_epochs=1)
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    torch.load(tmp_path / "run.ckpt", weights_only=True)
    again = ImageClassifierModule.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert again.hparams == module.hparams
    assert torch.equal(again.eval()(images()[0]), module.eval()(images()[0]))


def test_a_checkpoint_of_a_module_given(tmp_path):
    module = module_of("plain")
    trainer = Trainer(default_root_dir=tmp_path, enable_checkpointing=False, **QUIET, max_epochs=1)
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = ImageClassifierModule.load_from_checkpoint(tmp_path / "run.ckpt", model=Plain(), weights_only=True)
    assert torch.equal(again.eval()(images()[0]), module.eval()(images()[0]))


MODELS = """
    from torch import nn

    def create_model(model_name: str, pretrained: bool = False, **kwargs) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(int(model_name[3:]), kwargs["num_classes"]))

    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = nn.Linear(width, 3)

        def forward(self, images):
            return self.layer(images.flatten(1))
"""


@pytest.mark.parametrize(
    ("settings", "classes"),
    [
        ("{class_path: a_model_zoo.Net, init_args: {width: 12}}", 3),
        ("{class_path: a_model_zoo.create_model, init_args: {model_name: net12}, dict_kwargs: {num_classes: 5}}", 5),
    ],
)
def test_a_module_is_named_in_yaml(tmp_path, monkeypatch, settings, classes):
    (tmp_path / "a_model_zoo.py").write_text(textwrap.dedent(MODELS))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_model_zoo", raising=False)
    (tmp_path / "recipe.yaml").write_text(
        f"seed_everything: 0\ntrainer: {{accelerator: cpu, logger: false}}\n"
        f"model:\n  class_path: sparsefit.modules.ImageClassifierModule\n  init_args: {{model: {settings}}}\n"
    )
    arguments = ["--config", str(tmp_path / "recipe.yaml")]
    monkeypatch.setattr(sys, "argv", ["sparsefit"])
    module = LightningCLI(LightningModule, subclass_mode_model=True, run=False, args=arguments).model
    assert module(torch.zeros(2, 3, 2, 2)).shape == (2, classes)


def test_an_architecture_is_named_in_yaml(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(
        "seed_everything: 0\ntrainer: {accelerator: cpu, logger: false}\n"
        "model: {model: vit, config: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, image_size: 8, "
        "patch_size: 4, num_labels: 3}, attn_implementation: eager}\n"
    )
    arguments = ["--config", str(tmp_path / "recipe.yaml")]
    monkeypatch.setattr(sys, "argv", ["sparsefit"])
    module = LightningCLI(ImageClassifierModule, run=False, args=arguments).model
    assert module(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    assert module.model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("convnxt", {}, "Did you mean 'convnext'"),
        ("llama", {}, "no image classifier of the type 'llama'"),
        ("convnext", {"hiden_sizes": [8]}, "no setting 'hiden_sizes': did you mean 'hidden_sizes'"),
        ("convnext", {"hidden_sizes": "wide"}, "no convnext can be built with these settings: .*hidden_sizes"),
        (Plain(), {"depths": [1]}, "leave it out where a module is given"),
    ],
)
def test_a_model_that_cannot_be_built(model, config, message):
    with pytest.raises(ConfigError, match=message):
        ImageClassifierModule(model, config)
