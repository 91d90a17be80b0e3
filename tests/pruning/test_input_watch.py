from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from moe import FAMILIES, SIZES
from torch import Tensor, nn
from watched import spread, watch, weights_of

from sparsefit.pruning.input_watch import watching
from sparsefit.pruning.layers import matrices_of
from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.pruning.layers.experts import eager_experts, find_stacks


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def make_moe(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family]))
    return spread(getattr(transformers, f"{family}ForCausalLM")(config)).to(dtype)


def stacks_of(model: nn.Module) -> list[tuple[str, nn.Parameter, bool]]:
    return [stack for module in model.modules() for stack in find_stacks(module)]


def experts_of(model: nn.Module) -> list[PrunableWeight]:
    """Each matrix of each stack."""
    return [weight for weight in weights_of(model) if weight.index is not None]


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
    weights = experts_of(model)
    assert len({weight.name for weight in weights}) == len(weights) == sum(len(p) for _, p, _ in stacks)
    for name, stack in model.named_parameters():
        own = [weight for weight in weights if weight.parameter is stack]
        assert [weight.name for weight in own] == ([f"{name}[{i}]" for i in range(len(own))] if own else [])
        for index, weight in enumerate(own):
            assert weight.matrix().equal(stack[index].t() if family == "GptOss" else stack[index])


def routed(model: nn.Module, ids: Tensor) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """Each module of experts with its (tokens, in) inputs and the (tokens, choices) experts they go to."""
    seen = []
    for module in [module for module in model.modules() if find_stacks(module)]:
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
        watched, records = watch(experts_of(model), lambda: model(ids).logits)
        assert watched.equal(plain)
        seen = {record.name: record.tokens for record in records}
        assert len(seen) == len(records)
        assert all(record.rows is None for record in records)
        names = {id(parameter): name for name, parameter in model.named_parameters()}

        expected = {}
        for module, hidden, indices in routed(model, ids):
            for expert in indices.unique().tolist():
                tokens = [hidden[i] for i in range(len(hidden)) if expert in indices[i].tolist()]
                up, down = (names[id(stack)] for stack in (module.gate_up_proj, module.down_proj))
                expected[f"{up}[{expert}]"] = torch.stack(tokens)
                expected[f"{down}[{expert}]"] = torch.stack([down_input(module, expert, t) for t in tokens])
    assert seen.keys() == expected.keys()  # experts without tokens are not among them
    assert len(expected) < sum(len(p) for _, p, _ in stacks_of(model))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    for name, inputs in expected.items():
        torch.testing.assert_close(in_order(seen[name]), in_order(inputs), **tolerance)


def test_llama4_experts_see_the_tokens_routed_to_them():
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    moe = spread(Llama4TextMoe(Llama4TextConfig(**(SIZES | {"num_local_experts": 4, "num_experts_per_tok": 1}))))
    assert [transposed for *_, transposed in find_stacks(moe.experts)] == [True, True]
    hidden = torch.randn(1, 9, 16)
    with torch.no_grad():
        (plain, logits), (watched, records) = moe(hidden), watch(experts_of(moe), lambda: moe(hidden)[0])
    assert watched.equal(plain)
    seen = {record.name: record.tokens for record in records if len(record.tokens)}
    for expert in range(4):
        tokens = [hidden[0, i] * logits[i, expert].sigmoid() for i in range(9) if int(logits[i].argmax()) == expert]
        if not tokens:
            assert f"experts.gate_up_proj[{expert}]" not in seen
            continue
        torch.testing.assert_close(seen[f"experts.gate_up_proj[{expert}]"], torch.stack(tokens))
        assert len(seen[f"experts.down_proj[{expert}]"]) == len(tokens)


def test_stacks_by_themselves_are_found():
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

    module = spread(JetMoeParallelExperts(3, 6, 4))
    ((name, _, transposed),) = find_stacks(module)
    assert (name, transposed) == ("weight", False)
    inputs = torch.randn(5, 6)
    _, records = watch(experts_of(module), lambda: module(inputs, [2, 0, 3]))
    assert [(record.name, len(record.tokens)) for record in records] == [("weight[0]", 2), ("weight[2]", 3)]
    assert torch.cat([record.tokens for record in records]).equal(inputs)


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
    "matmul by name": lambda x, w: torch.matmul(input=x, other=w.mT),
    "method matmul": lambda x, w: x.matmul(w.t()),
    "mm": lambda x, w: x.mm(w.T),
    "addmm": lambda x, w: torch.addmm(torch.zeros(len(w)), x, w.t()),
    "the other way round": lambda x, w: (w @ x.t()).t(),
}


def stack_weights(stack: nn.Parameter, name: str, transposed: bool = False) -> list[PrunableWeight]:
    return [PrunableWeight(f"{name}[{i}]", stack, (), transposed, i) for i in range(len(stack))]


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
        matrices = [stack.mT[2] if transposed else stack[2] for stack in (first, second)]
        return [PRODUCTS[product](x, part) for w in matrices for part in (w, w[1:3], w[4:], w.clone())]

    plain = run()
    weights = stack_weights(first, "first", transposed) + stack_weights(second, "second", transposed)
    outputs, records = watch(weights, run)
    assert [(record.name, record.rows) for record in records] == [
        (f"{name}[2]", rows) for name in ("first", "second") for rows in (None, (1, 3), (4, 5))
    ]
    assert all(record.tokens.equal(x) for record in records)
    assert all(a.equal(b) for a, b in zip(plain, outputs, strict=True))


