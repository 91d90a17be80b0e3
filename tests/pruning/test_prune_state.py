"""What `prune` leaves behind: a model as it was but for its zeros, whole pruned or untouched."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from model_snapshots import same, sequences, state, weights
from reference import assert_mask, score_of
from reference_inputs import linear_layers, staged
from torch import nn

from sparsefit import PruningConfig, prune
from sparsefit.errors import CalibrationError, ConfigError


def unusual(model: nn.Module) -> nn.Module:
    """A model in the middle of something: parts in training, parts frozen, hooks and replaced forwards."""
    model.train()
    model.model.norm.eval()
    model.model.layers[1].eval()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    block = model.model.layers[1]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("update", ["block", "none"])
@pytest.mark.parametrize("fails", [False, True], ids=["works", "fails"])
def test_all_but_the_pruned_weights_is_as_it_was(tiny_model, update, fails):
    model = unusual(tiny_model("llama"))
    assert model.config.use_cache
    model.model.layers[2].mlp.down_proj.register_forward_hook(lambda *_: 1 / 0 if fails else None)
    before, dense = state(model), weights(model)
    if fails:
        with pytest.raises(ZeroDivisionError):
            prune(model, sequences(2), PruningConfig(update=update))
        assert same(weights(model), dense)
    else:
        masks = prune(model, sequences(2), PruningConfig(update=update)).masks
        expected = {n: torch.where(masks[n], w, 0.0) if n in masks else w for n, w in dense.items()}
        assert same(weights(model), expected)
    assert state(model) == before
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off_while_calibrating(tiny_model):
    settings = {"attention_dropout": 0.5}
    training, evaluating = tiny_model("llama", **settings).train(), tiny_model("llama", **settings)
    assert prune(training, sequences(3)).masks.digest() == prune(evaluating, sequences(3)).masks.digest()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("update", ["block", "none"])
def test_autocast_reaches_into_the_blocks(tiny_model, update, inference):
    model, dtypes = tiny_model("llama"), set()
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, args, output: dtypes.add(output.dtype))
    dense, config = copy.deepcopy(model), PruningConfig(0.6, update=update, micro_batch_size=1)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(inference):
        result = prune(model, sequences(3), config)
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_cache_enabled()
    assert dtypes == {torch.bfloat16}
    blocks = [[f"{name}.weight" for name in linear_layers(model, [f"model.layers.{i}"])] for i in range(3)]
    stages = blocks if update == "block" else [[name for block in blocks for name in block]]
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        for name, weight, _, inputs in staged(dense, model, sequences(3), stages):
            assert_mask(result.masks[name], *score_of("wanda", weight, inputs), sparsity=0.6)
    assert result.masks.digest() != prune(tiny_model("llama"), sequences(3), config).masks.digest()


@pytest.mark.parametrize("update", ["block", "none"])
def test_gradients_stay_off_in_the_blocks(tiny_model, update):
    model, seen = tiny_model("llama"), set()
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, args, output: seen.add(output.requires_grad))
    prune(model, sequences(2), PruningConfig(update=update))
    assert seen == {False}
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("update", "passes"), [("block", 2), ("none", 1)])
def test_blocks_are_computed_as_often_as_the_order_takes(tiny_model, update, passes):
    model, calls = tiny_model("llama"), Counter()
    layers = linear_layers(model, ["model.layers"])
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    prune(model, sequences(5), PruningConfig(update=update, micro_batch_size=2))
    # What a sample reaches, and how blocks hand on what they compute, is found out with one.
    looks = 3 if update == "block" else 1
    assert all(calls[name] <= 3 * passes + looks for name in layers), calls


@pytest.mark.parametrize("source", ["forward", "forward_pre"])
def test_exceptions_of_the_model_are_passed_on_whole(tiny_model, source):
    class OwnError(Exception):
        pass

    error = OwnError("out of luck")

    def fail(*_):
        raise error

    model = tiny_model("llama")
    block = model.model.layers[1].mlp
    (block.register_forward_hook if source == "forward" else block.register_forward_pre_hook)(fail)
    dense = weights(model)
    with pytest.raises(OwnError) as caught:
        prune(model, sequences(2))
    assert caught.value is error
    assert same(weights(model), dense)


BAD_CALLS = {
    "width": (
        {"pattern": "1:5", "exclude": ("down_proj",)},
        sequences(1),
        ConfigError,
        r"layers\.0\.self_attn\.q_proj\.weight \(32",
    ),
    "target": ({"targets": ("q_porj",)}, [], ConfigError, "no prunable layer is named 'q_porj'.*q_proj"),
    "exclude": ({"exclude": ("down_porj",)}, [], ConfigError, "'down_porj'.*down_proj"),
    "all excluded": ({"targets": ("q_proj",), "exclude": ("q_proj",)}, [], ConfigError, "no prunable weights"),
    "no source": ({}, None, CalibrationError, "give `batches`"),
    "empty": ({}, [], CalibrationError, "no batch"),
    "one batch": ({}, sequences(1)[0], CalibrationError, r"\[batch\]"),
    "one tensor": ({}, sequences(1)[0]["input_ids"], CalibrationError, r"\[batch\]"),
    "not iterable": ({}, 7, CalibrationError, "int"),
    "text": ({}, ["a text"], CalibrationError, "batch is str"),
    "numbers": ({}, [3], CalibrationError, "batch is int"),
    "too many values": ({}, [tuple(range(40))], CalibrationError, "40 positional values"),
    "wrong keys": ({}, [{"pixel_values": torch.zeros(1, 3)}], Exception, "input_ids"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_calls_that_cannot_work_name_the_cause_and_change_nothing(tiny_model, case):
    settings, batches, error, cause = BAD_CALLS[case]
    model = tiny_model("llama")
    dense, before = weights(model), state(model)
    with pytest.raises(error, match=cause):
        prune(model, batches, PruningConfig(**settings))
    assert same(weights(model), dense)
    assert state(model) == before


def test_wrong_keys_of_a_plain_module_name_its_signature():
    class Model(nn.Sequential):
        def forward(self, pixels):
            return super().forward(pixels)

    model = Model(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(CalibrationError, match=r"keys image.*\(pixels\)"):
        prune(model, [{"image": torch.randn(2, 4)}])


def test_a_generator_that_was_used_up_is_no_calibration_data(tiny_model):
    source = iter(sequences(3))
    model = tiny_model("llama")
    prune(model, source)
    dense = weights(model)
    with pytest.raises(CalibrationError, match="used up"):
        prune(model, source)
    assert same(weights(model), dense)


def test_a_model_without_prunable_layers_is_refused():
    with pytest.raises(ConfigError, match="no prunable weights"):
        prune(nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.BatchNorm2d(3)), [torch.randn(1, 3, 8, 8)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("update", ["block", "none"])
def test_activations_that_are_not_finite_name_layer_and_batch(tiny_model, update, size, bad):
    batches = [{"inputs_embeds": torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(i))} for i in range(5)]
    batches[3]["inputs_embeds"][1, 4, 7] = bad
    model = tiny_model("opt", do_layer_norm_before=False)
    dense, before = weights(model), state(model)
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.[kqv]_proj\.weight .*batch 3\b"):
        prune(model, batches, PruningConfig(update=update, micro_batch_size=size))
    assert same(weights(model), dense)
    assert state(model) == before


def test_activations_that_are_not_finite_are_found_behind_flattened_inputs():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x.flatten(0, 1))

    batches = [torch.randn(2, 5, 4) for _ in range(4)]
    batches[2][0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"layer\.weight .*batch 2\b"):
        prune(Flat(), batches)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=str)
@pytest.mark.parametrize("score", ["wanda", "magnitude"])
def test_weights_that_are_not_finite_name_their_layer(tiny_model, score, value):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 4] = value
    dense = weights(model)
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.v_proj\.weight"):
        prune(model, sequences(2), PruningConfig(score=score))
    assert same(weights(model), dense)


def test_scores_beyond_float32_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(model[0].weight, 1e30)
    dense = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=r"0\.weight.*too large"):
        prune(model, [torch.full((1, 4), 1e15)], PruningConfig(targets=("0",)))
    assert same(weights(model), dense)
