"""Image classifiers, pruned per layer and then fine-tuned: no weight comes back, whatever trains it."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTImageProcessorPil

from sparsefit import PruningConfig, prune
from sparsefit.callbacks import RunReport, WandaPruning
from sparsefit.modules import ImageClassifierModule

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
MODELS = {
    "convnext": {
        "hidden_sizes": [8, 32],
        "depths": [1, 1],
        "num_stages": 2,
        "patch_size": 2,
        "image_size": 8,
        "layer_scale_init_value": 1.0,
        "num_labels": 3,
    },
    "deit": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 8,
        "patch_size": 4,
        "num_labels": 3,
    },
}


class Images(LightningDataModule):
    """Images that show their class by their brightness; other ones to calibrate and to test on."""

    def train_dataloader(self):
        return _loader(0, 48)

    def calibration_dataloader(self):
        return _loader(1, 24)

    def val_dataloader(self):
        return _loader(2, 12)

    def test_dataloader(self):
        return _loader(3, 24)


def _loader(seed, count):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=random)
    pixels = torch.randn(count, 3, 8, 8, generator=random)
    pixels[:, 0] += 2 * labels[:, None, None] - 2
    return DataLoader(TensorDataset(pixels, labels), batch_size=8)


def module_of(kind, **settings):
    torch.manual_seed(0)
    return ImageClassifierModule(kind, MODELS[kind], **{"learning_rate": 1e-2} | settings)


def fit(module, *callbacks, **settings):
    trainer = Trainer(
        callbacks=list(callbacks),
        enable_model_summary=False,
        **QUIET | {"max_epochs": 3, "enable_checkpointing": False} | settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, Images())
    return trainer


def pruning_of(sparsity=0.6):
    return WandaPruning(sparsity, granularity="layer", update="none")


SGD = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1, "learning_rate": 0.05}
ADAMW = {"optimizer": "adamw", "weight_decay": 0.5}
EIGHT_BITS = {"optimizer": "adamw_8bit", "weight_decay": 0.5}

# Settings of the module, further callbacks, settings of the trainer.
TRAININGS = {
    "sgd": (SGD, [], {}),
    "adamw": (ADAMW, [], {}),
    "adamw_8bit": (EIGHT_BITS, [], {}),
    "accumulation": (SGD, [], {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
    "bf16-mixed": (ADAMW, [], {"precision": "bf16-mixed"}),
    "bf16-mixed, sgd": (SGD, [], {"precision": "bf16-mixed", "accumulate_grad_batches": 4}),
    "bf16-true": (ADAMW, [], {"precision": "bf16-true"}),
    "averaging": (ADAMW, [WeightAveraging], {}),
    "moving average": (SGD, [lambda: EMAWeightAveraging(decay=0.8)], {}),
    "moving average in bf16": (ADAMW, [lambda: EMAWeightAveraging(decay=0.8)], {"precision": "bf16-mixed"}),
    "swa": (SGD, [lambda: StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1, annealing_epochs=1)], {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", TRAININGS)
def test_no_weight_comes_back(tmp_path, kind, name):
    own, others, settings = TRAININGS[name]
    if own is EIGHT_BITS:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no 8-bit optimizer")
    module, pruning = module_of(kind, **own), pruning_of()
    start = copy.deepcopy(module.model)
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1)
    others = [other() for other in others]
    trainer = fit(module, pruning, *others, checkpoints, enable_checkpointing=True, **settings)

    masks = pruning.masks
    assert trainer.global_step > 0
    assert masks.sparsity == pytest.approx(0.6, abs=0.02)
    for weight, mask in masks.items():
        now, was = module.get_parameter(weight), start.get_parameter(weight.removeprefix("model."))
        mask = mask.view(now.shape)
        assert torch.all(now[~mask] == 0)
        assert (now != was.to(now.dtype))[mask].float().mean() > 0.5, weight
    for file in tmp_path.glob("*.ckpt"):
        masks.verify(torch.load(file, weights_only=True)["state_dict"])
    assert len(list(tmp_path.glob("*.ckpt"))) == 3


@pytest.mark.parametrize("settings", [SGD, ADAMW])
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_pruned_weights_leave_no_trace_in_the_optimizer(settings, precision):
    module, pruning = module_of("convnext", **settings), pruning_of()
    trainer = fit(module, pruning, precision=precision, accumulate_grad_batches=2)
    states = trainer.optimizers[0].state
    moments = 0
    for weight, mask in pruning.masks.items():
        parameter = module.get_parameter(weight)
        for value in states[parameter].values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                moments += 1
                assert torch.all(value[~mask.view(value.shape)] == 0)
                assert torch.any(value != 0)
    assert moments == len(pruning.masks) * (1 if settings is SGD else 2)


@pytest.mark.parametrize("kind", MODELS)
def test_the_masks_are_those_of_prune(kind):
    module, pruning = module_of(kind), pruning_of()
    bare = copy.deepcopy(module.model)
    fit(module, pruning, max_steps=0)
    batches = [{"pixel_values": pixels} for pixels, _ in Images().calibration_dataloader()]
    expected = prune(bare, batches, PruningConfig(0.6, granularity="layer", update="none")).masks
    assert pruning.masks.digest() == expected.renamed(lambda name: f"model.{name}").digest()


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_a_run_reports_accuracies_and_leaves_a_folder_that_loads(tmp_path, kind):
    module = module_of(kind, learning_rate=3e-3)
    module.image_processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    fit(module, pruning_of(), RunReport(str(tmp_path / "run")), max_epochs=6)
    report = json.loads((tmp_path / "run/report.json").read_text())
    for metric in ("accuracy", "top5_accuracy"):
        assert report["metrics"][metric] == "higher"
        assert set(report[metric]) >= {"dense", "pruned", "recovered"}
    assert report["accuracy"]["recovered"] > report["accuracy"]["pruned"]
    assert report["sparsity"]["asked"] == 0.6
    assert [point["value"] for point in report["timeline"] if point["stage"] == "validation"]

    again = ImageClassifierModule(str(tmp_path / "run/model"))
    assert again.image_processor.size["height"] == 8
    data = Images().test_dataloader()
    assert again.evaluate(data) == pytest.approx({name: report[name]["recovered"] for name in again.metrics})
    with torch.no_grad():
        pixels = next(iter(data))[0]
        assert torch.equal(again.eval()(pixels), module.eval()(pixels))


@pytest.mark.parametrize("settings", [SGD, ADAMW])
def test_a_resumed_run_ends_as_one_that_ran_through(tmp_path, settings):
    whole, first, second = (module_of("convnext", **settings) for _ in range(3))
    through = pruning_of()
    fit(whole, through, max_epochs=2)
    fit(first, pruning_of(), max_epochs=1).save_checkpoint(tmp_path / "run.ckpt")
    resumed = pruning_of()
    trainer = Trainer(
        callbacks=[resumed], max_epochs=2, enable_checkpointing=False, enable_model_summary=False, **QUIET
    )
    trainer.fit(second, Images(), ckpt_path=tmp_path / "run.ckpt")
    assert resumed.masks.digest() == through.masks.digest()
    states = (whole.model.state_dict(), second.model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("first", ["pruning", "average"])
def test_an_average_that_never_begins_is_of_the_pruned_model(tmp_path, first):
    module, pruning = module_of("convnext", **SGD), pruning_of()
    start = copy.deepcopy(module)
    average = EMAWeightAveraging(decay=0.8, update_starting_at_step=1000)
    both = [pruning, average] if first == "pruning" else [average, pruning]
    fit(module, *both, ModelCheckpoint(tmp_path, save_top_k=-1), enable_checkpointing=True)
    pruning.masks.verify(module)
    # The fit ends with the average in the module. It has no step in it: it is the start, masked.
    averaged, dense = module.state_dict(), start.state_dict()
    for name, mask in pruning.masks.items():
        assert torch.equal(averaged[name], dense[name] * mask.view(dense[name].shape))
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 3
    for checkpoint in (torch.load(file, weights_only=True) for file in files):
        assert all(torch.equal(value, averaged[name]) for name, value in checkpoint["state_dict"].items())
        pruning.masks.verify(checkpoint["current_model_state"])
        assert any(not torch.equal(value, averaged[name]) for name, value in checkpoint["current_model_state"].items())
