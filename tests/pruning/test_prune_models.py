"""`prune` on models of many kinds against a reference that runs the whole model for each block."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from reference import reference_mask, reference_scores
from reference_inputs import linear_layers, reference_prune, squared_input_norms
from torch import nn

from sparsefit import PruningConfig, prune

BLOCKS = {
    "llama": ["model.layers"],
    "mistral": ["model.layers"],
    "qwen3": ["model.layers"],
    "gemma3": ["model.layers"],
    "opt": ["model.decoder.layers"],
    "gpt_neox": ["gpt_neox.layers"],
    "bloom": ["transformer.h"],
    "gpt2": ["transformer.h"],
    "bert": ["bert.encoder.layer"],
    "t5": ["encoder.block", "decoder.block"],
}
DECODERS = [name for name in BLOCKS if name not in ("bert", "t5")]
LENGTHS = [12, 12, 9, 14, 9]
ORDERS = ["block", "none"]


def sequences(lengths: list[int] = LENGTHS, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 61, (1, length), generator=generator) for length in lengths]


def samples_for(architecture: str) -> list[dict[str, torch.Tensor]]:
    """Batches of one sample without padding."""
    decoder = zip(sequences(), sequences(LENGTHS[::-1], seed=2), strict=True)
    if architecture == "t5":
        return [{"input_ids": ids, "decoder_input_ids": answer} for ids, answer in decoder]
    return [{"input_ids": ids} for ids in sequences()]


def padded_batch(side: str) -> dict[str, torch.Tensor]:
    longest = max(LENGTHS)
    ids, mask = torch.full((len(LENGTHS), longest), 5), torch.zeros(len(LENGTHS), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences()):
        length = sequence.shape[1]
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[row, place], mask[row, place] = sequence[0], 1
    return {"input_ids": ids, "attention_mask": mask}


def stages(model: nn.Module, architecture: str, update: str) -> list[list[str]]:
    blocks = [f"{lst}.{i}" for lst in BLOCKS[architecture] for i in range(len(model.get_submodule(lst)))]
    return [[block] for block in blocks] if update == "block" else [blocks]


def assert_same_masks(result, expected: dict[str, np.ndarray]) -> None:
    assert list(result.masks) == list(expected)
    for name, mask in expected.items():
        np.testing.assert_array_equal(result.masks[name].numpy(), mask, err_msg=name)


def assert_weights_masked(model: nn.Module, dense: nn.Module, result) -> None:
    """Check that pruned weights are zero, and that all others are unchanged, bit for bit."""
    before = dict(dense.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kept = result.masks.for_parameter(name, parameter) if name in result.masks else torch.tensor(True)
        assert torch.equal(parameter, torch.where(kept, before[name], 0)), name


@pytest.mark.slow
@pytest.mark.parametrize("update", ORDERS)
@pytest.mark.parametrize("architecture", BLOCKS)
def test_masks_equal_whole_model_passes_per_block(tiny_model, architecture, update):
    model = tiny_model(architecture)
    dense, slow = copy.deepcopy(model), copy.deepcopy(model)
    samples = samples_for(architecture)
    result = prune(model, samples, PruningConfig(sparsity=0.6, update=update, micro_batch_size=1))
    assert result.update == update
    assert result.notes == []
    assert result.samples == len(samples)
    assert result.tokens == sum(LENGTHS)
    assert_same_masks(result, reference_prune(slow, samples, stages(slow, architecture, update), sparsity=0.6))
    assert_weights_masked(model, dense, result)
    assert set(result.masks) == {f"{n}.weight" for n in linear_layers(model, BLOCKS[architecture])}


@pytest.mark.parametrize(
    "settings",
    [{"pattern": "2:4"}, {"granularity": "layer", "sparsity": 0.5}],
    ids=["2:4", "layer"],
)
@pytest.mark.parametrize("architecture", ["gemma3", "gpt2"])
def test_patterns_and_granularity_follow_the_same_order(tiny_model, architecture, settings):
    model = tiny_model(architecture)
    slow, samples = copy.deepcopy(model), samples_for(architecture)
    result = prune(model, samples, PruningConfig(**settings, micro_batch_size=1))
    assert_same_masks(result, reference_prune(slow, samples, stages(slow, architecture, "block"), **settings))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_each_batch_keeps_its_own_arguments(tiny_model, architecture):
    model = tiny_model(architecture)
    slow = copy.deepcopy(model)
    strides = zip(sequences([12] * 4), (1, 2, 3, 5), strict=True)
    samples = [{"input_ids": ids, "position_ids": torch.arange(12)[None] * stride} for ids, stride in strides]
    result = prune(model, samples, PruningConfig(micro_batch_size=1))
    assert_same_masks(result, reference_prune(slow, samples, stages(slow, architecture, "block")))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("architecture", [*DECODERS, "bert"])
def test_padding_counts_for_nothing(tiny_model, architecture, side):
    model = tiny_model(architecture)
    slow = copy.deepcopy(model)
    result = prune(model, [padded_batch(side)], PruningConfig(sparsity=0.6, micro_batch_size=1))
    assert result.tokens == sum(LENGTHS)
    expected = reference_prune(slow, samples_for(architecture), stages(slow, architecture, "block"), sparsity=0.6)
    assert_same_masks(result, expected)


def test_padding_is_seen_in_positional_batches_too(tiny_model):
    batch = padded_batch("right")
    by_name = prune(tiny_model("llama"), [batch])
    by_position = prune(tiny_model("llama"), [tuple(batch.values())])
    assert by_position.tokens == sum(LENGTHS)
    assert by_position.masks.digest() == by_name.masks.digest()


def test_gaps_inside_a_sequence_are_left_out_of_the_statistics(tiny_model):
    ids = sequences([12])[0]
    mask = torch.ones_like(ids)
    mask[0, 4:7] = 0
    result = prune(tiny_model("llama"), [{"input_ids": ids, "attention_mask": mask}])
    assert result.tokens == 9


def test_samples_that_are_all_padding_are_left_out(tiny_model):
    batch = padded_batch("right")
    empty = {"input_ids": torch.full((1, 14), 5), "attention_mask": torch.zeros(1, 14, dtype=torch.long)}
    joined = {key: torch.cat([value[:2], empty[key], value[2:]]) for key, value in batch.items()}
    result = prune(tiny_model("llama"), [joined])
    assert result.samples == len(LENGTHS)
    assert result.masks.digest() == prune(tiny_model("llama"), [batch]).masks.digest()


@pytest.mark.parametrize("update", ORDERS)
def test_encoder_decoder_padding(tiny_model, update):
    """Each side's padding is its own; both are cut away."""
    ids, answers = sequences([9, 14]), sequences([7, 11], seed=2)
    batch = {"input_ids": torch.full((2, 14), 5), "decoder_input_ids": torch.full((2, 11), 5)}
    batch |= {"attention_mask": torch.zeros(2, 14, dtype=torch.long)}
    batch |= {"decoder_attention_mask": torch.zeros(2, 11, dtype=torch.long)}
    for row, (source, answer) in enumerate(zip(ids, answers, strict=True)):
        batch["input_ids"][row, : source.shape[1]] = source
        batch["attention_mask"][row, : source.shape[1]] = 1
        batch["decoder_input_ids"][row, : answer.shape[1]] = answer
        batch["decoder_attention_mask"][row, : answer.shape[1]] = 1
    config = PruningConfig(update=update, micro_batch_size=1)
    whole = [{"input_ids": a, "decoder_input_ids": b} for a, b in zip(ids, answers, strict=True)]
    padded = prune(tiny_model("t5"), [batch], config)
    assert padded.masks.digest() == prune(tiny_model("t5"), whole, config).masks.digest()
    assert padded.tokens == 9 + 14


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "t5"])
def test_masks_do_not_depend_on_how_batches_were_cut(tiny_model, architecture):
    samples = samples_for(architecture)
    keys = samples[0].keys()
    same_length = [{key: sample[key][:, :9] for key in keys} for sample in samples]
    joined = {key: torch.cat([sample[key] for sample in same_length]) for key in keys}
    digests = set()
    for size in (1, 2, 3, len(samples)):
        batches = [{key: joined[key][i : i + size] for key in keys} for i in range(0, len(samples), size)]
        digests.add(prune(tiny_model(architecture), batches).masks.digest())
    assert len(digests) == 1


