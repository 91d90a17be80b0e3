"""`prune` on layers of other kinds than nn.Linear: 1x1 convolutions, GPT-2's Conv1D, shared weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference import assert_mask, gram_of, score_of
from reference_inputs import convolved, covered, matrix_of, spread_weights, staged
from torch import Tensor, nn

from sparsefit import PruningConfig, prune
from sparsefit.pruning.weight_updates import inverse_factor, update_sequentially

ONE_PASS = {"update": "none", "micro_batch_size": 1}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# Convolutions


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2},
    "two strides": {"stride": (1, 3)},
    "padding": {"padding": 1},
    "stride and padding": {"stride": 2, "padding": 1},
    "no bias": {"bias": False},
}


def images(count: int = 3) -> list[Tensor]:
    scale = torch.linspace(0.2, 2, 49).reshape(7, 7)
    return [torch.randn(1, 8, 7, 7) * scale * torch.linspace(0.3, 3, 8).reshape(8, 1, 1) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"pattern": "2:4"}, {"score": "sparsegpt"}], ids=["wanda", "2:4", "sparsegpt"]
)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_pointwise_convolutions(kind, settings, dtype):
    model = spread_weights(nn.Sequential(nn.Conv2d(8, 6, 1, **CONVOLUTIONS[kind]), nn.ReLU())).to(dtype)
    data, dense = [image.to(dtype) for image in images()], copy.deepcopy(model)
    result = prune(model, data, PruningConfig(granularity="output", **settings, **ONE_PASS))
    ((name, weight, changed, inputs),) = staged(dense, model, data, [["0.weight"]])
    score = settings.get("score", "wanda")
    # The order in which positions are summed is not the reference's.
    assert_mask(result.masks[name], score_of(score, weight, inputs)[0], 1e-4, pattern=settings.get("pattern"))
    assert torch.equal(changed, torch.where(result.masks[name], weight, 0))
    assert result.masks[name].shape == (6, 8)
    assert model[0].weight.shape == (6, 8, 1, 1)
    assert torch.equal(result.masks.for_parameter(name, model[0].weight), model[0].weight != 0)
    result.masks.verify(model)


def test_layers_that_are_no_matrices_are_left_dense_for_a_reason():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.depthwise = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, groups=8)
            self.embedding, self.projecting = nn.Embedding(4, 8), nn.LSTM(8, 8, proj_size=4)
            self.transposed, self.bilinear = nn.ConvTranspose2d(8, 8, 3), nn.Bilinear(8, 8, 8)
            self.top = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.transposed(self.depthwise(self.convolution(x))).mean((2, 3))
            projected, _ = self.projecting(hidden + self.embedding.weight[0])
            return self.top(self.bilinear(hidden, hidden) + projected.repeat(1, 2))

    result = prune(spread_weights(Model()), images(), PruningConfig(**ONE_PASS))
    assert list(result.masks) == ["convolution.weight", "projecting.weight_ih_l0", "projecting.weight_hh_l0"]
    assert result.left_dense == {
        "depthwise.weight": "depthwise convolution",
        "embedding.weight": "embedding",
        "projecting.weight_hr_l0": "projection of an LSTM",
        "transposed.weight": "not a layer that is pruned: ConvTranspose2d",
        "bilinear.weight": "not a layer that is pruned: Bilinear",
        "top.weight": "output layer",
    }


def test_images_without_a_batch_dimension():
    model = spread_weights(nn.Sequential(nn.Conv2d(8, 6, 1, stride=2)))
    dense, data = copy.deepcopy(model), [image[0] for image in images()]
    tokens = [convolved(dense[0], image)[0] for image in data]
    # Beside a scalar, the first dimension of a tensor does not count samples.
    batches = [{"image": image, "scalar": torch.tensor(1)} for image in data]
    result = prune(model, batches, PruningConfig(**ONE_PASS), forward=lambda batch: model(batch["image"]))
    assert result.tokens == 3 * 16
    assert_mask(result.masks["0.weight"], score_of("wanda", matrix_of(dense, "0.weight"), tokens)[0], 1e-4)


# GPT-2's Conv1D


@pytest.mark.parametrize("settings", [{"pattern": "1:4"}, {"granularity": "input"}, {"reconstruction": "sequential"}])
def test_weights_stored_the_other_way_round(tiny_model, settings):
    model = tiny_model("gpt2", n_layer=2)
    generator = torch.Generator().manual_seed(1)
    data = [{"input_ids": torch.randint(3, 61, (1, 40), generator=generator)} for _ in range(2)]
    dense = copy.deepcopy(model)
    result = prune(model, data, PruningConfig(**settings, micro_batch_size=1))
    selection = {key: value for key, value in settings.items() if key != "reconstruction"}
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    stages = [[f"transformer.h.{layer}.{name}.weight" for name in names] for layer in (0, 1)]
    for name, weight, changed, inputs in staged(dense, model, data, stages):
        mask = result.masks[name]
        assert mask.shape == weight.shape == model.get_parameter(name).shape[::-1]
        assert_mask(mask, *score_of("wanda", weight, inputs), **selection)
        if "reconstruction" in settings:
            gram = torch.from_numpy(gram_of(inputs)).float()
            torch.testing.assert_close(
                changed, update_sequentially(weight, mask, inverse_factor(gram)), rtol=1e-2, atol=1e-3
            )
    assert covered(model, result)
    result.masks.verify(model)


# Shared weights


class Tied(nn.Module):
    """Two layers that share one weight, with other inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(3 * self.first(x).tanh() ** 3)


@pytest.mark.parametrize("score", ["wanda", "wanda_linf", "wanda_l1", "sparsegpt", "ria"])
@pytest.mark.parametrize("update", ["block", "none"])
def test_the_inputs_of_layers_that_share_a_weight_add_up(update, score):
    model = spread_weights(nn.Sequential(Tied(), Tied()))
    dense, data = copy.deepcopy(model), [torch.randn(1, 5, 10) for _ in range(3)]
    settings = {"score": score, "granularity": "output", "update": update, "targets": "*"}
    result = prune(model, data, PruningConfig(**settings, micro_batch_size=1))
    assert list(result.masks) == ["0.first.weight", "1.first.weight"]
    assert result.tokens == 2 * 15
    stages = [["0.first.weight"], ["1.first.weight"]] if update == "block" else [["0.first.weight", "1.first.weight"]]
    for name, weight, changed, inputs in staged(dense, model, data, stages):
        assert len(inputs) == 6
        assert_mask(result.masks[name], score_of(score, weight, inputs)[0], 1e-4)
        assert torch.equal(changed, torch.where(result.masks[name], weight, 0))
    assert torch.equal(model[0].second.weight, model[0].first.weight)
