from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recorded_inputs import spread, watch, weights_of
from torch import Tensor, nn

from sparsefit.pruning.input_watch import watching
from sparsefit.pruning.layers import attention, matrices_of


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def slow_attention() -> Iterator[None]:
    """Without the fast path of nn.MultiheadAttention, whose numbers differ in the last bits."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def attended(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None
) -> Tensor:
    """The input of out_proj, head by head and position by position; all (batch, tokens, features)."""
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = module.in_proj_bias.chunk(3)
    q, k, v = (x @ w.t() + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    out = torch.zeros_like(q)
    size = module.head_dim
    for sample in range(len(q)):
        for start in range(0, q.shape[-1], size):
            part = slice(start, start + size)
            logits = q[sample, :, part] @ k[sample, :, part].t() / size**0.5
            if padding is not None:
                logits[:, padding[sample]] = -torch.inf
            out[sample, :, part] = logits.softmax(-1) @ v[sample, :, part]
    return out


def mha(**settings: Any) -> nn.MultiheadAttention:
    return spread(nn.MultiheadAttention(8, 2, **settings))


@pytest.mark.usefixtures("slow_attention")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross", "all different", "kdim and vdim"])
def test_attention_inputs(kind: str, batch_first: bool, padded: bool):
    sizes = {"kdim": 6, "vdim": 4} if kind == "kdim and vdim" else {}
    module = mha(batch_first=batch_first, **sizes)
    query, key, value = (
        torch.randn(3, 5, 8),
        torch.randn(3, 7, sizes.get("kdim", 8)),
        torch.randn(3, 7, sizes.get("vdim", 8)),
    )
    if kind == "self":
        key = value = query
    if kind == "cross":
        value = key
    padding = torch.zeros(3, key.shape[1], dtype=torch.bool)
    padding[1, 3:] = True
    distinct = {id(x): x if batch_first else x.transpose(0, 1) for x in (query, key, value)}
    given = [distinct[id(x)] for x in (query, key, value)]

    def run() -> tuple[Tensor, Tensor]:
        return module(*given, key_padding_mask=padding if padded else None)

    with torch.no_grad():
        plain = run()
        (outputs, weights), records = watch(matrices_of(module), run)
        reference = attended(module, query, key, value, padding if padded else None)
    assert outputs.equal(plain[0])
    assert weights.equal(plain[1])
    found = [(record.name, record.rows) for record in records]
    inputs = [query] if kind == "self" else [query, key, value]
    if kind == "self":
        expected = [("in_proj_weight", None)]
    elif kind == "kdim and vdim":
        expected = [(f"{x}_proj_weight", None) for x in "qkv"]
    else:
        expected = [("in_proj_weight", (8 * i, 8 * i + 8)) for i in range(3)]
    assert found == [*expected, ("out_proj.weight", None)]
    for record, tensor in zip(records[:-1], inputs, strict=True):
        assert record.tokens.equal(tensor.flatten(0, 1))
    torch.testing.assert_close(records[-1].tokens, reference.flatten(0, 1))


@pytest.mark.usefixtures("slow_attention")
@pytest.mark.parametrize("settings", [{}, {"kdim": 8, "vdim": 8, "batch_first": True}], ids=["packed", "separate"])
def test_one_tensor_of_the_model_is_one_input(settings: dict[str, Any]):
    module, query, key = mha(**settings), torch.randn(5, 3, 8), torch.randn(5, 3, 8)
    seen = []
    with torch.no_grad(), watching(matrices_of(module), seen.append):
        module(query, key, key)
    assert seen[1].same_input(seen[2])
    assert not seen[0].same_input(seen[1])


@pytest.mark.usefixtures("slow_attention")
@pytest.mark.parametrize(
    ("settings", "call"),
    [
        ({}, {"need_weights": False}),
        ({}, {"average_attn_weights": False}),
        ({"bias": False}, {}),
        ({"add_bias_kv": True, "add_zero_attn": True}, {}),
        ({}, {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True, "need_weights": False}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batched", [True, False])
def test_attention_gives_what_it_gives_unwatched(
    settings: dict[str, Any], call: dict[str, Any], dtype: torch.dtype, batched: bool
):
    module = mha(**settings).to(dtype)
    x = torch.randn(*((5, 3) if batched else (5,)), 8, dtype=dtype)
    with torch.no_grad():
        plain = module(x, x, x, **call)
        watched, records = watch(matrices_of(module), lambda: module(x, x, x, **call))
    assert watched[0].equal(plain[0])
    assert watched[1] is plain[1] is None or watched[1].equal(plain[1])
    assert [record.inputs.shape for record in records] == [(3, 5, 8) if batched else (5, 8)] * 2
    assert [record.tokens.dtype for record in records] == [dtype] * 2
    (alone,) = [weight for weight in matrices_of(module) if weight.name == "out_proj.weight"]
    assert [record.name for record in watch([alone], lambda: module(x, x, x))[1]] == ["out_proj.weight"]


@pytest.mark.usefixtures("slow_attention")
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_of_torch(batch_first: bool):
    model = spread(nn.Transformer(8, 2, 2, 2, 16, batch_first=batch_first)).eval()
    source, target = torch.randn(2, 6, 8), torch.randn(2, 4, 8)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    given = (source, target) if batch_first else (source.transpose(0, 1), target.transpose(0, 1))

    def run() -> Tensor:
        return model(*given, src_key_padding_mask=padding, memory_key_padding_mask=padding)

    with torch.no_grad():
        plain = run()
        outputs, records = watch(weights_of(model, nn.MultiheadAttention), run)
    assert outputs.equal(plain)
    found = [(record.name, record.inputs.shape[1]) for record in records]
    expected = []
    for layer in range(2):
        name = f"encoder.layers.{layer}.self_attn"
        expected += [(f"{name}.in_proj_weight", 6), (f"{name}.out_proj.weight", 6)]
    for layer in range(2):
        name = f"decoder.layers.{layer}.self_attn"
        expected += [(f"{name}.in_proj_weight", 4), (f"{name}.out_proj.weight", 4)]
        name = f"decoder.layers.{layer}.multihead_attn"
        expected += [(f"{name}.in_proj_weight", tokens) for tokens in (4, 6, 6)] + [(f"{name}.out_proj.weight", 4)]
    assert found == expected


def test_the_fast_path_is_not_taken_while_watching():
    layer = spread(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    x = torch.randn(2, 4, 8)
    assert torch.backends.mha.get_fastpath_enabled()
    _, records = watch(matrices_of(layer.self_attn), lambda: layer(x))
    assert [record.inputs.shape for record in records] == [(2, 4, 8)] * 2


def test_weights_that_are_computed_anew_are_not_offered():
    assert attention.matrices(nn.Linear(8, 8)) == []
    for owner, name in ((mha(), "in_proj_weight"), (mha(kdim=4), "k_proj_weight")):
        nn.utils.parametrizations.weight_norm(owner, name)
        assert attention.matrices(owner) == []
    module = mha()
    nn.utils.parametrizations.weight_norm(module.out_proj)
    assert attention.matrices(module) == []


def test_attention_that_peft_adapts_is_not_offered():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(mha()), LoraConfig(target_modules=["0"]))
    assert any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    assert not any(attention.matrices(module) for module in model.modules())


# Coming and going


def test_nothing_stays_after_an_error():
    module, x = mha(), torch.randn(5, 3, 8)
    calls = []

    def fail(seen: object) -> None:
        calls.append(seen)
        raise ValueError("not finite")

    with pytest.raises(ValueError, match="not finite"), watching(matrices_of(module), fail):
        module(x, x, x)
    assert len(calls) == 1
    module(x, x, x)
    assert len(calls) == 1
