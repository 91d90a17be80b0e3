from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sparsefit.errors import ConfigError
from sparsefit.recovery.adapters import AdapterSettings, attach_adapter


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))


def adapted(model):
    return {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}


def test_the_defaults_are_those_of_the_paper():
    assert AdapterSettings() == AdapterSettings("lora", 8, 16, 0.05, ("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("q_proj", "v_proj"), {"q_proj", "v_proj"}),
        (["down_proj"], {"down_proj"}),
        ("o_proj", {"o_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_adapters_sit_where_they_are_wanted_and_train_alone(targets, names):
    model = attach_adapter(llama(), AdapterSettings(r=3, alpha=6, target_modules=targets))
    assert {path.rpartition(".")[2] for path in adapted(model)} == names
    assert len(adapted(model)) == 2 * len(names)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    assert all(p.shape[0] == 3 for name, p in model.named_parameters() if "lora_A" in name)


def test_fresh_adapters_change_nothing_and_count_with_alpha_over_r():
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = llama()(input_ids=ids).logits
        model = attach_adapter(llama(), AdapterSettings(r=4, alpha=8)).eval()
        assert torch.equal(model(input_ids=ids).logits, expected)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        x = torch.randn(2, 16)
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 8 / 4
        torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ delta.T)


def test_the_transposed_matrices_of_gpt2():
    model = attach_adapter(
        GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_head=2, n_layer=1)),
        AdapterSettings(target_modules="c_attn"),
    )
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert layer.fan_in_fan_out
    assert model(input_ids=torch.arange(5)[None]).logits.shape == (1, 5, 50)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_porj", r"'q_porj' is no linear layer of the model: did you mean q_proj"),
        ("xyz", r"its linear layers are down_proj, gate_proj, k_proj, lm_head, o_proj"),
        ("embed_tokens", "'embed_tokens' is no linear layer"),
    ],
)
def test_an_unknown_target_names_the_nearest(target, message):
    with pytest.raises(ConfigError, match=message):
        attach_adapter(llama(), AdapterSettings(target_modules=("v_proj", target)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "rank r of LoRA is 0"),
        ({"r": 2.5}, "rank r of LoRA is 2.5"),
        ({"alpha": 0}, "alpha of LoRA is 0"),
        ({"dropout": 1.0}, "dropout of LoRA is 1.0"),
        ({"dropout": -0.1}, "dropout of LoRA is -0.1"),
        ({"target_modules": []}, "no target_modules"),
        ({"target_modules": [""]}, "no target_modules"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdapterSettings(**settings)


def test_a_wrapped_model_is_not_wrapped_again():
    with pytest.raises(ConfigError, match="PEFT-wrapped already"):
        attach_adapter(attach_adapter(llama(), AdapterSettings()), AdapterSettings())
