"""`prune` on plain torch modules: how blocks are found and called, and what makes it fall back to one pass."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from reference import reference_mask, reference_scores
from reference_inputs import squared_input_norms
from torch import nn
from torch.nn.utils import parametrizations

from sparsefit import PruningConfig, collect_statistics, prune, prune_from_statistics

WIDTH = 12


class Output(NamedTuple):
    hidden: torch.Tensor
    extra: int = 0


FORMS = {
    "tensor": lambda hidden: hidden,
    "tuple": lambda hidden: (hidden, None),
    "list": lambda hidden: [hidden],
    "namedtuple": Output,
    "mapping": lambda hidden: OrderedDict(hidden=hidden),
}


def content(output):
    if isinstance(output, dict):
        return output["hidden"]
    return output if isinstance(output, torch.Tensor) else output[0]


class Block(nn.Module):
    """Two linear layers around a non-linearity, added to what comes in: out of place or in place."""

    def __init__(self, form: str = "tensor", in_place: bool = False):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.form, self.in_place = FORMS[form], in_place

    def forward(self, x, scale=1.0):
        change = self.down(self.up(x).tanh()) * scale
        return self.form(x.add_(change) if self.in_place else x + change)


class Tower(nn.Module):
    """Blocks in a row, each called with an argument of its own; `by_name` calls them with keywords alone."""

    def __init__(self, blocks, by_name: bool = False, between=None):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(WIDTH, WIDTH), nn.ModuleList(blocks), nn.Linear(WIDTH, 3)
        self.by_name, self.between = by_name, between or (lambda hidden: hidden)

    def forward(self, x):
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            scale = torch.tensor(index + 0.5)
            x = content(block(scale=scale, hidden_states=x) if self.by_name else block(x, scale=scale))
            x = self.between(x)
        return self.head(x)


class NamedBlock(Block):
    def forward(self, hidden_states, scale):
        return super().forward(hidden_states, scale)


def seeded(make, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make().eval()


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, 5, WIDTH, generator=generator) for _ in range(count)]


def expected_masks(model: nn.Module, data, stages: list[list[str]]) -> dict[str, np.ndarray]:
    model, masks = copy.deepcopy(model), {}
    for names in stages:
        layers = {name: model.get_submodule(name) for name in names}
        norms = squared_input_norms(lambda x, use_cache: model(x.clone()), [{"x": x} for x in data], layers)
        for name, layer in layers.items():
            mask = reference_mask(reference_scores(layer.weight.detach().numpy(), norms[name]))
            masks[f"{name}.weight"] = mask
            layer.weight.data.mul_(torch.from_numpy(mask))
    return masks


BY_BLOCK = [[f"blocks.{i}.{name}" for name in ("up", "down")] for i in range(3)]


def check(model: nn.Module, stages: list[list[str]], update: str, note: str | None, config=None):
    data = batches()
    expected = expected_masks(model, data, stages)
    result = prune(model, data, config or PruningConfig(micro_batch_size=1))
    assert result.update == update
    assert [note in text for text in result.notes] == [True] if note else not result.notes
    assert list(result.masks) == list(expected)
    for name, mask in expected.items():
        np.testing.assert_array_equal(result.masks[name].numpy(), mask, err_msg=name)
    return result


@pytest.mark.parametrize("in_place", [False, True], ids=["out-of-place", "in-place"])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_may_return_their_state_in_any_form(form, in_place):
    model = seeded(lambda: Tower([Block(form, in_place) for _ in range(3)]))
    check(model, BY_BLOCK, "block", None)


def test_blocks_may_be_called_by_keywords_alone():
    check(seeded(lambda: Tower([NamedBlock() for _ in range(3)], by_name=True)), BY_BLOCK, "block", None)


def test_sequential_of_blocks():
    model = seeded(lambda: nn.Sequential(OrderedDict(blocks=nn.Sequential(Block(), Block(), Block()))))
    check(model, BY_BLOCK, "block", None)


def no_blocks() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 20), nn.ReLU(), nn.Linear(20, WIDTH))


class TwoPasses(Tower):
    def forward(self, x):
        return super().forward(x) + super().forward(-x)


class Backwards(Tower):
    def forward(self, x):
        for block in reversed(self.blocks):
            x = block(x)
        return x


ALL = [[name for stage in BY_BLOCK for name in stage]]


@pytest.mark.parametrize(
    ("make", "stages", "note"),
    [
        (no_blocks, [["0"]], "no repeated blocks"),
        (lambda: Tower([Block() for _ in range(3)], between=lambda x: x * 2), ALL, "between blocks 0 and 1"),
        (lambda: Tower([Block() for _ in range(3)], between=lambda x: x.mul_(2)), ALL, "between blocks 0 and 1"),
        (lambda: TwoPasses([Block() for _ in range(3)]), ALL, "more than once"),
        (lambda: Backwards([Block() for _ in range(3)]), ALL, "after the last"),
        (lambda: Tower([Block()] * 3), [BY_BLOCK[0]], "more than once"),
    ],
    ids=["no blocks", "scaled between", "scaled in place", "two passes", "backwards", "shared block"],
)
def test_models_that_cannot_be_run_one_by_one_are_pruned_in_one_pass_with_a_note(make, stages, note):
    check(seeded(make), stages, "none", note)


def test_a_weight_that_blocks_share_counts_the_inputs_of_all_of_them():
    model, data = seeded(lambda: Tower([Block() for _ in range(3)])), batches()
    model.blocks[2].up.weight = model.blocks[0].up.weight
    layers = {"first": model.blocks[0].up, "last": model.blocks[2].up}
    norms = squared_input_norms(lambda x, use_cache: model(x), [{"x": x} for x in data], layers)
    scores = reference_scores(layers["first"].weight.detach().numpy(), norms["first"] + norms["last"])
    result = prune(model, data, PruningConfig(micro_batch_size=1))
    assert any("share the weight" in note for note in result.notes)
    assert result.tokens == 2 * 15
    assert "blocks.2.up.weight" not in result.masks
    np.testing.assert_array_equal(result.masks["blocks.0.up.weight"].numpy(), reference_mask(scores))


def test_one_block_under_several_places_counts_each_use_once():
    assert prune(seeded(lambda: Tower([Block()] * 3)), batches()).tokens == 3 * 15


class Towers(nn.Module):
    """Two towers, one behind the other, of which one computes something between its blocks."""

    def __init__(self, odd: str):
        super().__init__()
        between = {odd: lambda x: x * 2}
        self.first = Tower([Block() for _ in range(2)], between=between.get("first"))
        self.second = Tower([Block() for _ in range(2)], between=between.get("second"))

    def forward(self, x):
        for tower in (self.first, self.second):
            for block in tower.blocks:
                x = tower.between(block(x))
        return x


@pytest.mark.parametrize("odd", ["first", "second"])
def test_blocks_that_cannot_be_run_one_by_one_are_pruned_after_the_others(odd):
    by_block = {
        tower: [[f"{tower}.blocks.{i}.{name}" for name in ("up", "down")] for i in (0, 1)]
        for tower in ("first", "second")
    }
    odd_one = [[name for block in by_block.pop(odd) for name in block]]
    (others,) = by_block.values()
    note = "between blocks 0 and 1; these blocks are pruned after the others, from one pass of the data"
    check(seeded(lambda: Towers(odd)), others + odd_one, "block", note)


@pytest.mark.parametrize("odd", ["first", "second"])
def test_blocks_that_cannot_be_run_one_by_one_get_dense_inputs_with_update_none(odd):
    model, config = seeded(lambda: Towers(odd)), PruningConfig(score="sparsegpt", update="none", micro_batch_size=1)
    statistics = collect_statistics(model, batches(), [config])
    expected = prune_from_statistics(copy.deepcopy(model), statistics, config).masks
    result = prune(model, batches(), config)
    assert result.update == "none"
    assert result.notes == []
    assert {name: mask.tolist() for name, mask in result.masks.items()} == {
        name: mask.tolist() for name, mask in expected.items()
    }


def test_inputs_changed_in_place_between_two_layers_are_seen_as_they_are():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            x = x.clone()
            first = self.a(x)
            return first + self.b(x.mul_(torch.arange(WIDTH)))

    check(seeded(Pair), [["a", "b"]], "none", None, PruningConfig(update="none", micro_batch_size=1))


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("update", ["block", "none"])
def test_fused_path_of_transformer_encoder_does_not_hide_inputs(padded, update):
    def make():
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True)
        return nn.TransformerEncoder(layer, 3, enable_nested_tensor=True)

    model = seeded(make)
    data = {"src": torch.cat(batches(4))}
    if padded:
        data["src_key_padding_mask"] = torch.arange(5).expand(4, 5) >= torch.tensor([[5], [4], [3], [5]])
    fused = torch.backends.mha.get_fastpath_enabled()
    result = prune(copy.deepcopy(model), [data], PruningConfig(update=update))
    assert torch.backends.mha.get_fastpath_enabled() == fused
    assert result.notes == []
    assert result.update == update
    own = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert sorted(result.masks) == sorted(f"layers.{i}.{name}" for i in range(3) for name in own)
    assert result.left_dense == {}
    if update == "none" and not padded:
        layers = {
            f"layers.{i}.linear{j}": model.get_submodule(f"layers.{i}.linear{j}") for i in range(3) for j in (1, 2)
        }
        norms = squared_input_norms(lambda src, use_cache: model(src), [data], layers)
        for name, layer in layers.items():
            expected = reference_mask(reference_scores(layer.weight.detach().numpy(), norms[name]))
            np.testing.assert_array_equal(result.masks[f"{name}.weight"].numpy(), expected)


def test_weights_computed_by_a_parametrization_are_not_pruned_in_vain():
    model = seeded(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)))
    result = prune(model, [torch.randn(3, 4)])
    assert list(result.masks) == ["1.weight"]
    assert any(name.startswith("0.") for name in result.left_dense)
    result.masks.verify(model)


def test_own_forward_is_used_with_batches_of_any_form():
    seen = []
    model = seeded(lambda: Tower([Block() for _ in range(3)]))

    def forward(batch):
        seen.append(batch["label"])
        return model(batch["pixels"])

    data = [{"pixels": x, "label": torch.tensor([i])} for i, x in enumerate(batches())]
    expected = expected_masks(model, batches(), BY_BLOCK)
    result = prune(model, data, PruningConfig(micro_batch_size=1), forward=forward)
    assert seen
    for name, mask in expected.items():
        np.testing.assert_array_equal(result.masks[name].numpy(), mask)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_is_no_tensor_stays_with_its_samples(size):
    model = seeded(no_blocks)
    data = torch.cat(batches(6))
    pairs = set()

    def forward(batch):
        pairs.update(zip(batch["x"][:, 0, 0].tolist(), batch["names"], strict=True))
        return model(batch["x"])

    cut = [{"x": data[i : i + size], "names": list("abcdef")[i : i + size]} for i in range(0, 6, size)]
    prune(model, cut, PruningConfig(micro_batch_size=4), forward=forward)
    assert pairs == set(zip(data[:, 0, 0].tolist(), "abcdef", strict=True))


def test_default_config_is_half_of_wanda_per_output():
    result = prune(seeded(no_blocks), batches())
    assert result.masks.sparsity == 0.5
    assert (result.config.score, result.config.granularity) == ("wanda", "output")
    assert result.seconds > 0
