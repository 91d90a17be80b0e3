"""Tiny transformers models of many kinds against a brute force; `scripts/architectures.py` holds all of them to it."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES
from brute_force import compare
from tiny_transformers import model_of, samples_of
from torch import nn

from sparsefit import PruningConfig, prune
from sparsefit.pruning.results import PruningResult

# What is particular about each: windows; a gated shared expert; experts in a dictionary that holds more; a stack longer
# than the other one; matrices that are computed with and not called; two lists of blocks; stages; a convolution outside
# of these; images among the tokens.
SHORT = ["Gemma 3", "Qwen2 MoE", "NLLB MoE", "LongCat Flash", "Mamba", "Whisper", "RegNet", "CvT", "Qwen2-VL"]


def pruned(name: str, **settings: str) -> tuple[nn.Module, nn.Module, PruningResult]:
    """The dense model, the pruned one, and the report."""
    model = model_of(name)
    dense = copy.deepcopy(model)
    return dense, model, prune(model, samples_of(name), PruningConfig(**settings))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_masks_equal_those_of_the_brute_force(name):
    dense, model, result = pruned(name)
    matrices = {
        parameter: id(p) for parameter, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1 and p.numel()
    }
    reported = {matrices[own] for own in (*result.masks.parameters, *result.left_dense) if own in matrices}
    assert reported == set(matrices.values())
    result.masks.verify(model)
    found = compare(dense, model, result, samples_of(name), ARCHITECTURES[name].blocks)
    assert result.update == "block"
    assert found.bits == sum(mask.numel() for mask in result.masks.values())
    assert found.verdict == "yes", found


def test_the_brute_force_knows_another_order_from_the_papers():
    dense, model, result = pruned("Gemma 3", update="none")
    result.update = "block"  # which is not how the masks were chosen
    found = compare(dense, model, result, samples_of("Gemma 3"), ARCHITECTURES["Gemma 3"].blocks)
    assert found.verdict == "no"
    assert {name.split(".")[2] for name in found.wrong} == {"1", "2"}  # before the first block nothing was pruned


def test_the_brute_force_knows_other_samples_from_those_of_the_calibration():
    dense, model, result = pruned("LongCat Flash")
    others = [{"input_ids": sample["input_ids"].flip(1)[:, :5]} for sample in samples_of("LongCat Flash")]
    found = compare(dense, model, result, others, ARCHITECTURES["LongCat Flash"].blocks)
    assert found.verdict == "no"
    assert any("experts.gate_up_proj" in name for name in found.wrong)


@pytest.mark.parametrize("name", ["NLLB MoE", "LongCat Flash", "DBRX"])
def test_routers_are_recognized_next_to_experts_of_any_form(name):
    _, _, result = pruned(name)
    routers = {own for own, reason in result.left_dense.items() if reason == "router of experts"}
    assert routers
    assert all(".ffn.router." in own or ".mlp.router." in own for own in routers)
    assert not any("router" in own for own in result.masks)


def test_experts_that_no_token_reaches_are_pruned_where_a_dictionary_holds_more_than_them():
    _, _, result = pruned("NLLB MoE")
    experts = [f"model.encoder.layers.1.ffn.experts.expert_{number}.fc1.weight" for number in range(4)]
    assert set(experts) <= set(result.masks)
    assert not any("experts" in own for own in result.left_dense)


def test_a_stack_that_is_longer_than_the_other_is_pruned_to_its_end():
    _, model, result = pruned("LongCat Flash")
    stacks = {own: stack for own, stack in model.named_parameters() if own.startswith("model.layers.0.mlp.experts.")}
    assert {own.rpartition(".")[2]: len(stack) for own, stack in stacks.items()} == {"gate_up_proj": 6, "down_proj": 4}
    for own, stack in stacks.items():
        assert len(result.masks.parameters[own]) == len(stack)
        assert float((stack == 0).float().mean()) == pytest.approx(0.5)
        assert torch.equal(result.masks.for_parameter(own, stack), stack != 0)
