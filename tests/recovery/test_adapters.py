from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from peft import PeftModelForSeq2SeqLM, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from sparsefit import PruningConfig, prune
from sparsefit.bare_model import canonical_name
from sparsefit.errors import ConfigError, MaskError
from sparsefit.recovery.adapters import AdapterSettings, attach_adapter, bind_masks

FORMS = ("lora", "masked_lora", "hira", "full")
IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))


def adapted(model):
    return {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}


def test_the_defaults_are_those_of_the_paper():
    assert AdapterSettings() == AdapterSettings("lora", 8, 16, 0.05, ("q_proj", "v_proj"), False, False)
    assert [form for form in FORMS if AdapterSettings(form).lossless] == ["masked_lora", "hira", "full"]


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
        ({"form": "dora"}, "unknown form of adapter 'dora'; the choices are lora, masked_lora, hira and full"),
        ({"form": "hira", "train_biases": True}, "HiRA trains no biases"),
        ({"r": 0}, "rank r of the adapters is 0"),
        ({"r": 2.5}, "rank r of the adapters is 2.5"),
        ({"alpha": 0}, "alpha of the adapters is 0"),
        ({"dropout": 1.0}, "dropout of the adapters is 1.0"),
        ({"dropout": -0.1}, "dropout of the adapters is -0.1"),
        ({"target_modules": []}, "no target_modules"),
        ({"target_modules": [""]}, "no target_modules"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdapterSettings(**settings)


def snapshot(model):
    return {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}


def assert_untouched(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name][0], value) and after[name][1] == flag for name, (value, flag) in before.items())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.norm(self.up(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def trained(model):
    """What requires a gradient, by canonical name, adapters as the layer that they are on."""
    return {
        canonical_name(re.sub(r"\.(lora|hira)_[AB].*|\.modules_to_save\.default", "", name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_norms_and_biases_train_on_request(tiny_model, form, norms, biases):
    if form == "hira" and biases:
        pytest.skip("refused")
    settings = AdapterSettings(form, target_modules="fc1", train_norms=norms, train_biases=biases)
    bare = tiny_model("opt")
    names = {name for name, _ in bare.named_parameters()}
    expected = {f"model.decoder.layers.{n}.fc1{'.weight' * (form == 'full')}" for n in range(3)}
    expected |= {name for name in names if "norm" in name} if norms else set()
    # The biases of norms are biases.
    expected |= {name for name in names if name.endswith(".bias")} if biases else set()
    model = attach_adapter(bare, settings)
    assert trained(model) == {name for name in expected}
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("form", FORMS)
def test_all_linear_layers_of_a_plain_module_but_its_head(form):
    model = attach_adapter(Net(), AdapterSettings(form, target_modules="all-linear"))
    layers = {"stem", *(f"blocks.{n}.{name}" for n in range(2) for name in ("up", "down"))}
    assert trained(model) == ({f"{name}.weight" for name in layers} if form == "full" else layers)
    assert model(torch.randn(4, 6)).shape == (4, 3)


@pytest.mark.parametrize("form", FORMS)
def test_all_linear_layers_of_an_image_classifier_but_its_head(form):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))
    names = trained(attach_adapter(model, AdapterSettings(form, target_modules="all-linear")))
    assert len(names) == 12
    assert not any("classifier" in name for name in names)


@pytest.mark.parametrize("form", FORMS)
def test_all_linear_layers_where_experts_are_stacked(tiny_model, form):
    """Adapters sit on the attention; full fine-tuning trains the experts, too."""
    model = attach_adapter(tiny_model("mixtral"), AdapterSettings(form, target_modules="all-linear"))
    names = trained(model)
    assert {name.split(".")[4] for name in names if "self_attn" in name} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    others = {name.split(".", 3)[3] for name in names if "self_attn" not in name}
    assert others == ({"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} if form == "full" else set())


def test_names_that_peft_takes_for_parts_of_stacked_experts(tiny_model):
    model = tiny_model("mixtral")
    model.gate_proj = nn.Linear(4, 4)
    before = snapshot(model)
    for form, dropout in (("masked_lora", 0.0), ("lora", 0.1)):
        settings = AdapterSettings(form, dropout=dropout, target_modules=("q_proj", "gate_proj"))
        with pytest.raises(ConfigError, match="'gate_proj' for a part of the stacked experts"):
            attach_adapter(model, settings)
        assert_untouched(model, before)


def test_an_encoder_and_a_decoder(tiny_model):
    model = attach_adapter(tiny_model("t5"), AdapterSettings("masked_lora", target_modules="all-linear"))
    assert isinstance(model, PeftModelForSeq2SeqLM)
    assert model(input_ids=IDS, labels=IDS).logits.shape == (2, 9, 61)


@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_attached_changes_nothing(form):
    model = llama()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="did you mean v_proj"):
        attach_adapter(model, AdapterSettings(form, target_modules=("q_proj", "v_porj"), train_norms=True))
    assert_untouched(model, before)

    model = attach_adapter(model, AdapterSettings())
    before = snapshot(model)
    with pytest.raises(ConfigError, match="PEFT-wrapped already"):
        attach_adapter(model, AdapterSettings(form))
    assert_untouched(model, before)


def test_a_norm_whose_name_peft_would_find_elsewhere():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Sequential(Block(), Block()))
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"would train 2\.1, too"):
        attach_adapter(model, AdapterSettings("masked_lora", target_modules="up", train_norms=True))
    assert_untouched(model, before)
    assert "1.weight" in trained(attach_adapter(model, AdapterSettings("full", target_modules="up", train_norms=True)))


# Files, and masks.

MODELS = {
    "llama": "all-linear",
    "gpt2": ("c_attn", "c_proj"),
    "opt": ("q_proj", "fc1"),
    "mixtral": "all-linear",
    "plain": ("up", "down"),
}


def disturb(model):
    """All that trains as it is after some training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "_A" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lora", "masked_lora", "hira"])
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_adapter_is_one_of_peft_and_loads_on_the_sparse_base(tiny_model, tmp_path, name, form):
    torch.manual_seed(0)
    base = Net() if name == "plain" else tiny_model(name)
    batch = torch.randn(5, 6) if name == "plain" else {"input_ids": IDS}
    masks = prune(base, [batch]).masks
    fresh = copy.deepcopy(base)
    settings = AdapterSettings(form, 4, target_modules=MODELS[name], train_norms=True, train_biases=form != "hira")
    model = attach_adapter(base, settings)
    bind_masks(model, masks)
    disturb(model).save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == form.upper()[-4:]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert trained(model) <= {canonical_name(re.sub(r"\.(lora|hira)_[AB].*", "", tensor)) for tensor in tensors}

    def answer(net):
        with torch.no_grad():
            out = net(batch) if name == "plain" else net(**batch).logits
        return out

    assert not torch.allclose(answer(model), answer(fresh), atol=1e-2)
    by_state, by_name = (attach_adapter(copy.deepcopy(fresh), settings).eval() for _ in range(2))
    unexpected = set_peft_model_state_dict(by_state, tensors).unexpected_keys
    assert all(key.endswith("modules_to_save.bias") for key in unexpected)  # PEFT writes the biases of norms twice
    by_name.load_adapter(str(tmp_path), "default")
    for again in (by_state, by_name):
        bind_masks(again, masks)
        assert torch.equal(answer(again), answer(model))


def test_masks_are_bound_by_name_and_lifted(tiny_model):
    model = disturb(attach_adapter(tiny_model("llama"), AdapterSettings("masked_lora", dropout=0.0)))
    masks = prune(model, [{"input_ids": IDS}], PruningConfig(exclude=("v_proj",))).masks
    layers = model.base_model.model.model.layers[0].self_attn
    plain = model(input_ids=IDS).logits
    bind_masks(nn.ModuleDict({"inner": model}), masks.renamed(lambda name: f"inner.{name}"))
    assert layers.q_proj.mask_bits is not None
    assert layers.v_proj.mask_bits is None  # it is dense
    assert not any("mask" in name for name in model.state_dict())
    assert not torch.allclose(model(input_ids=IDS).logits, plain, atol=1e-3)
    bind_masks(model, None)
    assert torch.equal(model(input_ids=IDS).logits, plain)
    bind_masks(tiny_model("llama"), masks)  # nothing to do


def test_masks_of_another_shape_are_refused(tiny_model):
    model = attach_adapter(tiny_model("llama"), AdapterSettings("masked_lora"))
    other = prune(tiny_model("llama", num_attention_heads=2), [{"input_ids": IDS}]).masks
    with pytest.raises(MaskError, match=r"does not fit an adapter .* belongs to another model"):
        bind_masks(model, other)
