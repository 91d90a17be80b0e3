from __future__ import annotations

import copy
import csv
import functools
import json
from pathlib import Path

import peft
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from pruned_fits import Watch, strategy
from ranks import ddp, on_ranks
from small_runs import (
    Classifier,
    LanguageModel,
    RankedData,
    fit,
    labelled,
    momentum,
    text,
    trainer_with,
)

from sparsefit import PruningConfig, prune
from sparsefit.callbacks import WandaPruning
from sparsefit.errors import ConfigError


def lora(model, **settings):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, **settings))


def under_model(masks):
    return {f"model.{name}": mask for name, mask in masks.items()}


def assert_equal_masks(masks, expected):
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


# What is pruned.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sparsity": 0.3, "update": "none", "micro_batch_size": 3},
        {"pattern": "2:4", "targets": ["up", "gate_proj"]},
        {"score": "magnitude", "sparsity": 0.7},
        {"allocation": "fisher"},
    ],
)
@pytest.mark.parametrize("kind", ["plain", "transformers", "peft"])
def test_the_masks_are_those_of_prune(tiny_model, kind, settings):
    if "targets" in settings:
        settings = settings | {"targets": ["up"] if kind == "plain" else ["gate_proj"]}
    model = Classifier().model if kind == "plain" else tiny_model("llama")
    data = labelled() if kind == "plain" else text()
    bare = copy.deepcopy(model)
    if kind == "plain":
        module = Classifier()
        module.model = model
    else:
        module = LanguageModel(lora(model) if kind == "peft" else model)
    pruning = WandaPruning(**settings, calibration=list(data))
    fit(module, data, pruning, max_steps=0)

    batches = [x for x, _ in data] if kind == "plain" else [{"input_ids": batch["input_ids"]} for batch in data]
    expected = prune(bare, batches, PruningConfig(**settings)).masks
    assert_equal_masks(pruning.masks, under_model(expected))
    assert pruning.masks.sparsity == pytest.approx(settings.get("sparsity", 0.5), abs=0.05)
    pruned = module.model.unload() if kind == "peft" else module.model
    for name, parameter in bare.named_parameters():
        assert torch.equal(parameter, pruned.get_parameter(name)), name
    assert pruning.result.config == PruningConfig(**settings)


def test_under_lora_only_adapters_change_and_nothing_runs_per_step(tiny_model, monkeypatch):
    hooks = []
    monkeypatch.setattr(torch.Tensor, "register_hook", lambda *_: hooks.append("gradient"))
    monkeypatch.setattr(torch.optim.Optimizer, "register_step_post_hook", lambda *_: hooks.append("step"))
    module, watch = LanguageModel(lora(tiny_model("llama"))), Watch()
    watch.on_pruning_end = lambda trainer, module, result: watch.__setattr__(
        "state", copy.deepcopy(module.state_dict())
    )
    pruning = WandaPruning()
    fit(module, text(), pruning, watch)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, watch.state[name])}
    assert changed == {name for name in watch.state if "lora_" in name}
    assert hooks == []
    assert not any("lora" in name for name in pruning.masks)


def test_other_callbacks_see_the_dense_and_the_pruned_model_in_any_order():
    before, after = Watch(), Watch()
    pruning = WandaPruning()
    fit(Classifier(), labelled(), before, pruning, after)
    zeros = sum(count for _, count in pruning.masks.counts().values())
    for watch in (before, after):
        assert watch.events == ["start", "end", "train"]
        assert watch.zeros == [0, zeros, zeros]
        assert watch.result is pruning.result


def test_a_budgetless_run_trains_as_a_pruned_model_would():
    module, pruning = Classifier(), WandaPruning(calibration=list(labelled()))
    fit(module, labelled(), pruning)
    other = Classifier()
    prune(other, [x for x, _ in labelled()])
    masks = pruning.masks
    fit(other, labelled(), max_epochs=1, limit_train_batches=1)
    assert not torch.equal(other.model.head.weight, module.model.head.weight)
    again, second = Classifier(), WandaPruning(calibration=list(labelled()))
    fit(again, labelled(), second)
    assert second.masks.digest() == masks.digest()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


# Once.


def test_fitting_again_prunes_only_what_is_dense():
    module, pruning, watch = Classifier(), WandaPruning(), Watch()
    fit(module, labelled(), pruning, watch)
    digest = pruning.masks.digest()
    fit(module, labelled(), pruning, watch)
    assert watch.events.count("start") == 1
    assert pruning.masks.digest() == digest
    other = Classifier(seed=1)
    fit(other, labelled(), pruning, watch)
    assert watch.events.count("start") == 2
    assert pruning.masks.digest() != digest
    pruning.masks.verify(other)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("same_callback", [False, True])
