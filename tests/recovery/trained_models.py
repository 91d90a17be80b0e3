"""Pruned models after a few training steps, and snapshots of their weights."""

from __future__ import annotations

import torch

from sparsefit.recovery.mask_guard import MaskGuard

IDS = torch.randint(3, 61, (4, 9), generator=torch.Generator().manual_seed(0))


def train(model, masks, batch=None, steps=3, lr=0.05):
    """Train a few steps; pruned weights stay zero."""
    batch = {"input_ids": IDS} if batch is None else batch
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    guard = MaskGuard(masks)
    guard.watch(model, [optimizer])
    for _ in range(steps):
        outputs = model(**batch).logits if isinstance(batch, dict) else model(batch)
        outputs.float().log_softmax(-1)[..., 0].mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    guard.remove()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def bits(tensor):
    """A tensor's bytes, which distinguish -0.0 from 0.0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).clone()


def snapshot(model):
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
