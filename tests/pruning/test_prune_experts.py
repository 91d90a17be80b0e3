"""`prune` on Mixture-of-Experts models: every expert against the tokens that are routed to it."""

from __future__ import annotations

import copy

import pytest
import torch
from moe import FAMILIES, SIZES
from reference import assert_mask, gram_of, reference_error, score_of
from reference_inputs import collect, linear_layers, matrix_of, spread_weights, staged, unseen_in
from torch import Tensor, nn

from sparsefit import MaskSet, PruningConfig, prune
from sparsefit.errors import MaskError
from sparsefit.pruning.weight_updates import inverse_factor, update_sequentially

EXPERTS = "mlp.experts"


def make(family: str, **changes: int) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family] | changes))
    return spread_weights(getattr(transformers, f"{family}ForCausalLM")(config))


def samples(lengths: tuple[int, ...] = (12, 9, 12)) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(1, 61, (1, length), generator=generator)} for length in lengths]


def names_of(model: nn.Module, layer: int) -> list[str]:
    """All masks of a block."""
    prefix = f"model.layers.{layer}."
    stacks = [(name, len(p)) for name, p in model.named_parameters() if p.ndim == 3 and name.startswith(prefix)]
    return [f"{name}.weight" for name in linear_layers(model, [prefix.rstrip(".")])] + [
        f"{name}[{index}]" for name, count in stacks for index in range(count)
    ]


def blocks_of(model: nn.Module) -> list[list[str]]:
    return [names_of(model, layer) for layer in range(2)]


def check(model: nn.Module, config: PruningConfig, data: list[dict[str, Tensor]], **selection) -> None:
    dense = copy.deepcopy(model)
    result = prune(model, data, config)
    stages = blocks_of(dense) if config.update == "block" else [[name for names in blocks_of(dense) for name in names]]
    assert set(result.masks) == {name for stage in stages for name in stage}
    seen = set()
    for name, weight, changed, inputs in staged(dense, model, data, stages):
        scores, tolerance = score_of(config.score, weight, inputs)
        # Routed tokens come in another order than in the reference, and rounding with it.
        expert = "experts" in name
        tolerance = max(tolerance, (1e-4 if weight.dtype == torch.float32 else 2e-2) if expert else 0)
        assert_mask(result.masks[name], scores, tolerance, **selection)
        assert torch.equal(changed, torch.where(result.masks[name], weight, 0)), name
        seen.add(name)
    unseen = set(result.masks) - seen
    assert unseen_in(result.notes) == unseen
    for name in unseen:
        weight = matrix_of(dense, name)  # pruned by now: what is kept is larger than what went
        assert torch.equal(weight != 0, result.masks[name])
    result.masks.verify(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pattern": "2:4"},
        {"score": "sparsegpt", "granularity": "output"},
        {"score": "ria", "granularity": "layer", "sparsity": 0.57},
        {"update": "none"},
    ],
    ids=["wanda", "2:4", "sparsegpt", "ria", "none"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_every_expert(family, settings):
    selection = {key: settings[key] for key in ("pattern", "granularity", "sparsity") if key in settings}
    check(make(family), PruningConfig(**settings, micro_batch_size=1), samples(), **selection)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_bfloat16(family):
    check(make(family).bfloat16(), PruningConfig(micro_batch_size=1), samples())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_weights_of_experts_are_updated_from_their_own_tokens(family):
    model = make(family, num_local_experts=3)
    dense, data = copy.deepcopy(model), samples((30, 40, 30))
    result = prune(model, data, PruningConfig(reconstruction="sequential", micro_batch_size=1))
    experts = [[name for name in names if "experts" in name] for names in blocks_of(dense)][:1]
    for name, weight, changed, inputs in staged(dense, model, data, experts):
        mask, gram = result.masks[name], torch.from_numpy(gram_of(inputs)).float()
        assert_mask(mask, score_of("wanda", weight, inputs)[0], 1e-4)
        expected = update_sequentially(weight, mask, inverse_factor(gram))
        torch.testing.assert_close(changed, expected, rtol=1e-2, atol=1e-3)
        assert result.layer_errors[name] == pytest.approx(reference_error(weight, changed, inputs), rel=0.01)
    assert result.masks.keys() - result.layer_errors.keys() == unseen_in(result.notes)
    result.masks.verify(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_unseen_experts_are_pruned_by_magnitude_and_named(family):
    model, data = make(family), samples((2,))
    dense = copy.deepcopy(model)
    result = prune(model, data, PruningConfig(0.4))
    # Pruned blocks route to other experts than dense ones: what is seen follows the pruned model.
    unseen = set()
    for names in blocks_of(dense):
        seen = collect(dense, data)
        unseen |= {name for name in names if name not in seen}
        for name in names:
            if name in unseen:
                weight = matrix_of(dense, name)
                assert_mask(result.masks[name], *score_of("magnitude", weight, []), sparsity=0.4)
            matrix_of(dense, name).copy_(matrix_of(model, name))
    assert unseen
    assert unseen_in(result.notes) == unseen


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_lie_as_they_are_stored_and_come_back(family, tmp_path):
    model, other = make(family), make(family)
    result = prune(model, samples(), PruningConfig(pattern="2:4"))
    masks = result.masks
    experts = model.model.layers[1].mlp.experts
    stack = "model.layers.1.mlp.experts.down_proj"
    assert masks.parameters[stack] == [f"{stack}[{index}]" for index in range(8)]
    width, inner = 16, 24 if family in ("Mixtral", "Olmoe", "GptOss") else 12
    assert masks[f"{stack}[3]"].shape == (width, inner)
    assert masks["model.layers.1.mlp.experts.gate_up_proj[0]"].shape == (2 * inner, width)
    assert bool((masks[f"{stack}[3]"].reshape(width, -1, 4).sum(-1) == 2).all())
    whole = masks.for_parameter(stack, experts.down_proj)
    assert whole.shape == experts.down_proj.shape
    assert torch.equal(whole, experts.down_proj != 0)
    masks.save(tmp_path / "masks")
    loaded = MaskSet.load(tmp_path / "masks")
    assert loaded.digest() == masks.digest() == MaskSet.from_state_dict(masks.state_dict()).digest()
    with pytest.raises(MaskError, match="not zero"):
        loaded.verify(other)
    loaded.apply(other)
    loaded.verify(other)
    loaded.verify(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        other.get_parameter(stack)[5][~masks.for_parameter(stack, experts.down_proj)[5]] = 1.0
    with pytest.raises(MaskError, match=r"1 of .*down_proj\[5\]"):
        loaded.verify(other)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_pruned_or_left_dense_for_a_reason(family):
    model = make(family)
    result = prune(model, samples())
    covered = {*result.masks.parameters, *result.left_dense}
    assert covered == {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    routers = [name for name in result.left_dense if name.endswith(("gate.weight", "router.weight"))]
    assert routers
    assert all("not a layer that is pruned" in result.left_dense[name] for name in routers)
    biases = [name for name in result.left_dense if name.endswith("_bias")]
    assert len(biases) == (4 if family == "GptOss" else 0)
    assert not any("experts" in name for name in set(result.left_dense) - set(biases))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    masked = {name: sum(result.masks[m].numel() for m in masks) for name, masks in result.masks.parameters.items()}
    assert all(sizes[name] == count for name, count in masked.items())


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"targets": ("gate_up_proj",)}, {"gate_up_proj"}),
        ({"targets": ("experts.down_proj", "q_proj")}, {"down_proj", "weight"}),
        ({"exclude": ("gate_up_proj", "model.layers.0.mlp.experts.down_proj")}, {"down_proj", "weight"}),
    ],
)
def test_targets_and_exclusions(settings, kinds):
    result = prune(make("Mixtral"), samples(), PruningConfig(**settings))
    assert {name.rpartition(".")[2].partition("[")[0] for name in result.masks} == kinds
    for name, reason in result.left_dense.items():
        if "experts" in name:
            assert reason == ("excluded by the configuration" if "exclude" in settings else "not among the targets")
    if "exclude" in settings:
        assert "model.layers.0.mlp.experts.down_proj" in result.left_dense
        assert "model.layers.1.mlp.experts.down_proj[7]" in result.masks