def test_micro_batch_size_changes_at_most_near_ties(tiny_model):
    batch = {"input_ids": torch.cat(sequences([12] * 10))}
    one, many = (prune(tiny_model("llama"), [batch], PruningConfig(micro_batch_size=size)).masks for size in (1, 10))
    different = sum(int((one[name] ^ many[name]).sum()) for name in one)
    assert different <= 1e-3 * sum(mask.numel() for mask in one.values())


def test_peft_model_is_pruned_in_its_base_alone(tiny_model):
    from peft import LoraConfig, get_peft_model

    samples = samples_for("llama")
    bare = tiny_model("llama")
    expected = prune(bare, samples).masks
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    model.train()
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    result = prune(model, samples)
    assert result.masks.digest() == expected.digest()
    assert list(result.masks) == list(expected)
    assert adapters
    for name, parameter in model.named_parameters():
        if name in adapters:
            assert torch.equal(parameter, adapters[name])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert not any("lora" in name for name in result.left_dense)
    result.masks.verify(model)
    torch.testing.assert_close(model.eval()(**samples[0]).logits, bare(**samples[0]).logits)


@pytest.mark.parametrize("update", ORDERS)
def test_adapters_are_part_of_what_layers_see(tiny_model, update):
    from peft import LoraConfig, get_peft_model

    config, samples = PruningConfig(update=update, micro_batch_size=1), samples_for("llama")
    bare = prune(tiny_model("llama"), samples, config).masks
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), lora)
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name}
    masks = prune(model, samples, config).masks
    assert list(masks) == list(bare)
    assert masks.digest() != bare.digest()
    masks.verify(model)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in adapters.items())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", BLOCKS)
