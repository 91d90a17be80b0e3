"""Snapshots of a model's state, which pruning must restore."""

from __future__ import annotations

import torch
from torch import nn


def sequences(count: int, length: int = 7) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 61, (count, 1, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row} for row in ids]


def state(model: nn.Module) -> dict:
    """The state that pruning must restore: flags, hooks, replaced attributes, settings."""
    return {
        name: (
            module.training,
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            "forward" in vars(module),
            vars(module).get("forward"),
            getattr(getattr(module, "config", None), "use_cache", None),
            [p.requires_grad for p in module.parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal bit for bit, including NaN."""
    as_bits = {torch.float32: torch.int32}
    return all(
        torch.equal(
            a[k].view(as_bits.get(a[k].dtype, a[k].dtype)), b[k].view_as(a[k]).view(as_bits.get(a[k].dtype, a[k].dtype))
        )
        for k in a
    )


class OwnError(Exception):
    """Raised by a test."""


def at_the_end(done: int, total: int) -> None:
    """Raises an error after all weights are pruned."""
    if done == total:
        raise OwnError