def test_adapters_on_the_attention_of_a_mixture():
    from peft import LoraConfig, get_peft_model

    bare = prune(make("Mixtral"), samples(), PruningConfig(micro_batch_size=1)).masks
    model = get_peft_model(make("Mixtral"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    result = prune(model, samples(), PruningConfig(micro_batch_size=1))
    assert result.masks.digest() == bare.digest()
    result.masks.verify(model)
    assert model.base_model.model.get_experts_implementation() != "eager"


@pytest.mark.parametrize("seed", range(3, 7))
def test_a_gap_within_a_sample_is_left_out_or_a_note_says_that_it_was_not(seed):
    """Experts see tokens in an order of their own: even one that gets as many as there are positions."""
    model = make("Mixtral", num_local_experts=2)
    dense = copy.deepcopy(model)
    ids = torch.randint(1, 61, (1, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 4:7] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    inputs, real = collect(dense, [batch]), mask[0].bool()
    result = prune(model, [batch], PruningConfig(update="none"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert_mask(result.masks[name], *score_of("wanda", matrix_of(dense, name), [inputs[name][0][real]]))
    reported = any("padding could not be told" in note for note in result.notes)
    for name in ("model.layers.0.mlp.experts.gate_up_proj[0]", "model.layers.0.mlp.experts.down_proj[1]"):
        tokens = inputs[name][0]
        assert len(tokens) == 12
        scores, _ = score_of("wanda", matrix_of(dense, name), [tokens if reported else tokens[real]])
        assert_mask(result.masks[name], scores, 1e-4)