def test_a_resumed_run_keeps_its_masks(tmp_path, late, same_callback):
    first = WandaPruning()
    trainer = fit(Classifier(), labelled(), first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    digest = first.masks.digest()

    # Other settings and other data: nothing of them may count.
    pruning = first if same_callback else WandaPruning(sparsity=0.2, calibration=list(labelled(seed=9)))
    module, watch = Classifier(seed=5), Watch()
    fit(module, labelled(), pruning, watch, **strategy(late), ckpt_path=tmp_path / "a.ckpt")
    assert watch.events == ["train"]
    assert pruning.masks.digest() == digest == saved["callbacks"]["WandaPruning"]["digest"]
    assert pruning.masks.sparsity == 0.5
    pruning.masks.verify(module)

    straight, straight_pruning = Classifier(), WandaPruning()
    fit(straight, labelled(), straight_pruning)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), module.parameters(), strict=True))


def test_resuming_with_other_settings_says_that_they_change_nothing(tmp_path):
    trainer = fit(Classifier(), labelled(), WandaPruning(), max_steps=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="stays pruned as in the checkpoint"):
        trainer_with(WandaPruning(sparsity=0.2), max_steps=2).fit(
            Classifier(), labelled(), ckpt_path=tmp_path / "a.ckpt"
        )


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("max_steps", [0, 12])
@pytest.mark.parametrize("late", [False, True])
def test_the_checkpoint_of_a_dense_run_is_pruned(tmp_path, late, max_steps, used_before):
    if max_steps == 0 and late:
        pytest.skip("with nothing to train, no hook comes after the restoring")
    dense = Classifier(lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1))
    fit(dense, labelled(), max_steps=8).save_checkpoint(tmp_path / "dense.ckpt")
    expected = prune(dense, [x for x, _ in labelled()]).masks
    module, pruning, watch = Classifier(dense.optimizer), WandaPruning(), Watch()
    if used_before:
        fit(Classifier(seed=3), labelled(), pruning, max_steps=1)
    fit(
        module, labelled(), pruning, watch, **strategy(late),
        max_epochs=-1, max_steps=max_steps, ckpt_path=tmp_path / "dense.ckpt",
    )  # fmt: skip
    assert watch.events == ["start", "end", "train"][: 3 if max_steps else 2]
    assert watch.zeros[0] == 0
    assert_equal_masks(pruning.masks, expected)
    pruning.masks.verify(module)  # the moments of the dense run have brought nothing back


# Messages.


def test_what_is_decided_is_logged_and_saved(tmp_path):
    logger, pruning = CSVLogger(tmp_path), WandaPruning(sparsity=0.25, exclude=["blocks.1.up"])
    trainer = fit(Classifier(), labelled(), pruning, logger=logger, log_every_n_steps=1)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        row = next(csv.DictReader(file))
    assert float(row["pruning/sparsity"]) == 0.25
    assert float(row["pruning/coverage"]) == pruning.summary["coverage"] == pruning.result.coverage < 1
    assert float(row["pruning/overall_sparsity"]) == pruning.summary["overall_sparsity"] < 0.25
    assert float(row["pruning/seconds"]) > 0
    assert float(row["pruning/peak_memory_bytes"]) > 1e6
    layers = {key: float(value) for key, value in row.items() if key.startswith("sparsity/")}
    assert layers == {f"sparsity/model.blocks.{n}.weight": 0.25 for n in ("0.up", "0.down", "1.down")}
    hparams = Path(logger.log_dir, "hparams.yaml").read_text()
    assert "pruning/score: wanda" in hparams
    assert pruning.masks.digest() in hparams

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    summary = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["WandaPruning"]["summary"]
    assert summary == pruning.summary
    assert summary["config"]["exclude"] == ["blocks.1.up"]
    assert summary["left_dense"]["model.blocks.1.up.weight"] == "excluded by the configuration"
    assert (summary["samples"], summary["tokens"], summary["source"]) == (16, 16, "the training data")
    assert json.dumps(summary)


@pytest.mark.parametrize(
    "settings", [{"sparsity": 1.0}, {"calibration_samples": 0}, {"calibration_samples": 2.5}, {"score": "wandb"}]
)
def test_settings_that_cannot_work(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        WandaPruning(**settings)


# Two processes.


def record_of_a_fit(**settings):
    module, pruning = Classifier(momentum), WandaPruning()
    fit(module, RankedData(), pruning, **settings)
    pruning.masks.verify(module)
    sums = [float(parameter.detach().double().sum()) for parameter in module.parameters()]
    return {"digest": pruning.masks.digest(), "weights": sums} | {
        key: pruning.summary[key] for key in ("samples", "tokens")
    }


def test_two_ranks_choose_the_masks_of_one():
    one, (first, second) = record_of_a_fit(), on_ranks(2, functools.partial(record_of_a_fit, **ddp(2)))
    assert one["digest"] == first["digest"] == second["digest"]
    assert (one["samples"], first["samples"], second["samples"]) == (32, 32, 32)
    assert one["tokens"] == first["tokens"] == second["tokens"] == 32
    assert first["weights"] == second["weights"]
