"""Small pruned models to reconstruct, and snapshots of their state."""

from __future__ import annotations

import torch
from torch import nn

from sparsefit import PruningConfig, prune
from sparsefit.recovery.block_reconstruction import dense_weights

IDS = torch.randint(3, 61, (6, 9), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS}]


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).clone()


def snapshot(model):
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def changed(model, before):
    return {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, before[name])}


def pruned(model, batches=BATCHES, **settings):
    """Prune a model. Returns its dense weights and its masks."""
    dense = dense_weights(model)
    return dense, prune(model, batches, PruningConfig(**settings)).masks


def state(model):
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: (p.requires_grad, p.dtype, p.grad is None) for name, p in model.named_parameters()}
    return modes, flags, {name: bits(b) for name, b in model.named_buffers()}


def assert_state(model, expected):
    modes, flags, buffers = state(model)
    assert modes == expected[0]
    assert flags == expected[1]
    assert buffers.keys() == expected[2].keys()
    assert all(torch.equal(buffers[name], expected[2][name]) for name in buffers)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.norm, self.down = (
            nn.Linear(width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x):
        return x + self.down(torch.tanh(self.norm(self.up(x))))


class Net(nn.Module):
    def __init__(self, block=Block, blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(block(8) for _ in range(blocks))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
