"""PEFT's tuners under pruning: what comes back from the files is the model in memory, or nothing has changed."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from trained_models import IDS, assert_untouched, snapshot

from sparsefit import PruningConfig, collect_statistics, prune
from sparsefit.errors import ConfigError, MergeError
from sparsefit.recovery.adapter_files import export_adapter
from sparsefit.recovery.adapters import AdapterSettings, attach_adapter
from sparsefit.recovery.base_deduplication import compare
from sparsefit.recovery.dora_magnitudes import magnitudes_follow
from sparsefit.recovery.export import export_base
from sparsefit.recovery.merge import lossy_layers, merge, merged_in_place
from sparsefit.recovery.tuners import check_tuners

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from peft_cases import cases, dense_model
from peft_tuners import Findings, by_the_rules, difference, pruned, read, train

CASES = {case.name: case for case in cases() if case.name != "LoRA loftq"}  # which needs a GPU
REFUSED = {
    "LoRA KaSA": "changes the weights under it",
    "X-LoRA": "other names",
    "PSOFT": "not in its files",
    "OSF": "not in its files",
    "FRoD": "not in its files",
    "AdaMSS": "not in its files",
    "Supertuning indices not saved": "not in its files",
    "Adaption prompt": "other names",
}
MERGES = {"IA3", "IA3 (bert)", "IA3 (conv)", "HiRA", "HiRA (conv)", "BEFT (bert)", "LN tuning", "Trainable tokens"}
MERGES |= {"LoRA mha (mha)", "Supertuning"}  # weights that are not pruned; the largest weights, which are kept

DISTINCT = {"LoRA", "LoRA DoRA", "LoRA aLoRA", "LoRA (conv)", "LoRA DoRA (conv)", "LoRA mha (mha)"}
VARIANTS = {name: case for name, case in CASES.items() if case.tuner == "LoRA" and name not in DISTINCT}


def made(name):
    warnings.simplefilter("ignore")
    return CASES[name].make(dense_model(CASES[name].model)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_tuner_comes_back_from_its_files_or_is_refused_with_nothing_changed(name):
    found = Findings()
    by_the_rules(CASES[name], made(name), found)
    if name in REFUSED:
        assert REFUSED[name] in found.error
        assert "pruned model" in found.error or "init_lora_weights=True" in found.error  # the way out
        assert found.unchanged
    else:
        assert found.reload == 0.0
        assert found.fits


def test_the_cases_are_all_tuners_of_the_installed_peft():
    names = [name for name in CASES if name not in VARIANTS]
    tried = {config.peft_type for name in names for config in made(name).peft_config.values()}
    assert tried == set(peft.PeftType)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"LoRA KaSA", "X-LoRA"}))  # PEFT reads no router of X-LoRA
def test_the_way_out_leads_out(name, tmp_path):
    case = CASES[name]
    model = dense_model(case.model)
    masks = pruned(model, case)
    adapted = case.make(model).eval()
    train(adapted)
    bare = dense_model(case.model)
    assert pruned(bare, case).digest() == masks.digest()
    export_base(bare, masks, tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    again = read(case, tmp_path / "base", tmp_path / "adapter")
    masks.verify(bare)
    assert difference(adapted, again, case) == 0.0


def test_other_entrances_refuse_too():
    model = made("OSF")
    before = snapshot(model)
    for enter in (prune, lambda *args: collect_statistics(*args[:2], [args[2]])):
        with pytest.raises(ConfigError, match="OSF"):
            enter(model, [{"input_ids": IDS}], PruningConfig(update="none"))
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["Prefix tuning", "Cartridge", "Poly", "LoRA aLoRA"])
def test_adapters_with_arguments_at_each_call_are_pruned_in_one_pass(name):
    model = made(name)
    before = snapshot(model)
    with pytest.raises(ConfigError, match="update='none'"):
        prune(model, [{"input_ids": IDS}])
    assert_untouched(model, before)
    check_tuners(model, PruningConfig(update="none"))
    check_tuners(model, PruningConfig(score="magnitude"))


def mixed(model):
    model = peft.PeftMixedModel(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["v_proj"]))
    return model


def added(model):
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    return model


@pytest.mark.parametrize("wrap", [mixed, added])
def test_adapters_that_peft_does_not_write_are_refused(wrap):
    model = wrap(dense_model("llama"))
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"cannot be written apart.*get_peft_model"):
        prune(model, [{"input_ids": IDS}])
    assert_untouched(model, before)


def test_trials_leave_the_random_state():
    model = made("LoRA DoRA")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check_tuners(model, PruningConfig())
    assert torch.equal(torch.rand(4), expected)


def test_a_tuner_that_cannot_be_tried_is_reported(monkeypatch):
    model = made("LoRA")

    def broken(*args, **kwargs):
        raise ValueError("no such luck")

    monkeypatch.setattr(peft, "get_peft_model", broken)
    with pytest.warns(UserWarning, match="could not be tried out.*no such luck"):
        check_tuners(model, PruningConfig())


# Masks and names.


def test_the_configuration_in_memory_stays_as_it_was(tmp_path):
    model = made("LoRA pissa")
    masks = pruned(model, CASES["LoRA pissa"])
    export_adapter(model, masks, tmp_path / "base", tmp_path / "adapter")
    assert model.peft_config["default"].init_lora_weights == "pissa"
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").init_lora_weights is True


def test_a_checkpoint_under_a_prompt_is_whole(tmp_path):
    model = made("Prompt tuning")
    masks = pruned(model, CASES["Prompt tuning"])
    export_base(model, masks, tmp_path / "base").save(tmp_path / "masks.safetensors")
    assert compare(tmp_path, model, masks, model.state_dict()) is None


# DoRA.


def test_dora_is_pruned_as_if_it_were_made_on_the_pruned_base():
    case = CASES["LoRA DoRA"]
    bare = dense_model("llama")
    masks = pruned(bare, case)
    adapted = made("LoRA DoRA")
    assert pruned(adapted, case).digest() == masks.digest()
    later = case.make(bare)  # B is zero, so A does not matter
    expected = {name: p for name, p in later.named_parameters() if "magnitude" in name}
    found = {name: p for name, p in adapted.named_parameters() if "magnitude" in name}
    assert len(expected) == 6
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert difference(adapted, bare, case) < 1e-6


def test_what_dora_has_learned_stays():
    adapted = made("LoRA DoRA")
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(1.5)
    pruned(adapted, CASES["LoRA DoRA"])
    expected = 1.5 * layer.base_layer.weight.norm(dim=1)
    assert torch.allclose(layer.lora_magnitude_vector["default"].weight, expected)


class Late:
    """Calls a function once the first block has been pruned."""

    def __init__(self, function):
        self.function = function

    def __call__(self, done, total):
        if done > 2:
            self.function(done, total)


def test_an_error_leaves_the_magnitudes_as_they_were():
    adapted = made("LoRA DoRA")
    train(adapted)
    before = snapshot(adapted)

    def stop(done, total):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), magnitudes_follow(adapted):
        prune(adapted, [{"input_ids": IDS}], progress=Late(stop))
    assert_untouched(adapted, before)
    assert not any(layer._forward_pre_hooks for layer in adapted.modules() if hasattr(layer, "lora_magnitude_vector"))


# Merging.


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED | VARIANTS.keys()])
def test_it_merges_where_no_zero_is_filled(name):
    case = CASES[name]
    model = made(name)
    masks = pruned(model, case)  # before any training a merge would fill nothing
    on_layers = any(isinstance(module, BaseTunerLayer) for module in model.modules()) and name != "Shadow"
    assert bool(lossy_layers(model, masks)) == (on_layers and name not in MERGES)
    train(model)
    before = snapshot(model)
    if name not in MERGES:
        with pytest.raises(MergeError), merged_in_place(model, masks):
            pass
        with pytest.raises(MergeError):
            merge(model, masks)
        assert_untouched(model, before)
        return
    apart = copy.deepcopy(model)
    with merged_in_place(model, masks):
        masks.verify(model)
    assert_untouched(model, before)
    merged = merge(model, masks)
    masks.verify(merged)
    assert difference(merged, apart, case) < 1e-5


# Where PEFT allows no adapters.


def small(kind, **changes):
    import transformers

    common = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}
    common |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(**(common | changes))
    return getattr(transformers, f"{kind}ForCausalLM")(config)


JAMBA = {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 2,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
MAMBAS = {
    "Mamba": {"state_size": 4, "time_step_rank": 4},
    "FalconMamba": {"state_size": 4, "time_step_rank": 4},
    "Mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lora", "masked_lora", "hira"])
@pytest.mark.parametrize("kind", MAMBAS)
def test_all_linear_leaves_out_what_peft_forbids(kind, form):
    model = small(kind, **MAMBAS[kind])
    with pytest.warns(UserWarning, match="all-linear leaves out the 2 layers named out_proj"):
        adapted = attach_adapter(model, AdapterSettings(form, r=2, dropout=0.0, target_modules="all-linear"))
    wrapped = {name.split(".")[-2] for name, _ in adapted.named_modules() if name.endswith("base_layer")}
    assert "in_proj" in wrapped
    assert not wrapped & {"out_proj", "lm_head"}
    adapted(input_ids=IDS).logits.sum().backward()


@pytest.mark.parametrize("form", ["lora", "hira"])
def test_all_linear_takes_everything_where_nothing_is_forbidden(form):
    model = small("Jamba", **JAMBA)
    settings = AdapterSettings(form, r=2, dropout=0.0, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="all-linear")
        adapted = attach_adapter(model, settings)
    wrapped = {name.split(".")[-2] for name, _ in adapted.named_modules() if name.endswith("base_layer")}
    assert {"out_proj", "in_proj", "q_proj", "down_proj"} <= wrapped


def test_a_forbidden_layer_that_is_named_is_refused_before_anything_changes():
    model = small("Mamba", **MAMBAS["Mamba"])
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=r"no adapters on backbone\S+out_proj .* leave 'out_proj' out"):
        attach_adapter(model, AdapterSettings(target_modules=["in_proj", "out_proj"]))
    assert [type(module) for module in model.modules()] == kinds
    full = attach_adapter(small("Mamba", **MAMBAS["Mamba"]), AdapterSettings("full", target_modules="all-linear"))
    assert full.backbone.layers[0].mixer.out_proj.weight.requires_grad