def test_every_matrix_is_pruned_or_left_dense_for_a_reason(tiny_model, architecture):
    model = tiny_model(architecture)
    result = prune(model, samples_for(architecture))
    matrices = {id(p) for p in model.parameters() if p.ndim > 1}
    names = dict(model.named_parameters(remove_duplicate=False))
    assert {id(names[name]) for name in (*result.masks, *result.left_dense)} == matrices
    assert all(result.left_dense.values())


def test_weights_tied_to_an_embedding_stay_dense(tiny_model):
    model = tiny_model("llama", tie_word_embeddings=True)
    config = PruningConfig(targets=("lm_head", "q_proj"))
    result = prune(model, samples_for("llama"), config)
    assert result.left_dense["lm_head.weight"] == "output layer, shared with the embedding"
    assert {name.split(".")[-2] for name in result.masks} == {"q_proj"}
    assert bool((model.model.embed_tokens.weight != 0).all())


def test_targets_and_exclusions(tiny_model):
    config = PruningConfig(targets=("q_proj", "mlp.down_proj"), exclude=("model.layers.1.self_attn.q_proj",))
    result = prune(tiny_model("llama"), samples_for("llama"), config)
    assert list(result.masks) == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
    ]
    assert result.left_dense["model.layers.1.self_attn.q_proj.weight"] == "excluded by the configuration"
    assert result.left_dense["model.layers.1.self_attn.k_proj.weight"] == "not among the targets"


def test_a_target_behind_the_blocks_takes_its_statistics_from_pruned_ones(tiny_model):
    model, samples = tiny_model("llama", tie_word_embeddings=False), samples_for("llama")
    slow = copy.deepcopy(model)
    names = ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj", "lm_head"]
    result = prune(model, samples, PruningConfig(targets=tuple(names), micro_batch_size=1))
    layers = dict(slow.named_modules())
    expected = {}
    for name in names:
        norms = squared_input_norms(slow, samples, {name: layers[name]})[name]
        mask = reference_mask(reference_scores(layers[name].weight.detach().numpy(), norms))
        expected[f"{name}.weight"] = mask
        layers[name].weight.data.mul_(torch.from_numpy(mask))
    assert_same_masks(result, expected)


def test_magnitude_needs_no_data(tiny_model):
    model = tiny_model("llama")
    result = prune(model, config=PruningConfig(score="magnitude", sparsity=0.3))
    for name, mask in result.masks.items():
        assert int((~mask).sum()) == int(mask.numel() * 3 // 10)
        weight = tiny_model("llama").get_parameter(name).abs()
        assert weight[~mask].max() <= weight[mask].min()
    assert result.update == "none"
