from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsefit import PruningConfig, prune
from sparsefit.errors import MaskError
from sparsefit.recovery.mask_guard import MaskGuard

OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.002, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
    "adam with l2": lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.1, foreach=True),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3),
}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 2))


def pruned():
    net = model()
    return net, prune(net, [torch.randn(20, 8)], PruningConfig(targets=("0", "2"))).masks


def train(net, optimizer, steps=4):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - 1).square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("trained_before", [False, True])
def test_no_optimizer_brings_a_weight_back(name, trained_before):
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters())
    if trained_before:  # its state remembers dense gradients
        train(net, optimizer)
    masks = prune(net, [torch.randn(20, 8)], PruningConfig(targets=("0", "2"))).masks
    before = copy.deepcopy(net)
    guard = MaskGuard(masks)
    assert guard.watch(net, [optimizer]) == 2
    train(net, optimizer)
    masks.verify(net)
    for layer, was in ((net[0], before[0]), (net[2], before[2])):
        kept = was.weight != 0
        assert (layer.weight[kept] != was.weight[kept]).float().mean() > 0.9
    guard.remove()
    train(net, optimizer, steps=1)
    with pytest.raises(MaskError):
        masks.verify(net)


def test_gradients_of_pruned_weights_do_not_count_in_the_norm():
    net, masks = pruned()
    MaskGuard(masks).watch(net, [])
    net(torch.ones(3, 8)).sum().backward()
    net(torch.ones(3, 8)).sum().backward()  # accumulated
    for name in masks:
        gradient = net.get_parameter(name).grad
        assert (gradient[~masks[name]] == 0).all()
        assert (gradient[masks[name]] != 0).any()


def test_frozen_weights_cost_nothing_until_they_train():
    net, masks = pruned()
    optimizer = OPTIMIZERS["momentum"](net.parameters())
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    guard = MaskGuard(masks)
    assert guard.watch(net, [optimizer]) == 0
    net[2].requires_grad_(True)
    assert guard.watch(net, [optimizer]) == 1
    assert guard.watch(net, [optimizer]) == 1
    train(net, optimizer)
    masks.verify(net)
    assert (net[2].weight == 0).float().mean() == 0.5
