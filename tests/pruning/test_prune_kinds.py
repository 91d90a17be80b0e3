"""`prune` on layers of other kinds than nn.Linear: 1x1 convolutions, Conv1D, nn.MultiheadAttention, shared weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from passes import collect, convolved, matrix_of, staged
from reference import assert_mask, gram_of, reference_error, score_of
from torch import Tensor, nn

from sparsefit import PruningConfig, prune
from sparsefit.pruning.reconstruction import inverse_factor, update_sequentially

ONE_PASS = {"update": "none", "micro_batch_size": 1}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def spread(model: nn.Module) -> nn.Module:
    """Weights and biases that all matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def covered(model: nn.Module, result) -> bool:
    """Whether every matrix is either pruned or left dense for a reason."""
    matrices = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1}
    told = {matrices[name] for name in (*result.masks.parameters, *result.left_dense)}
    return told == set(matrices.values()) and all(result.left_dense.values())


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
    model = spread(nn.Sequential(nn.Conv2d(8, 6, 1, **CONVOLUTIONS[kind]), nn.ReLU())).to(dtype)
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


def test_convolutions_that_mix_positions_or_groups_are_left_dense():
    model = spread(
        nn.Sequential(
            nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, groups=8)
        )
    )
    result = prune(model, images(), PruningConfig(**ONE_PASS))
    assert list(result.masks) == ["0.weight"]
    assert result.left_dense == {f"{i}.weight": "not a linear layer: Conv2d" for i in (1, 2, 3)}


def test_images_without_a_batch_dimension():
    model = spread(nn.Sequential(nn.Conv2d(8, 6, 1, stride=2)))
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


# nn.MultiheadAttention

ENCODER = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
DECODER = [*ENCODER[:2], "multihead_attn.in_proj_weight", "multihead_attn.out_proj.weight", *ENCODER[2:]]


def encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=batch_first)
    return spread(nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first))


def decoder(batch_first: bool) -> nn.Module:
    return spread(nn.TransformerDecoder(nn.TransformerDecoderLayer(12, 2, 24, batch_first=batch_first), 2))


def sequences(batch_first: bool, lengths: tuple[int, ...] = (9, 6, 9), width: int = 12) -> list[Tensor]:
    scale = torch.linspace(0.2, 3, width)
    return [torch.randn(*((1, n) if batch_first else (n, 1)), width) * scale for n in lengths]


def scores_of(name: str, weight: Tensor, inputs: dict[str, list[Tensor]], score: str):
    """Of a packed projection the rows of query, key and value are scored from what each of them sees."""
    if name in inputs:
        return score_of(score, weight, inputs[name])[0]
    thirds = zip(weight.chunk(3), "qkv", strict=True)
    return np.concatenate([score_of(score, rows, inputs[f"{name}/{part}"])[0] for rows, part in thirds])


def check_attention(
    model: nn.Module, data: list[dict[str, Tensor]], settings: dict[str, Any], layers: list[str]
) -> Any:
    dense = copy.deepcopy(model)
    # Sequences first: the first dimension of a batch counts tokens, and no sample may be taken apart.
    whole = [batch | {"scalar": torch.tensor(0)} for batch in data]
    call = lambda model, batch: model(**{k: v for k, v in batch.items() if k != "scalar"})  # noqa: E731
    result = prune(
        model, whole, PruningConfig(micro_batch_size=1, **settings), forward=lambda batch: call(model, batch)
    )
    selection = {key: settings[key] for key in ("pattern", "granularity") if key in settings}
    stages = [[f"layers.{i}.{name}" for name in layers] for i in (0, 1)]
    stages = [stages[0] + stages[1]] if settings.get("update") == "none" else stages
    assert set(result.masks) == {name for stage in stages for name in stage}
    for stage in stages:
        inputs = collect(dense, whole, call)
        for name in stage:
            weight, mask = matrix_of(dense, name), result.masks[name]
            print(name)
            assert_mask(mask, scores_of(name, weight, inputs, settings.get("score", "wanda")), 1e-4, **selection)
            assert torch.equal(matrix_of(model, name), torch.where(mask, weight, 0)), name
            weight.copy_(matrix_of(model, name))
    assert result.notes == []
    assert covered(model, result)
    return result


ATTENTION_SETTINGS = [
    {},
    {"pattern": "2:4"},
    {"granularity": "layer"},
    {"score": "sparsegpt", "granularity": "output"},
    {"update": "none"},
]


