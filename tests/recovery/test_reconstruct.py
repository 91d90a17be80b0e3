"""Blocks tuned one by one towards the dense network's outputs."""

from __future__ import annotations

import copy
import json
import math
from itertools import islice

import pytest
import torch
from ranks import on_ranks
from small_pruned_models import BATCHES, IDS, Block, Net, assert_state, changed, pruned, snapshot, state
from torch import nn

from sparsefit.ranks import own_rank
from sparsefit.recovery.block_reconstruction import ReconstructSettings, reconstruct


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, initializer_range=0.3))


def convnext():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 12, 16], "depths": [2, 2, 2], "num_stages": 3, "initializer_range": 0.3}
    return ConvNextForImageClassification(ConvNextConfig(**sizes, layer_scale_init_value=0.3, image_size=32))


IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MODELS = {
    "llama": (None, BATCHES, 3),
    "mistral": (None, BATCHES, 3),  # a sliding window
    "gemma3": (None, BATCHES, 3),
    "gpt2": (None, BATCHES, 3),
    "opt": (None, BATCHES, 3),
    "mixtral": (None, BATCHES, 3),
    "t5": (None, [{"input_ids": IDS, "labels": IDS.flip(1)[:, :5].contiguous()}], 4),
    "bert": (
        None,
        [{"input_ids": IDS, "attention_mask": (torch.arange(9) < torch.tensor([[9], [7], [9], [4], [9], [8]])).long()}],
        3,
    ),
    "vit": (vit, [{"pixel_values": IMAGES[..., :8, :8]}], 3),
    "convnext": (convnext, [{"pixel_values": IMAGES}], 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_errors_fall_masks_hold_and_nothing_else_changes(tiny_model, name):
    make, batches, blocks = MODELS[name]
    model = make() if make else tiny_model(name)
    model.train()
    dense, masks = pruned(model, batches)
    next(model.parameters()).requires_grad_(False)
    before, was = snapshot(model), state(model)
    done = []
    errors = reconstruct(
        model, batches, dense, masks, ReconstructSettings(4, 2e-3, 2), progress=lambda *at: done.append(at)
    )
    assert len(errors) == blocks == len({error.block for error in errors})
    assert done == [(number + 1, blocks) for number in range(blocks)]
    for error in errors:
        assert 0 < error.after < error.before
        assert error.steps >= 12
        assert model.get_submodule(error.block) is not None
    masks.verify(model)
    assert changed(model, before) == set(masks.parameters)
    assert_state(model, was)


def test_a_rate_that_is_too_high_changes_nothing(tiny_model):
    model = tiny_model("llama")
    dense, masks = pruned(model)
    before = snapshot(model)
    errors = reconstruct(model, BATCHES, dense, masks, ReconstructSettings(1, 30.0, 2))
    assert all(error.after == error.before for error in errors)
    assert all(error.steps == 3 for error in errors)
    assert changed(model, before) == set()


# Against a loop written out.


def distances(model, blocks, dense_model, dense_blocks, batch):
    """Squared distance of each block's output, as a share: by hooks on whole passes."""
    outputs = []
    for net, own in ((model, blocks), (dense_model, dense_blocks)):
        seen = {}
        hooks = [
            block.register_forward_hook(
                lambda _, __, out, at=at, seen=seen: seen.update({at: out if torch.is_tensor(out) else out[0]})
            )
            for at, block in enumerate(own)
        ]
        with torch.no_grad():
            net(**batch)
        for hook in hooks:
            hook.remove()
        outputs.append([seen[at] for at in range(len(own))])
    return [float((s - d).square().sum() / d.square().sum()) for s, d in zip(*outputs, strict=True)]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_errors_are_those_of_whole_passes(tiny_model, name):
    """The targets are the dense network's, all the way through: also of a decoder behind an encoder."""
    batch = MODELS[name][1][0]
    dense_model, model = tiny_model(name), tiny_model(name)
    dense, masks = pruned(model, [batch])
    sparse = copy.deepcopy(model)
    errors = reconstruct(model, [batch], dense, masks, ReconstructSettings(2, 1e-3, 6))

    def blocks(net):
        return [net.get_submodule(error.block) for error in errors]

    after = distances(model, blocks(model), dense_model, blocks(dense_model), batch)
    assert after == pytest.approx([error.after for error in errors], rel=1e-3)
    before = distances(sparse, blocks(sparse), dense_model, blocks(dense_model), batch)
    assert before[0] == pytest.approx(errors[0].before, rel=1e-3)
    assert sum(after) < sum(before)


def written_out(model, dense, masks, x, passes, rate, size):
    """The method on a plain network, step by step: Adam by autograd on masked weights."""
    with torch.no_grad():
        sparse_in = dense_in = [part.clone() for part in model.stem(x).split(size)]
    for index, (block, whole) in enumerate(zip(model.blocks, dense.blocks, strict=True)):
        with torch.no_grad():
            dense_in = [whole(part) for part in dense_in]
        scale = sum(float(target.square().mean()) for target in dense_in) / len(dense_in)
        weights = {name: getattr(block, name).weight.detach().clone().requires_grad_(True) for name in ("up", "down")}
        kept = {name: masks[f"blocks.{index}.{name}.weight"] for name in weights}
        optimizer = torch.optim.Adam(weights.values(), lr=rate)
        generator, step, total = torch.Generator().manual_seed(0), 0, passes * len(dense_in)
        for _ in range(passes):
            for number in torch.randperm(len(dense_in), generator=generator).tolist():
                optimizer.param_groups[0]["lr"] = rate * (1 - step / total)
                hidden = sparse_in[number]
                h = nn.functional.linear(hidden, weights["up"] * kept["up"], block.up.bias)
                h = nn.functional.linear(torch.tanh(block.norm(h)), weights["down"] * kept["down"], block.down.bias)
                optimizer.zero_grad()
                ((hidden + h - dense_in[number]).square().mean() / scale).backward()
                optimizer.step()
                step += 1
        with torch.no_grad():
            for name, weight in weights.items():
                getattr(block, name).weight.copy_(weight * kept[name])
            sparse_in = [block(part) for part in sparse_in]


@pytest.mark.parametrize("size", [4, 5])
def test_it_is_adam_on_the_distance_from_the_dense_block(size):
    model, whole = Net(), Net()
    x = torch.randn(16, 6)
    dense, masks = pruned(model, [x], micro_batch_size=3)
    expected = copy.deepcopy(model)
    written_out(expected, whole, masks, x, 5, 1e-2, size)
    errors = reconstruct(model, [x[:7], x[7:]], dense, masks, ReconstructSettings(5, 1e-2, size))
    assert [error.steps for error in errors] == [20] * 3
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-3, atol=2e-5)


class AddsInPlace(Block):
    """Its input is no one else's, so it may write to it."""

    def forward(self, x):
        before = self.down(torch.tanh(self.up(self.norm_in(x))))
        x += before
        return x

    def __init__(self, width):
        super().__init__(width)
        self.norm_in = nn.Softmax(dim=-1)


class Adds(AddsInPlace):
    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm_in(x))))


