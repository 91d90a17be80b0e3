from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moe import FAMILIES, SIZES
from torch import Tensor, nn

from sparsefit.pruning.fused import FusedInputs, eager_experts, find_attention_weights, find_stacks


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


def make_moe(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family]))
    return spread(getattr(transformers, f"{family}ForCausalLM")(config)).to(dtype)


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and biases that all matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def watch(parameters: list[nn.Parameter], run: Callable[[], Any]) -> tuple[Any, list[tuple[Any, ...]]]:
    """What a run gives while the parameters are watched, and copies of what was recorded."""
    records = []
    with torch.no_grad(), FusedInputs(parameters, lambda p, i, rows, x: records.append((p, i, rows, x.clone()))):
        return run(), records


def stacks_of(model: nn.Module) -> list[tuple[str, nn.Parameter, bool]]:
    return [stack for module in model.modules() for stack in find_stacks(module)]


def in_order(rows: list[Tensor] | Tensor) -> Tensor:
    rows = torch.stack(list(rows))
    return rows[rows[:, 0].argsort()]


# Experts of transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_the_stacks_of_a_model(family: str):
    model = make_moe(family)
    expected = {id(p) for p in model.parameters() if p.ndim == 3}
    stacks = stacks_of(model)
    assert {id(p) for _, p, _ in stacks} == expected
    assert expected
    assert {name for name, _, _ in stacks} == {"gate_up_proj", "down_proj"}
    assert {transposed for _, _, transposed in stacks} == {family == "GptOss"}


def routed(model: nn.Module, ids: Tensor) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """Each module of experts with its (tokens, in) inputs and the (tokens, choices) experts they go to."""
    seen = []
    experts = [module for module in model.modules() if find_stacks(module)]
    for module in experts:
        module.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append((m, *args, *kwargs.values())), with_kwargs=True
        )
    with torch.no_grad():
        model(ids)
    return ((module, hidden, indices) for module, hidden, indices, *_ in seen)