@pytest.mark.parametrize(
    "product",
    [
        torch.bmm,
        torch.matmul,
        lambda x, w: torch.baddbmm(torch.zeros(4, 2, 5), x, w),
        lambda x, w: torch.bmm(input=x, mat2=w),
    ],
    ids=["bmm", "matmul", "baddbmm", "bmm by name"],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_with_a_whole_stack_is_seen_expert_by_expert(product: Callable, transposed: bool):
    stack, x = nn.Parameter(torch.randn(4, *((3, 5) if transposed else (5, 3)))), torch.randn(4, 2, 3)
    x[1] = 0  # its tokens are routed elsewhere
    x[2, 1] = 0
    weights = stack_weights(stack, "stack", transposed)
    _, records = watch(weights, lambda: product(x, stack if transposed else stack.mT))
    seen = {record.name: record.tokens for record in records if len(record.tokens)}
    assert list(seen) == ["stack[0]", "stack[2]", "stack[3]"]
    for name, tokens in zip(seen, (x[0], x[2, :1], x[3]), strict=True):
        assert seen[name].equal(tokens)


def test_products_with_other_tensors_are_not_seen():
    stack, other = nn.Parameter(torch.randn(4, 5, 3)), nn.Parameter(torch.randn(4, 5, 3))
    x = torch.randn(2, 3)

    def run() -> None:
        F.linear(x, other[1])
        F.linear(x, nn.Parameter(torch.randn(5, 3)))
        F.linear(x, stack[1, 0])
        F.linear(torch.randn(2, 2), stack[1, :, :2])
        F.linear(torch.randn(0, 3), stack[1])
        torch.bmm(torch.randn(4, 2, 3), other.mT)
        torch.bmm(torch.randn(0, 2, 3), torch.randn(0, 3, 5))
        torch.randn(3, 4).to_sparse() @ torch.randn(4, 3)
        torch.randn(3, 4) @ torch.randn(4, 3).to_sparse()
        torch.randn(3) @ torch.randn(3)
        torch.randn(2, 2, 3, 3) @ torch.randn(2, 2, 3, 3)

    assert watch(stack_weights(stack, "stack"), run)[1] == []


# Layers


class Packed(torch.autograd.Function):
    """A product by a kernel of one's own."""

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten.mm.default(x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])


class OwnKernel(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Packed.apply(x, self.weight)


class OwnProduct(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btf,of->bto", 2 * x, self.weight) + F.linear(2 * x, self.weight)


class Lent(nn.Module):
    """A layer that is never called: its weight is lent to a product elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(3 * x, self.layer.weight)


@pytest.mark.parametrize(
    ("layer", "factor"),
    [
        (lambda: nn.Linear(6, 4), 1),
        (lambda: nn.Linear(6, 4, bias=False), 1),
        (lambda: OwnKernel(6, 4), 1),
        (lambda: OwnProduct(6, 4), 2),
        (lambda: Lent(), 3),
    ],
    ids=["linear", "no bias", "own kernel", "own product", "lent"],
)
def test_what_a_layer_multiplies_is_seen_once_whoever_computes_it(layer: Callable[[], nn.Module], factor: int):
    module, x = spread(layer()), torch.randn(2, 5, 6)
    with torch.no_grad():
        plain = module(x)
    outputs, records = watch(weights_of(module), lambda: module(x))
    assert outputs.equal(plain)
    assert [record.rows for record in records] == [None]
    assert records[0].inputs.equal(factor * x)
    assert records[0].tokens.equal(factor * x.flatten(0, 1))


@pytest.mark.parametrize("call", [lambda layer, x: layer(x), lambda layer, x: layer(x=x)], ids=["position", "name"])
def test_each_call_of_a_layer_with_a_kernel_of_its_own_counts(call: Callable):
    first, second = spread(OwnKernel(6, 4)), spread(OwnKernel(6, 4))
    second.weight = first.weight
    weight = PrunableWeight("shared", first.weight, (first, second), called=True)
    inputs = [torch.randn(2, 5, 6) for _ in range(3)]
    calls = list(zip((first, second, first, first), [*inputs, torch.randn(0, 5, 6)], strict=True))
    _, records = watch([weight], lambda: [call(layer, x) for layer, x in calls])
    assert [record.name for record in records] == ["shared"] * 3
    assert all(record.inputs.equal(x) for record, x in zip(records, inputs, strict=True))


def test_conv1d_of_gpt2_is_seen():
    from transformers.pytorch_utils import Conv1D

    layer, x = spread(Conv1D(4, 6)), torch.randn(2, 5, 6)
    ((name, rows, _, tokens),) = watch(matrices_of(layer, "fc"), lambda: layer(x))[1]
    assert (name, rows) == ("fc.weight", None)
    assert tokens.equal(x.flatten(0, 1))


def test_layers_of_bitsandbytes_are_seen_by_their_call():
    quantized_layers = pytest.importorskip("quantized_layers")
    for kind in quantized_layers.KINDS:
        layer, x = quantized_layers.make_layer(kind), torch.randn(2, 5, 128)
        with torch.no_grad():
            plain = layer(x)
        outputs, records = watch(matrices_of(layer, "fc"), lambda layer=layer, x=x: layer(x))
        assert outputs.equal(plain)
        assert [(record.name, record.rows) for record in records] == [("fc.weight", None)]
        assert records[0].tokens.equal(x.flatten(0, 1))


def test_no_hook_stays_whatever_happens():
    model, x = spread(nn.Sequential(nn.Linear(6, 6), OwnKernel(6, 6))), torch.randn(2, 3, 6)
    calls = []

    def fail(seen: object) -> None:
        calls.append(seen)
        raise ValueError("not finite")

    for layer in model:
        calls.clear()
        with pytest.raises(ValueError, match="not finite"), watching(weights_of(layer), fail):
            model(x)
        assert len(calls) == 1
        model(x)
        assert len(calls) == 1
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Experts, one after the other


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
