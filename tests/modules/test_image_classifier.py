from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from small_classifiers import PATCHES, QUIET, SETTINGS, Plain, images, loader, module_of
from torch import nn

from sparsefit.errors import ConfigError, DataError, SparsefitError
from sparsefit.modules import ImageClassifierModule


def fit(module, folder, **settings):
    trainer = Trainer(default_root_dir=folder, enable_checkpointing=False, **QUIET | {"max_epochs": 4} | settings)
    trainer.fit(module, loader(), loader(count=10, seed=1))
    return trainer


def loss_of(module):
    pixels, labels = images()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module(pixels), labels))


KINDS = [*SETTINGS, "plain"]


# What it trains and measures.


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_learns(tmp_path, kind):
    module = module_of(kind, learning_rate=3e-3)
    before = {name: parameter.detach().clone() for name, parameter in module.model.named_parameters()}
    start = loss_of(module)
    trainer = fit(module, tmp_path)
    assert loss_of(module) < start
    changed = [name for name, parameter in module.model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(changed) > 0.9 * len(before)
    assert {"train_loss", "val_loss", "val_accuracy", "val_top5_accuracy"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize("kind", ["convnext", "plain"])
def test_validation_and_test_log_what_evaluate_finds(tmp_path, kind):
    module = module_of(kind)
    data = loader(batch_size=5)
    expected = module.evaluate(data)
    pixels, labels = images()
    logits = module.eval()(pixels).detach()
    trainer = Trainer(default_root_dir=tmp_path, **QUIET)
    (tested,) = trainer.test(module, data, verbose=False)
    (validated,) = trainer.validate(module, data, verbose=False)
    assert expected["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    loss = float(nn.functional.cross_entropy(logits, labels))
    for stage, figures in (("test", tested), ("val", validated)):
        found = {name.removeprefix(f"{stage}_"): value for name, value in figures.items()}
        assert found == pytest.approx(expected | {"loss": loss}, rel=1e-5)
    assert set(module.metrics) == set(expected)


def test_label_smoothing_is_of_training_alone():
    smoothed, plain = module_of("plain", label_smoothing=0.5), module_of("plain")
    batch = images()
    for module in (smoothed, plain):
        module.log = lambda *args, **kwargs: None
    with torch.no_grad():
        logits = plain(batch[0]).double().log_softmax(1)
        hot = nn.functional.one_hot(batch[1], 7) * 0.5 + 0.5 / 7
        found = float(smoothed.training_step(batch, 0))
    assert found == pytest.approx(float(-(hot * logits).sum(1).mean()), rel=1e-5)
    smoothed.validation_step(batch, 0)
    plain.validation_step(batch, 0)
    assert smoothed.losses["val"].compute() == plain.losses["val"].compute()


def test_batches_come_in_several_forms():
    module = module_of("plain").eval()
    pixels, labels = images()
    expected = module(pixels)
    forms = [
        {"pixel_values": pixels, "labels": labels},
        {"image": pixels, "label": labels},
        {"images": pixels, "label": labels, "name": ["a"] * len(labels)},
        (pixels, labels),
        [pixels, labels.int()],
    ]
    figures = [module.evaluate([batch]) for batch in forms]
    assert all(torch.equal(module.predict_step(batch, 0), expected) for batch in [*forms, pixels])
    assert all(found == figures[0] for found in figures)


@pytest.mark.parametrize("kind", ["deit", "convnext", "plain"])
def test_half_precision_weights_take_images_of_floats(kind):
    module = module_of(kind, dtype="bfloat16") if kind != "plain" else module_of(kind).bfloat16()
    assert {parameter.dtype for parameter in module.model.parameters()} == {torch.bfloat16}
    assert module(images()[0]).dtype == torch.bfloat16
    module.evaluate(loader())


# Optimizers.


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("adamw_8bit", torch.optim.Optimizer)]
)
def test_vectors_do_not_decay(name, kind):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no 8-bit optimizer")
    module = module_of("convnext", optimizer=name, learning_rate=0.1, weight_decay=0.3, momentum=0.7)
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, kind)
    decays = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert decays.keys() == set(module.model.parameters())
    assert all(decay == (0.3 if parameter.ndim > 1 else 0) for parameter, decay in decays.items())
    assert all(group["lr"] == 0.1 and group.get("momentum", 0.7) == 0.7 for group in optimizer.param_groups)