def down_input(experts: nn.Module, index: int, token: Tensor) -> Tensor:
    """What a slow reading of the papers gives for the input of one expert's second matrix, for one token."""
    if hasattr(experts, "gate_up_proj_bias"):
        both = experts.gate_up_proj[index].t() @ token + experts.gate_up_proj_bias[index]
        gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = (half @ token for half in experts.gate_up_proj[index].split(len(experts.gate_up_proj[index]) // 2))
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_sees_the_tokens_routed_to_it(family: str, dtype: torch.dtype):
    model = make_moe(family, dtype)
    ids = torch.randint(1, 61, (1, 3), generator=torch.Generator().manual_seed(1))
    with eager_experts(model), torch.no_grad():
        plain = model(ids).logits
        watched, records = watch([p for _, p, _ in stacks_of(model)], lambda: model(ids).logits)
        assert watched.equal(plain)
        seen = {(id(parameter), index): inputs for parameter, index, _, inputs in records}
        assert len(seen) == len(records)
        assert all(rows is None for _, _, rows, _ in records)

        expected = {}
        for experts, hidden, indices in routed(model, ids):
            for expert in indices.unique().tolist():
                tokens = [hidden[i] for i in range(len(hidden)) if expert in indices[i].tolist()]
                expected[id(experts.gate_up_proj), expert] = torch.stack(tokens)
                expected[id(experts.down_proj), expert] = torch.stack([down_input(experts, expert, t) for t in tokens])
    assert seen.keys() == expected.keys()  # experts without tokens are not among them
    assert len(expected) < sum(len(p) for _, p, _ in stacks_of(model))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    for key, inputs in expected.items():
        torch.testing.assert_close(in_order(seen[key]), in_order(inputs), **tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_recorded_before_they_are_used(family: str):
    model = make_moe(family)
    zeroed = copy.deepcopy(model)
    ids = torch.arange(1, 33).reshape(2, 16)

    def prune(parameter: nn.Parameter, index: int, rows: slice | None, inputs: Tensor) -> None:
        parameter.data[index, ::2] = 0

    with eager_experts(model), eager_experts(zeroed), torch.no_grad():
        with FusedInputs([p for _, p, _ in stacks_of(model)], prune):
            outputs = model(ids).logits
        for _, parameter, _ in stacks_of(zeroed):
            parameter[:, ::2] = 0
        assert outputs.equal(zeroed(ids).logits)


def test_llama4_experts_see_the_tokens_routed_to_them():
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    moe = spread(Llama4TextMoe(Llama4TextConfig(**(SIZES | {"num_local_experts": 4, "num_experts_per_tok": 1}))))
    ((_, up, transposed), (_, down, _)) = find_stacks(moe.experts)
    assert transposed
    hidden = torch.randn(1, 9, 16)
    with torch.no_grad():
        (plain, logits), (watched, records) = moe(hidden), watch([up, down], lambda: moe(hidden)[0])
    assert watched.equal(plain)
    seen = {(id(parameter), index): inputs for parameter, index, _, inputs in records}
    for expert in range(4):
        tokens = [hidden[0, i] * logits[i, expert].sigmoid() for i in range(9) if int(logits[i].argmax()) == expert]
        if not tokens:
            assert (id(up), expert) not in seen
            continue
        torch.testing.assert_close(seen[id(up), expert], torch.stack(tokens))
        assert len(seen[id(down), expert]) == len(tokens)


def test_stacks_by_themselves_are_found():
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

    experts = spread(JetMoeParallelExperts(3, 6, 4))
    ((name, stack, transposed),) = find_stacks(experts)
    assert (name, transposed) == ("weight", False)
    inputs = torch.randn(5, 6)
    _, records = watch([stack], lambda: experts(inputs, [2, 0, 3]))
    assert [(index, len(x)) for _, index, _, x in records] == [(0, 2), (2, 3)]
    assert torch.cat([x for *_, x in records]).equal(inputs)


def test_other_modules_have_no_stacks():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, 4, 4))

    assert find_stacks(Positions()) == []
    assert find_stacks(nn.Conv1d(4, 4, 1)) == []
    assert find_stacks(nn.Linear(4, 4)) == []


# Products


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "linear by name": lambda x, w: F.linear(weight=w, input=x),
    "@": lambda x, w: x @ w.t(),
    "torch.matmul": lambda x, w: torch.matmul(x, w.mT),
    "mm": lambda x, w: x.mm(w.T),
    "addmm": lambda x, w: torch.addmm(torch.zeros(len(w)), x, w.t()),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_with_a_view_of_a_stack_are_seen(product: str, transposed: bool):
    # Two stacks in one storage, neither at its start.
    storage = torch.randn(7 + 2 * 4 * 5 * 3)
    first, second = (
        nn.Parameter(storage[start : start + 60].view(4, *((3, 5) if transposed else (5, 3)))) for start in (7, 67)
    )
    x = torch.randn(2, 3)

    def run() -> list[Tensor]:
        experts = [stack.mT[2] if transposed else stack[2] for stack in (first, second)]
        return [PRODUCTS[product](x, part) for w in experts for part in (w, w[1:3], w[4:], w.clone())]

    plain = run()
    outputs, records = watch([first, second], run)
    assert [(p is first, index, rows) for p, index, rows, _ in records] == [
        (is_first, 2, rows) for is_first in (True, False) for rows in (None, slice(1, 3), slice(4, 5))
    ]
    assert all(inputs.equal(x) for *_, inputs in records)
    assert all(a.equal(b) for a, b in zip(plain, outputs, strict=True))


def test_products_with_other_tensors_are_not_recorded():
    stack, other = nn.Parameter(torch.randn(4, 5, 3)), nn.Parameter(torch.randn(4, 5, 3))
    x = torch.randn(2, 3)

    def run() -> None:
        F.linear(x, other[1])
        F.linear(x, nn.Parameter(torch.randn(5, 3)))
        F.linear(x, stack[1, 0])
        F.linear(torch.randn(2, 2), stack[1, :, :2])
        torch.bmm(torch.randn(4, 2, 3), other.mT)
        torch.bmm(torch.randn(0, 2, 3), torch.randn(0, 3, 5))
        torch.randn(3, 4).to_sparse() @ torch.randn(4, 3)
        torch.randn(3, 4) @ torch.randn(4, 3).to_sparse()
        torch.randn(3) @ torch.randn(3)
        torch.randn(2, 2, 3, 3) @ torch.randn(2, 2, 3, 3)

    assert watch([stack], run)[1] == []


# nn.MultiheadAttention


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

    names = find_attention_weights(module)
    with torch.no_grad():
        plain = run()
        (outputs, weights), records = watch([p for _, p in names], run)
        reference = attended(module, query, key, value, padding if padded else None)
    assert outputs.equal(plain[0])
    assert weights.equal(plain[1])
    ids = {id(p): name for name, p in names}
    found = [(ids[id(p)], index, rows) for p, index, rows, _ in records]
    inputs = [query] if kind == "self" else [query, key, value]
    if kind == "self":
        expected = [("in_proj_weight", None, None)]
    elif kind == "kdim and vdim":
        expected = [(f"{x}_proj_weight", None, None) for x in "qkv"]
    else:
        expected = [("in_proj_weight", None, slice(8 * i, 8 * i + 8)) for i in range(3)]
    assert found == [*expected, ("out_proj.weight", None, None)]
    for (*_, seen), tensor in zip(records[:-1], inputs, strict=True):
        assert seen.equal(tensor)
    torch.testing.assert_close(records[-1][3], reference)


def test_one_tensor_of_the_model_is_recorded_as_one():
    module, query, key = mha(), torch.randn(5, 3, 8), torch.randn(7, 3, 8)
    seen = []
    with torch.no_grad(), FusedInputs([module.in_proj_weight], lambda p, i, rows, x: seen.append(x)):
        module(query, key, key)
    assert seen[1] is seen[2]
    assert seen[0] is not seen[1]


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
        watched, records = watch([p for _, p in find_attention_weights(module)], lambda: module(x, x, x, **call))
    assert watched[0].equal(plain[0])
    assert watched[1] is plain[1] is None or watched[1].equal(plain[1])
    assert [inputs.shape for *_, inputs in records] == [(3, 5, 8) if batched else (5, 8)] * 2
    assert watch([module.out_proj.weight], lambda: module(x, x, x))[1][0][3].dtype == dtype


@pytest.mark.usefixtures("slow_attention")
def test_attention_is_recorded_before_it_is_used():
    module = mha()
    zeroed = copy.deepcopy(module)
    x = torch.randn(5, 3, 8)

    def prune(parameter: nn.Parameter, index: None, rows: None, inputs: Tensor) -> None:
        parameter.data[::2] = 0

    with torch.no_grad():
        with FusedInputs([p for _, p in find_attention_weights(module)], prune):
            outputs = module(x, x, x)[0]
        for _, parameter in find_attention_weights(zeroed):
            parameter[::2] = 0
        assert outputs.equal(zeroed(x, x, x)[0])


@pytest.mark.usefixtures("slow_attention")
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_of_torch(batch_first: bool):
    model = spread(nn.Transformer(8, 2, 2, 2, 16, batch_first=batch_first)).eval()
    source, target = torch.randn(2, 6, 8), torch.randn(2, 4, 8)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    given = (source, target) if batch_first else (source.transpose(0, 1), target.transpose(0, 1))

    def run() -> Tensor:
        return model(*given, src_key_padding_mask=padding, memory_key_padding_mask=padding)

    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    names = {id(p): f"{name}.{own}" for name, m in modules.items() for own, p in find_attention_weights(m)}
    with torch.no_grad():
        plain = run()
        outputs, records = watch([p for m in modules.values() for _, p in find_attention_weights(m)], run)
    assert outputs.equal(plain)
    found = [(names[id(p)], x.shape[1]) for p, _, _, x in records]
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
    _, records = watch([p for _, p in find_attention_weights(layer.self_attn)], lambda: layer(x))
    assert [inputs.shape for *_, inputs in records] == [(2, 4, 8)] * 2


def test_weights_that_are_computed_anew_are_not_offered():
    assert find_attention_weights(nn.Linear(8, 8)) == []
    for owner, name in ((mha(), "in_proj_weight"), (mha(kdim=4), "k_proj_weight")):
        nn.utils.parametrizations.weight_norm(owner, name)
        assert find_attention_weights(owner) == []
    module = mha()
    nn.utils.parametrizations.weight_norm(module.out_proj)
    assert find_attention_weights(module) == []


def test_attention_that_peft_adapts_is_not_offered():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(mha()), LoraConfig(target_modules=["0"]))
    assert any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    assert not any(find_attention_weights(module) for module in model.modules())


