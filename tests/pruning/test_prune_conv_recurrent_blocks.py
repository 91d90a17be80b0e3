"""`prune` block by block on networks of convolutions and recurrent layers: which blocks they have, and what is pruned
after them."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from conv_recurrent_networks import Pool, Residual, blocks_of, network, one_thread  # noqa: F401
from reference_inputs import spread_weights
from reference_products import check_model, gathered, images
from torch import Tensor, nn

from sparsefit import PruningConfig, prune
from sparsefit.pruning.blocks import find_block_lists


@pytest.mark.parametrize("selection", [{}, {"granularity": "layer", "sparsity": 0.6}])
@pytest.mark.parametrize(("name", "blocks"), [("resnext", "1"), ("recurrent blocks", "")])
def test_blocks_see_what_the_pruned_ones_before_them_give(name, blocks, selection):
    model, data = network(name)
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig(**selection))
    assert result.update == "block"
    assert not result.notes
    stages = blocks_of(dense, [blocks]) if blocks else [[n for n in result.masks if n[0] == digit] for digit in "01"]
    assert all(stages)
    check_model(dense, model, result, lambda model: gathered(model, [data]), stages, **selection)


def test_stages_that_keep_their_shape_are_run_one_by_one_and_the_others_come_after():
    model, data = network("resnet basic")
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig())
    assert result.update == "block"
    assert len(result.notes) == 1
    assert "shape of the hidden state" in result.notes[0]
    stages = blocks_of(dense, ["resnet.encoder.stages.0.layers"])
    stages.append([name for name in result.masks if ".stages.1." in name])
    check_model(dense, model, result, lambda model: gathered(model, [data]), stages)


@pytest.mark.parametrize("name", ["vgg", "mobile", "line", "resnet bottleneck", "lstm", "cells"])
def test_without_blocks_of_one_shape_it_takes_one_pass_and_says_so(name):
    model, data = network(name)
    other = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig())
    assert result.update == "none"
    assert len(result.notes) == 1
    assert "update='none'" in result.notes[0]
    assert result.masks.digest() == prune(other, [data], PruningConfig(update="none")).masks.digest()


@pytest.mark.parametrize(("widths", "lists"), [((8, 8), 1), ((8, 16), 2)])
def test_lists_in_a_list_are_stages_where_their_blocks_differ_in_width(widths, lists):
    stages = nn.Sequential(*(nn.Sequential(Residual(width), Residual(width)) for width in widths))
    assert [len(blocks) for blocks in find_block_lists(stages)] == [2] * lists
    assert find_block_lists(stages)[0][0] is (stages[0] if lists == 1 else stages[0][0])


def branches() -> nn.Module:
    """Each convolution has its normalisation and activation, some stand two in a row."""

    def layer(before: int, after: int, kernel: int) -> nn.Module:
        convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
        return nn.Sequential(convolution, nn.GroupNorm(1, after), nn.ReLU())

    class Branches(nn.Module):
        def __init__(self, before: int) -> None:
            super().__init__()
            self.one, self.two = layer(before, 8, 1), nn.Sequential(layer(before, 4, 1), layer(4, 8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.one(x), self.two(x)], dim=1)

    head = OrderedDict(pool=Pool(), head=nn.Linear(16, 5))
    return nn.Sequential(OrderedDict(stem=layer(3, 8, 3), first=Branches(8), second=Branches(16), **head))


def test_layers_in_a_row_are_no_repeated_blocks():
    model, data = spread_weights(branches()), images()
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig(update="none"))
    assert result.left_dense == {"head.weight": "output layer"}
    check_model(dense, model, result, lambda model: gathered(model, [data]))