def test_frozen_parameters_are_left_out():
    module = module_of("plain")
    module.model.stem.requires_grad_(False)
    held = {p for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert held == {p for p in module.model.parameters() if p.requires_grad}
    module.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter requires a gradient"):
        module.configure_optimizers()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"momentum": 1.0}, "momentum is 1"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam': the choices are adamw, sgd and adamw_8bit"),
        ({"num_classes": 1}, "num_classes is 1"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        module_of("plain", **settings)


# Bad input.


def test_a_head_of_another_size(tmp_path):
    module_of("vit").model.save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"has 7 classes, and num_classes is 10: leave num_classes out .* new_head=True"
    ):
        ImageClassifierModule(str(tmp_path), num_classes=10)
    with pytest.raises(ConfigError, match="has 7 classes, and num_classes is 10"):
        ImageClassifierModule("vit", PATCHES | {"num_labels": 7}, num_classes=10)
    module = ImageClassifierModule(Plain(), num_classes=10)  # which nobody can know before it says something
    with pytest.raises(ConfigError, match="has 7 classes, and num_classes is 10"):
        module(images()[0])


@pytest.mark.parametrize("kind", ["convnext", "plain"])
@pytest.mark.parametrize("step", ["training_step", "validation_step", "test_step"])
@pytest.mark.parametrize(
    ("label", "message"), [(7, "label 7, and the model's head has 7 classes"), (-1, "label -1; labels are from 0 to 6")]
)
def test_labels_outside_the_head(kind, step, label, message):
    pixels, labels = images()
    labels[3] = label
    with pytest.raises(DataError, match=message):
        getattr(module_of(kind), step)((pixels, labels), 0)


@pytest.mark.parametrize("kind", SETTINGS)
def test_images_of_another_kind(kind):
    module = module_of(kind)
    with pytest.raises(DataError, match=r"have 1 channel\(s\) and the model takes 3"):
        module(images(channels=1)[0])
    with pytest.raises(DataError, match="scale and normalise"):
        module(images()[0].byte())
    with pytest.raises(DataError, match=r"a tensor \(3, 16, 16\)"):
        module(images()[0][0])
    if kind in ("deit", "vit"):
        with pytest.raises(DataError, match="are 20x20 and the model takes 16x16"):
            module(images(side=20)[0])
    else:  # these take any size
        assert module(images(side=20)[0]).shape == (24, 7)


def test_what_a_model_raises_for_images_of_another_size_is_reported_with_both_sizes():
    module = ImageClassifierModule("swin", SETTINGS["swin"] | {"use_absolute_embeddings": True})
    with pytest.raises(DataError, match=r"fails on images \(24, 3, 4, 12\), and its config has image_size=16: "):
        module(torch.zeros(24, 3, 4, 12))
    convnext = module_of("convnext")
    with pytest.raises(DataError, match=r"fails on images \(2, 3, 1, 1\), .*Resize the images"):
        convnext(torch.zeros(2, 3, 1, 1))
    convnext.model.classifier = nn.Linear(5, 7)  # what is wrong with the model itself is another error
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        convnext(images()[0])


def test_a_loss_that_is_not_a_number_ends_training():
    pixels, labels = images()
    pixels[2, 0, 0, 0] = float("nan")
    with pytest.raises(SparsefitError, match="loss of batch 4 is not a number"):
        module_of("convnext").training_step((pixels, labels), 4)
    with pytest.raises(SparsefitError, match="logits of 1 of 24 images of batch 5 are not finite"):
        module_of("convnext").validation_step((pixels, labels), 4)


def test_a_model_that_gives_no_logits():
    with pytest.raises(ConfigError, match=r"gives \(24, 8, 4, 4\) for 24 images"):
        ImageClassifierModule(nn.Conv2d(3, 8, 4, 4))(images()[0])
