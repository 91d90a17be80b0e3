"""`prune` on image classifiers, whose blocks may stand in stages, against passes of the whole model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from image_models import BLOCKS, MODELS, image_model, images
from reference import assert_mask, score_of
from reference_inputs import collect, covered, linear_layers, matrix_of, spread_weights, staged
from torch import Tensor, nn

from sparsefit import PruningConfig, prune
from sparsefit.pruning.blocks import find_block_lists


def blocks_of(model: nn.Module, family: str) -> list[list[str]]:
    """The names of the weights of each block, in calling order."""
    blocks = [f"{name}.{i}" for name in BLOCKS[family] for i in range(len(model.get_submodule(name)))]
    return [[f"{layer}.weight" for layer in linear_layers(model, [block])] for block in blocks]


def assert_chosen(dense: nn.Module, pruned: nn.Module, result, stages: list[list[str]], score: str, **selection):
    samples = [{"pixel_values": image[None]} for image in images()]
    seen = []
    for name, weight, _, inputs in staged(dense, pruned, samples, stages):
        scores, tolerance = score_of(score, weight, inputs)
        assert_mask(result.masks[name], scores, max(tolerance, 1e-5), **selection)
        seen.append(name)
    assert seen == list(result.masks) == [name for stage in stages for name in stage]


@pytest.mark.parametrize("family", MODELS)
def test_blocks_are_found_and_all_else_stays_dense(family):
    model = image_model(family)
    wanted = [list(model.get_submodule(name)) for name in BLOCKS[family]]
    assert find_block_lists(model) == wanted
    result = prune(model, [images()], PruningConfig(granularity="layer", update="none"))
    inside = [name for block in blocks_of(model, family) for name in block]
    assert list(result.masks) == inside
    assert covered(model, result)
    assert not result.notes
    for name in ("downsample.reduction", "downsampling_layer.1", "dwconv", "projection", "patch_embeddings"):
        assert not any(name in pruned for pruned in result.masks)


@pytest.mark.parametrize("update", ["block", "none"])
@pytest.mark.parametrize("family", MODELS)
def test_masks_equal_whole_model_passes(family, update):
    model = image_model(family)
    dense = copy.deepcopy(model)
    result = prune(model, images().split(4), PruningConfig(update=update, micro_batch_size=4))
    assert result.update == update
    assert not result.notes
    blocks = blocks_of(dense, family)
    stages = {"block": blocks, "none": [[name for block in blocks for name in block]]}
    assert_chosen(dense, model, result, stages[update], "wanda")


@pytest.mark.parametrize("settings", [{"granularity": "layer", "sparsity": 0.7}, {"pattern": "2:4"}])
@pytest.mark.parametrize("score", ["wanda", "magnitude", "ria"])
@pytest.mark.parametrize("family", ["ConvNext", "DeiT"])
def test_scores_and_patterns(family, score, settings):
    model = image_model(family)
    dense = copy.deepcopy(model)
    result = prune(model, [images()], PruningConfig(score=score, update="none", **settings))
    stages = [[name for block in blocks_of(dense, family) for name in block]]
    assert_chosen(dense, model, result, stages, score, **({"granularity": "output"} | settings))


@pytest.mark.parametrize("settings", [{"score": "sparsegpt", "reconstruction": "iterative"}, {"swaps": 3}])
@pytest.mark.parametrize("family", ["ConvNext", "Swin"])
def test_methods_with_gram_matrices_lower_the_error(family, settings):
    """Of the first block, whose inputs are the dense ones whatever is done."""
    plain, other = image_model(family), image_model(family)
    dense = copy.deepcopy(plain)
    prune(plain, [images()], PruningConfig())
    result = prune(other, [images()], PruningConfig(**settings))
    assert result.update == "block"
    assert result.masks.sparsity == pytest.approx(0.5, abs=0.02)
    inputs = collect(dense, [{"pixel_values": images()}])

    def error(model: nn.Module, name: str) -> float:
        x = inputs[name][0]
        return float(((matrix_of(model, name) - matrix_of(dense, name)) @ x.t()).square().sum())

    first = blocks_of(dense, family)[0]
    assert np.mean([error(other, n) for n in first]) < np.mean([error(plain, n) for n in first])


class Residual(nn.Module):
    """A block of ConvNeXt as other libraries write it: two linear layers, or two 1x1 convolutions."""

    def __init__(self, width: int, pointwise: bool) -> None:
        super().__init__()
        self.pointwise = pointwise
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        sizes = (width, 2 * width), (2 * width, width)
        self.fc1, self.fc2 = (nn.Conv2d(*size, 1) if pointwise else nn.Linear(*size) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dwconv(x)
        hidden = hidden if self.pointwise else hidden.movedim(1, -1)
        hidden = self.fc2(torch.relu(self.fc1(hidden)))
        return x + (hidden if self.pointwise else hidden.movedim(-1, 1))


def downsampling(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(1, before), nn.Conv2d(before, after, 2, stride=2))


class Stage(nn.Module):
    def __init__(self, before: int, after: int, depth: int, pointwise: bool) -> None:
        super().__init__()
        self.downsample = downsampling(before, after)
        self.blocks = nn.Sequential(*(Residual(after, pointwise) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1))


def stages_of_their_own(pointwise: bool) -> nn.Module:
    stages = nn.Sequential(Stage(4, 8, 1, pointwise), Stage(8, 16, 3, pointwise))
    return nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), stages, Pool(), nn.Linear(16, 5))


def stages_in_a_row(pointwise: bool) -> nn.Module:
    first, second = (nn.Sequential(*(Residual(width, pointwise) for _ in range(2))) for width in (8, 16))
    features = nn.Sequential(downsampling(3, 8), first, downsampling(8, 16), second)
    return nn.Sequential(features, Pool(), nn.Sequential(nn.Flatten(), nn.Linear(16, 5)))


@pytest.mark.parametrize("update", ["block", "none"])
@pytest.mark.parametrize("pointwise", [False, True])
@pytest.mark.parametrize("make", [stages_of_their_own, stages_in_a_row])
def test_stages_of_other_libraries(make, pointwise, update):
    model = spread_weights(make(pointwise))
    dense = copy.deepcopy(model)
    result = prune(model, [images()], PruningConfig(update=update))
    assert result.update == update
    blocks = [name for name, module in dense.named_modules() if isinstance(module, Residual)]
    names = [[f"{block}.fc1.weight", f"{block}.fc2.weight"] for block in blocks]
    every = [name for block in names for name in block]
    samples = [image[None] for image in images()]
    seen = []
    for name, weight, _, inputs in staged(dense, model, samples, names if update == "block" else [every]):
        scores, tolerance = score_of("wanda", weight, inputs)
        assert_mask(result.masks[name], scores, max(tolerance, 1e-5))
        seen.append(name)
    assert seen == list(result.masks) == every


def test_experts_in_a_block_are_no_blocks_of_a_stage():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(16, 2)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2))

    layers = nn.ModuleList(Experts() for _ in range(3))
    assert find_block_lists(layers) == [list(layers)]
