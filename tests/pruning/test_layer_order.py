"""update="layer": each layer sees inputs that have gone through the pruned layers before it, in a single pass."""

from __future__ import annotations

import copy
import itertools
import signal
import threading
import time
from collections import Counter
from typing import Any

import pytest
import torch
from passes import collect, linear_layers, matrix_of, staged, unseen_in
from reference import assert_mask, reference_error, score_of
from torch import Tensor, nn

from sparsefit import PruningConfig, prune

# Of the architecture: what its blocks' names begin with.
BLOCKS = {
    "llama": ("model.layers.",),
    "gpt2": ("transformer.h.",),
    "gemma3": ("model.layers.",),
    "opt": ("model.decoder.layers.",),
    "mixtral": ("model.layers.",),
    "t5": ("encoder.block.", "decoder.block."),
}
LENGTHS = (12, 9, 14, 9)


def samples(architecture: str = "llama", lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 61, (1, length), generator=generator) for length in lengths]
    if architecture == "t5":
        return [{"input_ids": a, "decoder_input_ids": b} for a, b in zip(ids, ids[::-1], strict=True)]
    return [{"input_ids": x} for x in ids]


def one_by_one(model: nn.Module, architecture: str, data: list[Any]) -> list[list[str]]:
    """Every weight a stage of its own, in the order of execution; an encoder before its decoder."""
    used = [name for name in collect(model, data) if name.startswith(BLOCKS[architecture])]
    if architecture == "mixtral":  # the reference sees both matrices of an expert before the expert is computed
        used.sort(key=lambda name: (int(name.split(".")[2]), "experts" in name, "down_proj" in name))
    return [[name] for name in used]


def check(dense: nn.Module, pruned: nn.Module, result, architecture: str, data: list[Any], **selection) -> None:
    stages = one_by_one(dense, architecture, data)
    seen = set()
    for name, weight, changed, inputs in staged(dense, pruned, data, stages):
        scores, tolerance = score_of(result.config.score, weight, inputs)
        # The routed tokens of an expert come in another order, and rounding with it.
        assert_mask(result.masks[name], scores, 1e-5 if "experts" in name else tolerance, **selection)
        assert torch.equal(changed, torch.where(result.masks[name], weight, 0)), name
        seen.add(name)
    unseen = set(result.masks) - seen
    assert unseen_in(result.notes) == unseen
    assert not unseen or architecture == "mixtral"


@pytest.mark.parametrize("architecture", BLOCKS)
def test_masks_equal_whole_model_passes_for_each_layer(tiny_model, architecture):
    model, data = tiny_model(architecture), samples(architecture)
    dense = copy.deepcopy(model)
    result = prune(model, data, PruningConfig(0.6, update="layer", micro_batch_size=1))
    assert result.update == "layer"
    assert architecture == "mixtral" or result.notes == []
    assert result.tokens == sum(LENGTHS)
    check(dense, model, result, architecture, data, sparsity=0.6)


@pytest.mark.parametrize(
    "settings",
    [
        {"score": "wanda_linf", "granularity": "layer"},
        {"score": "sparsegpt", "pattern": "2:4"},
        {"score": "magnitude", "swaps": 0, "granularity": "input"},
        {"score": "ria", "pattern": "2:4"},
    ],
    ids=lambda settings: settings["score"],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_other_scores_and_patterns(tiny_model, architecture, settings):
    model, data = tiny_model(architecture), samples(architecture)
    dense = copy.deepcopy(model)
    result = prune(model, data, PruningConfig(**settings, update="layer", micro_batch_size=1))
    selection = {key: settings[key] for key in ("granularity", "pattern") if key in settings}
    check(dense, model, result, architecture, data, **selection)


def test_bfloat16(tiny_model):
    model, data = tiny_model("llama").bfloat16(), samples()
    dense = copy.deepcopy(model)
    check(dense, model, prune(model, data, PruningConfig(update="layer", micro_batch_size=1)), "llama", data)


def test_layers_after_weights_that_changed_see_what_they_give_now(tiny_model):
    model, data = tiny_model("llama"), samples(lengths=(40, 30, 40))
    dense = copy.deepcopy(model)
    config = PruningConfig(update="layer", reconstruction="sequential", micro_batch_size=1)
    result = prune(model, data, config)
    result.masks.verify(model)
    for name, weight, changed, inputs in staged(dense, model, data, one_by_one(dense, "llama", data)):
        assert_mask(result.masks[name], *score_of("wanda", weight, inputs)[:1])
        assert result.layer_errors[name] == pytest.approx(reference_error(weight, changed, inputs), rel=0.01)
    assert torch.equal(matrix_of(dense, name), matrix_of(model, name))


def test_orders_differ_and_agree_where_they_must(tiny_model):
    masks = {
        order: prune(tiny_model("llama"), samples(), PruningConfig(update=order, micro_batch_size=1)).masks
        for order in ("block", "layer", "none")
    }
    first = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    for a, b in itertools.combinations(masks, 2):
        assert masks[a].digest() != masks[b].digest()
        assert all(torch.equal(masks[a][name], masks[b][name]) for name in first)


# One pass, however samples come


@pytest.mark.parametrize(("size", "batches"), [(1, 7), (2, 5), (3, 3), (8, 3)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_block_is_computed_once_for_each_micro_batch(tiny_model, architecture, size, batches):
    model, calls = tiny_model(architecture), Counter()
    names = [name for name in linear_layers(model) if name.startswith(BLOCKS[architecture])]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    result = prune(
        model,
        samples(architecture, (12, 12, 12, 9, 9, 9, 14)),
        PruningConfig(update="layer", micro_batch_size=size),
    )
    assert result.tokens == 77
    for name in names:  # how blocks hand on what they compute is found out with one sample
        assert calls[name] == batches + 1, name


def test_progress_counts_every_pass(tiny_model):
    steps: list[tuple[int, int]] = []
    prune(
        tiny_model("llama"),
        samples(),
        PruningConfig(update="layer", micro_batch_size=1),
        progress=lambda *step: steps.append(step),
    )
    total = 4 + 3 * 4 + 1
    assert steps == [(step, total) for step in range(1, total + 1)]


# Errors and interrupts


class OwnError(Exception):
    pass


def surroundings(model: nn.Module) -> tuple:
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m), m.training) for m in model.modules()
    ]
    return hooks, threading.active_count(), torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()


