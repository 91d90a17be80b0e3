"""`collect_statistics`: statistics taken once give the masks and weights that each pruning alone would give."""

from __future__ import annotations

import copy

import pytest
import torch
from image_models import image_model, images
from torch import nn

from sparsefit import PruningConfig, collect_statistics, prune, prune_from_statistics
from sparsefit.errors import CalibrationError, ConfigError

IDS = torch.arange(3, 51).view(4, 12)
CONFIGS = [
    {"sparsity": 0.6},
    {"sparsity": 0.8, "granularity": "layer"},
    {"pattern": "2:4"},
    {"score": "magnitude"},
    {"score": "ria", "granularity": "input"},
    {"score": "wanda_linf"},
    {"granularity": "variant"},
    {"allocation": "owl"},
    {"swaps": 2},
    {"score": "sparsegpt", "reconstruction": "iterative"},
    {"reconstruction": "least_squares"},
]


def models(tiny_model) -> dict[str, tuple[nn.Module, list]]:
    mixed = {"input_ids": IDS, "attention_mask": (IDS < 40).long()}
    return {
        "llama": (tiny_model("llama"), [mixed, IDS[:2]]),
        "mixtral": (tiny_model("mixtral"), [IDS]),
        "convnext": (image_model("ConvNext"), [images()]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "convnext"])
def test_each_pruning_is_that_of_its_own_pass(tiny_model, architecture):
    model, data = models(tiny_model)[architecture]
    before = copy.deepcopy(model.state_dict())
    configs = [PruningConfig(update="none", **settings) for settings in CONFIGS]
    statistics = collect_statistics(model, data, configs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for config in configs:
        alone, shared = copy.deepcopy(model), copy.deepcopy(model)
        own = prune(alone, data, config)
        result = prune_from_statistics(shared, statistics, config)
        assert (result.masks.digest(), result.update) == (own.masks.digest(), "none"), config
        assert result.samples == own.samples
        assert result.layer_errors == pytest.approx(own.layer_errors, rel=1e-4)
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(shared.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=str(config))


def test_a_pass_runs_the_model_once_a_micro_batch_and_pruning_not_at_all():
    model, calls = image_model("DeiT"), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    statistics = collect_statistics(model, images(10).split(4), [PruningConfig(update="none", micro_batch_size=5)])
    assert len(calls) == 3  # and once with the sample that shows what is reached
    prune_from_statistics(model, statistics, PruningConfig(update="none"))
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"update": "block"}, "update='none'"),
        ({"update": "none", "swaps": 1}, "gram was not collected"),
        ({"update": "none", "targets": ["classifier"]}, "they lack classifier.weight"),
    ],
)
def test_statistics_that_do_not_fit_change_nothing(config, words):
    model = image_model("DeiT")
    before = copy.deepcopy(model.state_dict())
    statistics = collect_statistics(model, [images()], [PruningConfig(update="none")])
    with pytest.raises(ConfigError, match=words):
        prune_from_statistics(model, statistics, PruningConfig(**config))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_magnitude_in_any_order_needs_nothing_of_them():
    model = image_model("DeiT")
    statistics = collect_statistics(model, [images()], [])
    result = prune_from_statistics(model, statistics, PruningConfig(score="magnitude"))
    assert result.masks.sparsity == pytest.approx(0.5, abs=0.01)


def test_nan_inputs_are_named():
    data = images()
    data[3] = torch.nan
    with pytest.raises(CalibrationError, match="NaN or infinite in calibration batch"):
        collect_statistics(image_model("ConvNext"), [data], [PruningConfig(update="none")])
