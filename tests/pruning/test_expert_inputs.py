from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from moe import FAMILIES, SIZES
from recorded_inputs import spread, watch, weights_of
from torch import Tensor, nn

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
    model = nn.TransformerEncoderLayer(8, 2, 16)
    model.config = SimpleNamespace(_experts_implementation="grouped_mm")
    model.linear1.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    with eager_experts(model):
        assert implementations(model) == ["grouped_mm"]
        assert {name: m.training for name, m in model.named_modules()} == modes
    assert implementations(model) == ["grouped_mm"]
    assert {name: m.training for name, m in model.named_modules()} == modes
