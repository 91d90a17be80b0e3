"""`QuantizedBase`: fits with the base in 4 and 8 bits; resumed, merged, on two ranks, and refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from pruned_fits import strategy
from quantized_fits import HELD, NAMES, assert_same, callbacks, held_layers, module, state, train
from small_runs import Classifier, fit, labelled

from sparsefit.callbacks import PrunedRunCallback, WandaPruning
from sparsefit.callbacks.quantization import QuantizedBase
from sparsefit.errors import ConfigError
from sparsefit.quantized import dequantized
from sparsefit.recovery.distill import DistillSettings

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized base")


class Watch(PrunedRunCallback):
    """Notes whether the base is quantized, hook by hook."""

    def __init__(self):
        self.seen = {}

    def on_base_ready(self, trainer, module, masks):
        self.seen["base"] = len(held_layers(module))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.setdefault("batch", len(held_layers(module)))

    def on_train_end(self, trainer, module):
        self.seen["end"] = len(held_layers(module))


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
def test_the_base_is_quantized_after_pruning_wherever_the_callback_stands(order, late):
    watch, pair = Watch(), callbacks(order, kind="nf4")
    model = module()
    train(model, watch, *pair, **strategy(late))
    assert watch.seen == {"base": 0, "batch": 14, "end": 14}
    pruning = next(c for c in pair if isinstance(c, WandaPruning))
    pruning.masks.verify(model)


def test_without_a_kind_nothing_changes():
    plain, with_callback = module(), module()
    train(plain, WandaPruning())
    train(with_callback, *callbacks())
    assert_same(state(plain), state(with_callback))


@pytest.mark.parametrize("held", HELD, ids=NAMES)
def test_the_account(held):
    pair = callbacks(**held)
    model = module()
    train(model, *pair, steps=1)
    account = pair[1].account
    assert account["kind"] == held["kind"]
    assert account["double_quant"] == held.get("double_quant", False)
    assert len(account["layers"]) == 14
    assert account["left"] == {}
    weights = sum(size for size, _ in pair[0].masks.counts().values())
    saved = account["bytes_before"] - account["bytes_after"]
    assert 0.2 * 4 * weights < saved < 4 * weights  # each layer has a code book of its own
    json.dumps(account)


def test_a_second_fit_continues_with_the_quantized_base():
    pair, model = callbacks(kind="nf4"), module()
    train(model, *pair)
    before, account = {k: dequantized(layer) for k, layer in held_layers(model).items()}, pair[1].account
    train(model, *pair)
    assert pair[1].account == account
    for key, layer in held_layers(model).items():
        assert torch.equal(dequantized(layer), before[key])


# What is refused, before anything is pruned.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: module(distill=DistillSettings()), "distillation needs the base in floats"),
        (lambda: module("full"), "form full trains the base itself"),
        (lambda: module("hira"), r"has an adapter .* that computes with the numbers of its weight"),
    ],
    ids=["distill", "full", "hira"],
)
def test_what_cannot_be_trained_so_is_refused_before_pruning(make, message):
    model = make()
    before = state(model)
    with pytest.raises(ConfigError, match=message):
        train(model, *callbacks(kind="nf4"))
    assert_same(state(model), before)


def test_a_plain_module_that_trains_its_weights_is_refused():
    with pytest.raises(ConfigError, match="trains, and a quantized weight cannot"):
        fit(Classifier(), labelled(), *callbacks(kind="nf4"))


def test_it_needs_masks():
    with pytest.raises(ConfigError, match="add WandaPruning"):
        train(module(), QuantizedBase("nf4"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "nf3"}, "the choices are nf4 and int8"),
        ({"kind": "int8", "double_quant": True}, "settings of nf4"),
        ({"kind": "nf4", "compute_dtype": "int8"}, "compute_dtype is 'int8'"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        QuantizedBase(**settings)


def test_without_bitsandbytes_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    QuantizedBase()
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        QuantizedBase("nf4")
