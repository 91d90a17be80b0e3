from __future__ import annotations

import copy
import json

import pytest
import torch
from lightning.pytorch import Callback
from ranks import ddp, on_ranks
from small_runs import Classifier, Data, LanguageModel, RankedData, fit, labelled, text
from torch import nn

from sparsefit import PruningConfig, prune
from sparsefit.callbacks import BlockwiseReconstruction, GPUHourBudget, PrunedRunCallback, WandaPruning, reconstruction
from sparsefit.callbacks.trainer_lookup import ledger_of
from sparsefit.errors import ConfigError
from sparsefit.recovery.adapters import AdapterSettings, attach_adapter
from sparsefit.recovery.block_reconstruction import ReconstructSettings, dense_weights, reconstruct

SETTINGS = {"passes": 5, "learning_rate": 5e-3, "batch_size": 4}


class Watch(PrunedRunCallback):
    """What the model is like at each hook of the pruning."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.states: list[dict[str, torch.Tensor]] = []
        self.bytes = 0

    def on_pruning_end(self, trainer, module, result):
        self.note("pruned", module)

    def on_base_ready(self, trainer, module, masks):
        masks.verify(module)
        self.note("ready", module)

    def on_train_start(self, trainer, module):
        self.note("train", module)

    def note(self, event, module):
        self.events.append(event)
        self.states.append(copy.deepcopy(module.state_dict()))


def expected_state(module, data, **settings):
    """The module pruned and reconstructed by the engine alone."""
    dense = dense_weights(module)
    batches = [x for x, _ in data]
    masks = prune(module, batches, PruningConfig()).masks
    errors = reconstruct(module, batches, dense, masks, ReconstructSettings(**settings))
    return module.state_dict(), errors


def differing(first, second):
    return {name for name in first if not torch.equal(first[name], second[name])}


class Fails(PrunedRunCallback):
    def on_pruning_end(self, trainer, module, result):
        raise RuntimeError("broken")


@pytest.mark.parametrize("in_tuning", [False, True])
def test_after_an_error_it_holds_no_dense_weights(in_tuning, monkeypatch):
    blocks = BlockwiseReconstruction(**SETTINGS)

    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    if in_tuning:
        monkeypatch.setattr(reconstruction, "reconstruct", fail)
    with pytest.raises(RuntimeError, match="broken"):
        fit(Classifier(), labelled(), WandaPruning(), blocks, *([] if in_tuning else [Fails()]))
    assert blocks._dense == {}


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (2, 0, 1)])
def test_it_tunes_between_pruning_and_training_wherever_it_stands(order):
    watch, blocks, pruning = Watch(), BlockwiseReconstruction(**SETTINGS), WandaPruning()
    callbacks = [(watch, blocks, pruning)[number] for number in order]
    module = Classifier()
    expected, errors = expected_state(Classifier(), labelled(), **SETTINGS)
    trainer = fit(module, labelled(), *callbacks, max_epochs=1)
    assert watch.events == ["pruned", "ready", "train"]
    pruned, ready, train = watch.states
    assert differing(pruned, ready) == set(pruning.masks)
    assert differing(ready, train) == set()
    for name, value in expected.items():
        torch.testing.assert_close(ready[name], value)
    assert differing(ready, module.state_dict())  # it was trained on
    pruning.masks.verify(module)

    account = blocks.account
    assert {key: account[key] for key in SETTINGS} == SETTINGS
    assert account["source"] == "the training data"
    assert 0 < account["seconds"] == ledger_of(trainer).seconds["reconstruction"]
    assert [entry["block"] for entry in account["blocks"]] == ["model.blocks.0", "model.blocks.1"]
    for entry, error in zip(account["blocks"], errors, strict=True):
        assert entry["before"] == pytest.approx(error.before)
        assert entry["after"] == pytest.approx(error.after)
        assert entry["after"] < entry["before"]
        assert entry["steps"] == 20
    assert json.dumps(account)


def test_without_passes_nothing_happens():
    watch, blocks = Watch(), BlockwiseReconstruction(passes=0)
    trainer = fit(Classifier(), labelled(), blocks, WandaPruning(), watch, max_steps=1)
    assert differing(watch.states[0], watch.states[1]) == set()
    assert blocks.account == {}
    assert "reconstruction" not in ledger_of(trainer).seconds


def test_without_pruning_nothing_happens():
    module, blocks = Classifier(), BlockwiseReconstruction(**SETTINGS)
    before = copy.deepcopy(module.state_dict())
    fit(module, labelled(), blocks, max_steps=0)
    assert differing(before, module.state_dict()) == set()
    assert blocks.account == {}


def test_it_takes_the_calibration_data_that_it_is_given():
    own, theirs = BlockwiseReconstruction(**SETTINGS, calibration=list(labelled(6, seed=3))), Data(calibration=4)
    fit(Classifier(), theirs, own, WandaPruning(), max_steps=0)
    assert own.account["source"] == "the calibration argument"
    assert own.account["blocks"][0]["steps"] == 2 * SETTINGS["passes"]
    from_data = BlockwiseReconstruction(**SETTINGS, calibration_samples=4)
    fit(Classifier(), theirs, from_data, WandaPruning(), max_steps=0)
    assert from_data.account["source"] == "the datamodule's calibration_dataloader()"
    assert from_data.account["blocks"][0]["steps"] == SETTINGS["passes"]


def test_training_sees_its_data_from_the_start():
    module, other = Classifier(), Classifier()
    fit(
        module,
        labelled(shuffle=True, generator=torch.Generator().manual_seed(1)),
        BlockwiseReconstruction(**SETTINGS),
        WandaPruning(),
    )
    fit(other, labelled(shuffle=True, generator=torch.Generator().manual_seed(1)))
    assert len(module.seen) == len(other.seen)
    assert all(torch.equal(a, b) for a, b in zip(module.seen, other.seen, strict=True))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("form", ["masked_lora", "full"])
def test_the_base_is_tuned_and_adapters_are_not(tiny_model, form, precision):
    watch, blocks, pruning = Watch(), BlockwiseReconstruction(3, 2e-3, 4), WandaPruning()
    settings = AdapterSettings(form, r=2, target_modules=("q_proj", "down_proj"))
    module = LanguageModel(attach_adapter(tiny_model("llama"), settings))
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    fit(module, text(), blocks, pruning, watch, max_steps=2, precision=precision)
    pruned, ready, _ = watch.states
    tuned = {name.replace("base_model.model.", "").replace("base_layer.", "") for name in differing(pruned, ready)}
    assert tuned == set(pruning.masks)
    assert all(entry["after"] < entry["before"] for entry in blocks.account["blocks"])
    assert {name: p.requires_grad for name, p in module.named_parameters()} == flags
    assert {p.dtype for name, p in module.named_parameters() if "lora" not in name} == {
        torch.bfloat16 if precision == "bf16-true" else torch.float32
    }
    changed = differing(ready, module.state_dict())
    assert changed == {name for name, trains in flags.items() if trains}
    pruning.masks.verify(module)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_resumed_run_does_not_tune_again(tmp_path, fresh):
    def callbacks():
        return [BlockwiseReconstruction(**SETTINGS), WandaPruning(), Watch()]

    first = callbacks()
    fit(Classifier(), labelled(), *first, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    again, module = (callbacks() if fresh else first), Classifier(seed=3)
    fit(module, labelled(), *again, ckpt_path=tmp_path / "a.ckpt")
    assert again[2].events.count("ready") == (not fresh)
    straight = Classifier()
    fit(straight, labelled(), *callbacks())
    assert differing(straight.state_dict(), module.state_dict()) == set()


@pytest.mark.slow
def test_the_budget_gives_it_its_share():
    budget = GPUHourBudget(8 / 3600, split={"reconstruction": 0.2, "training": 0.8})
    blocks = BlockwiseReconstruction(10**6, 1e-3, 8)
    trainer = fit(Classifier(), labelled(), blocks, WandaPruning(), budget, max_epochs=-1, max_steps=5)
    # A fifth of eight seconds less the reserve and what pruning took.
    assert 0.8 < blocks.account["seconds"] < 2.0
    assert budget.ledger.seconds["reconstruction"] == blocks.account["seconds"]
    assert all(entry["steps"] > 5 and entry["after"] < entry["before"] for entry in blocks.account["blocks"])
    assert trainer.global_step == 5


@pytest.mark.parametrize("split", [{"reconstruction": 0.0, "training": 1.0}, None])
def test_no_share_and_no_split(split):
    blocks, watch = BlockwiseReconstruction(**SETTINGS), Watch()
    fit(Classifier(), labelled(), blocks, WandaPruning(), GPUHourBudget(1.0, split=split), watch, max_steps=1)
    assert [entry["steps"] for entry in blocks.account["blocks"]] == [0 if split else 20] * 2
    assert bool(differing(watch.states[0], watch.states[1])) == (split is None)


class Unlike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


def test_a_model_without_blocks_is_reported():
    module = Classifier()
    module.model = Unlike()
    with pytest.raises(ConfigError, match="no repeated blocks"):
        fit(module, labelled(), BlockwiseReconstruction(**SETTINGS), WandaPruning(), max_steps=1)


@pytest.mark.parametrize("settings", [{"passes": -1}, {"learning_rate": 0.0}, {"batch_size": 0}])
def test_settings_that_cannot_work(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        BlockwiseReconstruction(**settings)


class State(Callback):
    def on_train_start(self, trainer, pl_module):
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}


def reconstructed_base():
    state = State()
    callbacks = [BlockwiseReconstruction(**SETTINGS), WandaPruning(), state]
    fit(Classifier(), RankedData(), *callbacks, max_steps=1, **ddp(2))
    return state.state


@pytest.mark.slow
def test_two_ranks_train_the_same_base():
    assert differing(*on_ranks(2, reconstructed_base)) == set()