# Coming and going


def test_nothing_stays_after_an_error():
    module, x = mha(), torch.randn(5, 3, 8)
    stack = nn.Parameter(torch.randn(2, 4, 8))
    calls = []

    def fail(*seen: Any) -> None:
        calls.append(seen)
        raise ValueError("not finite")

    watching = FusedInputs([stack, *(p for _, p in find_attention_weights(module))], fail)
    for run in (lambda: module(x, x, x), lambda: F.linear(x, stack[1])):
        calls.clear()
        with pytest.raises(ValueError, match="not finite"), watching:
            run()
        assert len(calls) == 1
        run()
        assert len(calls) == 1


def implementations(model: nn.Module) -> list[str | None]:
    """What each module of experts and each model in a module will use."""
    return [m.config._experts_implementation for m in model.modules() if hasattr(m, "config")]


@pytest.mark.parametrize("before", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential, lambda m: m.model], ids=["bare", "wrapped", "inner"])
def test_experts_are_eager_for_a_while(before: str, wrap: Callable[[nn.Module], nn.Module]):
    model = make_moe("Mixtral")
    model.set_experts_implementation(before)
    with eager_experts(wrap(model)):
        assert set(implementations(model)) == {"eager"}
    assert set(implementations(model)) == {before}
    with pytest.raises(KeyError), eager_experts(wrap(model)):
        raise KeyError
    assert set(implementations(model)) == {before}


def test_experts_of_an_adapted_model_are_eager_for_a_while():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_moe("Mixtral"), LoraConfig(target_modules=["q_proj"]))
    with eager_experts(model):
        assert set(implementations(model.base_model.model)) == {"eager"}
    assert set(implementations(model.base_model.model)) == {"grouped_mm"}


def test_each_model_in_a_model_gets_its_own_implementation_back():
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = SIZES | FAMILIES["Qwen3Moe"] | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 8, "out_hidden_size": 16}
    vision |= {"num_position_embeddings": 4, "deepstack_visual_indexes": [0]}
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    model.set_experts_implementation({"": "grouped_mm", "text_config": "batched_mm"})
    pair = nn.ModuleList([model, make_moe("Olmoe")])
    before = implementations(pair)
    assert {"grouped_mm", "batched_mm"} <= set(before)
    with eager_experts(pair):
        assert {m.config._experts_implementation for m in pair.modules() if find_stacks(m)} == {"eager"}
    assert implementations(pair) == before


def test_models_without_a_switch_are_left_alone():
    with eager_experts(nn.TransformerEncoderLayer(8, 2, 16)):
        pass
