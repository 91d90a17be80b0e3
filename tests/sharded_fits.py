"""Fits whose model is sharded (FSDP2) over several ranks, on a CPU: see `ranks.on_ranks`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def sharded(ranks: int, **settings: Any) -> dict[str, Any]:
    """Settings of a Trainer that shards its model over a number of ranks; ranks wait at most 2 min for each other."""
    settings = {"timeout": timedelta(seconds=120), "save_distributed_checkpoint": False} | settings
    strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, **settings)
    return {"accelerator": "cpu", "devices": ranks, "strategy": strategy}


class ShardsItself:
    """A base class before LightningModule that shards `model`: each of its `blocks`, and the rest."""

    def configure_model(self) -> None:
        if any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A whole tensor, detached. For a sharded tensor, all ranks must call this together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """The whole parameters of a module, by name."""
    return {name: whole(parameter) for name, parameter in module.named_parameters()}