def assert_fails_cleanly(model: nn.Module, error: type[BaseException], **arguments) -> None:
    before, dense = surroundings(model), copy.deepcopy(model.state_dict())
    config = PruningConfig(update="layer", micro_batch_size=1, reconstruction=arguments.pop("reconstruction", None))
    with pytest.raises(error):
        prune(model, samples(), config, **arguments)
    assert surroundings(model) == before
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("reconstruction", [None, "sequential"])
@pytest.mark.parametrize("error", [OwnError, KeyboardInterrupt])
def test_whatever_ends_it_from_outside_leaves_the_model_dense_and_no_thread(tiny_model, error, reconstruction):
    model, total = tiny_model("llama"), 17
    for at in range(1, total + 1):

        def progress(done: int, total: int, at: int = at) -> None:
            if done == at:
                raise error

        assert_fails_cleanly(model, error, progress=progress, reconstruction=reconstruction)


@pytest.mark.parametrize("reconstruction", [None, "least_squares"])
@pytest.mark.parametrize("error", [OwnError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["model.layers.0.mlp", "model.layers.1.self_attn.o_proj", "model.layers.2"])
@pytest.mark.parametrize("call", [0, 2])
def test_whatever_ends_it_within_a_block_leaves_the_model_dense_and_no_thread(
    tiny_model, place, error, call, reconstruction
):
    model = tiny_model("llama")
    calls = itertools.count()
    skipped = 1 if ".0." in place else 0  # what a block returns is found out with one sample in the first

    def fail(*_: Any) -> None:
        if next(calls) == skipped + call:
            raise error

    model.get_submodule(place).register_forward_hook(fail)
    assert_fails_cleanly(model, error, reconstruction=reconstruction)
    assert next(calls) == skipped + call + 1


def test_a_real_interrupt_while_a_block_is_computed(tiny_model):
    """It comes to the main thread, which waits for the one that computes."""
    model, calls = tiny_model("llama"), itertools.count()

    def press(*_: Any) -> None:
        if next(calls) == 1:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.2)

    model.model.layers[1].mlp.register_forward_hook(press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    try:
        assert_fails_cleanly(model, KeyboardInterrupt)
    finally:
        signal.signal(signal.SIGINT, before)


# What is set around it


@pytest.mark.parametrize("inference", [False, True])
def test_autocast_reaches_into_the_blocks(tiny_model, inference):
    model, dtypes = tiny_model("llama"), set()
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, args, output: dtypes.add(output.dtype))
    dense = copy.deepcopy(model)
    data, config = samples(), PruningConfig(0.6, update="layer", micro_batch_size=1)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(inference):
        result = prune(model, data, config)
        assert torch.is_autocast_enabled("cpu")
    assert dtypes == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        check(dense, model, result, "llama", data, sparsity=0.6)
    assert result.masks.digest() != prune(tiny_model("llama"), data, config).masks.digest()


def test_gradients_stay_off_in_the_blocks(tiny_model):
    model, seen = tiny_model("llama"), set()
    model.model.layers[1].mlp.register_forward_hook(lambda m, args, output: seen.add(output.requires_grad))
    prune(model, samples(), PruningConfig(update="layer"))
    assert seen == {False}
    assert torch.is_grad_enabled()


# Models of other kinds


def test_adapters_are_left_alone_and_part_of_the_way(tiny_model):
    from peft import LoraConfig, get_peft_model

    config = PruningConfig(update="layer", micro_batch_size=1)
    bare = prune(tiny_model("llama"), samples(), config).masks
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=True)
    model = get_peft_model(tiny_model("llama"), lora)
    assert prune(model, samples(), config).masks.digest() == bare.digest()
    model = get_peft_model(tiny_model("llama"), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name}
    masks = prune(model, samples(), config).masks
    assert list(masks) == list(bare)
    assert masks.digest() != bare.digest()
    masks.verify(model)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in adapters.items())


class Twice(nn.Module):
    """A block in which two layers share a weight, and another one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.second(self.first(x).tanh()).tanh()
        return x + self.last(self.last(x).tanh())


def test_weights_that_are_used_again_are_pruned_at_their_first_use_and_named():
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.Sequential(Twice(), Twice())}).eval()
    model.forward = lambda x: model["blocks"](x)
    data = [torch.randn(1, 6, 8) for _ in range(3)]
    weight = model["blocks"][0].first.weight.detach().clone()
    result = prune(model, data, PruningConfig(update="layer", micro_batch_size=1))
    names = [f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in ("first", "last")]
    assert list(result.masks) == names
    assert len(result.notes) == 4
    assert all(any(f"{name} is used again" in note for note in result.notes) for name in names)
    assert_mask(result.masks[names[0]], *score_of("wanda", weight, [x[0] for x in data]))
    result.masks.verify(model)


def test_without_blocks_it_falls_back_to_one_pass_and_says_so():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    result = prune(model, [torch.randn(3, 8)], PruningConfig(update="layer"))
    assert result.update == "none"
    assert "update='none'" in result.notes[0]