@pytest.mark.parametrize("settings", ATTENTION_SETTINGS, ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_of_an_encoder(batch_first, settings):
    assert torch.backends.mha.get_fastpath_enabled()
    data = [{"src": x} for x in sequences(batch_first)]
    result = check_attention(encoder(batch_first), data, settings, ENCODER)
    assert result.masks["layers.0.self_attn.in_proj_weight"].shape == (36, 12)
    assert result.tokens == 24
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("settings", ATTENTION_SETTINGS, ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_cross_attention_sees_other_inputs_in_the_rows_of_keys_and_values(batch_first, settings):
    memories = sequences(batch_first, (7, 12, 5))
    data = [{"tgt": x, "memory": 3 * m.flip(-1)} for x, m in zip(sequences(batch_first), memories, strict=True)]
    check_attention(decoder(batch_first), data, settings, DECODER)


@pytest.mark.parametrize("order", ["block", "layer"])
def test_causal_masks_reach_the_reference_too(order):
    hidden = nn.Transformer.generate_square_subsequent_mask(9)
    data = [{"tgt": x, "memory": 2 * x.flip(-1), "tgt_mask": hidden} for x in sequences(True, (9, 9))]
    model = decoder(True)
    if order == "block":
        check_attention(model, data, {}, DECODER)
        return
    result = prune(
        model,
        [batch | {"scalar": torch.tensor(0)} for batch in data],
        PruningConfig(update="layer"),
        forward=lambda batch: model(**{k: v for k, v in batch.items() if k != "scalar"}),
    )
    assert result.update == "layer"
    assert result.notes == []
    assert len(result.masks) == 12
    result.masks.verify(model)


@pytest.mark.parametrize("settings", [{}, {"pattern": "1:4"}, {"score": "ria"}], ids=str)
def test_keys_and_values_of_other_widths(settings):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 2, kdim=8, vdim=4, batch_first=True)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attention(query, key, value, need_weights=False)[0]

    model = spread(Attention())
    data = [
        {"query": torch.randn(1, 5, 12), "key": torch.randn(1, 7, 8), "value": torch.randn(1, 7, 4)} for _ in range(3)
    ]
    dense = copy.deepcopy(model)
    result = prune(model, data, PruningConfig(**settings, **ONE_PASS))
    names = [f"attention.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")]
    assert list(result.masks) == names
    assert result.masks[names[1]].shape == (12, 8)
    for name, weight, changed, inputs in staged(dense, model, data, [names]):
        scores = score_of(settings.get("score", "wanda"), weight, inputs)[0]
        assert_mask(result.masks[name], scores, 1e-4, pattern=settings.get("pattern"))
        assert torch.equal(changed, torch.where(result.masks[name], weight, 0))
    assert covered(model, result)


@pytest.mark.parametrize("reconstruction", ["sequential", "iterative", "least_squares"])
def test_weights_of_cross_attention_are_updated_from_what_their_rows_see(reconstruction):
    model = decoder(True)
    data = [{"tgt": x, "memory": 3 * x.flip(-1) ** 2} for x in sequences(True, (30, 30, 30))]
    dense = copy.deepcopy(model)
    result = prune(model, data, PruningConfig(reconstruction=reconstruction, micro_batch_size=1))
    result.masks.verify(model)
    inputs, name = collect(dense, data), "layers.0.multihead_attn.in_proj_weight"
    changed, weight, mask = matrix_of(model, name), matrix_of(dense, name), result.masks[name]
    for rows, part in zip(torch.arange(36).chunk(3), "qkv", strict=True):
        seen = inputs[f"{name}/{part}"]
        if reconstruction == "sequential":
            gram = torch.from_numpy(gram_of(seen)).float()
            expected = update_sequentially(weight[rows], mask[rows], inverse_factor(gram))
            torch.testing.assert_close(changed[rows], expected, rtol=1e-2, atol=1e-3)
        masked = torch.where(mask[rows], weight[rows], 0)
        assert reference_error(weight[rows], changed[rows], seen) < reference_error(weight[rows], masked, seen)


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"targets": ("in_proj_weight",)}, {"in_proj_weight"}),
        ({"targets": ("self_attn.out_proj",)}, {"weight"}),
        ({"exclude": ("in_proj_weight", "linear1")}, {"weight"}),
    ],
)
def test_targets_and_exclusions_of_attention(settings, kinds):
    model = encoder(True)
    result = prune(model, sequences(True), PruningConfig(**settings))
    assert {name.rpartition(".")[2] for name in result.masks} == kinds
    assert covered(model, result)
    left = result.left_dense.get("layers.0.self_attn.in_proj_weight")
    assert left == (
        "excluded by the configuration"
        if "exclude" in settings
        else None
        if kinds == {"in_proj_weight"}
        else "not among the targets"
    )


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
    model = spread(nn.Sequential(Tied(), Tied()))
    dense, data = copy.deepcopy(model), [torch.randn(1, 5, 10) for _ in range(3)]
    result = prune(model, data, PruningConfig(score=score, granularity="output", update=update, micro_batch_size=1))
    assert list(result.masks) == ["0.first.weight", "1.first.weight"]
    assert result.tokens == 2 * 15
    stages = [["0.first.weight"], ["1.first.weight"]] if update == "block" else [["0.first.weight", "1.first.weight"]]
    for name, weight, changed, inputs in staged(dense, model, data, stages):
        assert len(inputs) == 6
        assert_mask(result.masks[name], score_of(score, weight, inputs)[0], 1e-4)
        assert torch.equal(changed, torch.where(result.masks[name], weight, 0))
    assert torch.equal(model[0].second.weight, model[0].first.weight)
