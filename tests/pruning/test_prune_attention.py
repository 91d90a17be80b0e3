"""`prune` on nn.MultiheadAttention, in the encoders and decoders of torch: rows of one matrix see different inputs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from reference import assert_mask, gram_of, reference_error, score_of
from reference_inputs import collect, covered, matrix_of, spread_weights, staged
from torch import Tensor, nn

from sparsefit import PruningConfig, prune
from sparsefit.pruning.weight_updates import inverse_factor, update_sequentially

ONE_PASS = {"update": "none", "micro_batch_size": 1}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


ENCODER = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
DECODER = [*ENCODER[:2], "multihead_attn.in_proj_weight", "multihead_attn.out_proj.weight", *ENCODER[2:]]


def encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=batch_first)
    return spread_weights(nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first))


def decoder(batch_first: bool) -> nn.Module:
    return spread_weights(nn.TransformerDecoder(nn.TransformerDecoderLayer(12, 2, 24, batch_first=batch_first), 2))


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


def test_causal_masks_reach_the_reference_too():
    hidden = nn.Transformer.generate_square_subsequent_mask(9)
    data = [{"tgt": x, "memory": 2 * x.flip(-1), "tgt_mask": hidden} for x in sequences(True, (9, 9))]
    check_attention(decoder(True), data, {}, DECODER)


@pytest.mark.parametrize("settings", [{}, {"pattern": "1:4"}, {"score": "ria"}], ids=str)
def test_keys_and_values_of_other_widths(settings):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 2, kdim=8, vdim=4, batch_first=True)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attention(query, key, value, need_weights=False)[0]

    model = spread_weights(Attention())
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