def test_blocks_that_change_their_input_in_place():
    results = []
    for block in (AddsInPlace, Adds):
        model = Net(block)
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
        dense, masks = pruned(model, [x])
        errors = reconstruct(model, [x], dense, masks, ReconstructSettings(5, 1e-2, 4))
        results.append([*(torch.tensor([e.before, e.after]) for e in errors), *model.parameters()])
    torch.testing.assert_close(*results)


# A real model; several ranks.


@pytest.mark.slow
def test_a_real_model_recovers(shared_data):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "tinystories656K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def windows(name, count, length=128):
        with (shared_data / "tinystories" / name).open(encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in islice(file, 3 * count)]
        return tokenizer("\n\n".join(texts), return_tensors="pt").input_ids[0, : count * length].view(count, length)

    @torch.no_grad()
    def perplexity():
        ids = windows("val.jsonl", 16)
        return math.exp(model(input_ids=ids, labels=ids).loss)

    batches = [{"input_ids": windows("train_sample.jsonl", 16)}]
    found = [perplexity()]
    dense, masks = pruned(model, batches, sparsity=0.6)
    found.append(perplexity())
    errors = reconstruct(model, batches, dense, masks, ReconstructSettings(6, 1e-3, 4))
    found.append(perplexity())
    masks.verify(model)
    assert all(error.after < error.before for error in errors)
    assert found[0] < found[2] < 0.85 * found[1]


ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
SHARES = {"even": [slice(0, 12), slice(12, 24)], "uneven": [slice(0, 16), slice(16, 24)]}
SETTINGS = ReconstructSettings(3, 1e-2, 8)


def reconstructed_together():
    torch.distributed.init_process_group("gloo")
    found = {}
    for name, shares in SHARES.items():
        model, mine = Net(), [ROWS[shares[own_rank()]]]
        dense, masks = pruned(model, mine)
        errors = reconstruct(model, mine, dense, masks, SETTINGS)
        masks.verify(model)
        found[name] = [model.state_dict(), [(error.before, error.after, error.steps) for error in errors]]
    return found


@pytest.fixture(scope="module")
def two_ranks():
    return on_ranks(2, reconstructed_together)


@pytest.mark.slow
@pytest.mark.parametrize(("shares", "steps"), [("even", 9), ("uneven", 12)])
def test_two_ranks_end_with_equal_weights(two_ranks, shares, steps):
    (first, errors), (second, others) = (found[shares] for found in two_ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert errors == others
    assert all(after < before and taken == steps for before, after, taken in errors)


def test_two_ranks_take_the_steps_of_one_process_over_all_samples(two_ranks):
    # A micro-batch of one process is one of each rank, in the order that all ranks shuffle theirs.
    model = Net()
    rows = torch.cat([torch.cat(pair) for pair in zip(ROWS[:12].split(4), ROWS[12:].split(4), strict=True)])
    dense, masks = pruned(model, [rows])
    errors = reconstruct(model, [rows], dense, masks, SETTINGS)
    state, reported = two_ranks[0]["even"]
    torch.testing.assert_close(state, model.state_dict(), rtol=1e-3, atol=1e-4)
    assert [after for _, after, _ in reported] == pytest.approx([error.after for error in errors], rel=1e-3)
