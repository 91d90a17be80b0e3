"""Fits on several ranks whose model is sharded (FSDP2), on a CPU: processes that talk over gloo.

Lightning's ModelParallelStrategy takes a CPU as it is, and no launcher of its own where the environment says that the
processes were made by someone else; so a test makes them, as torchrun would.
"""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a function in several processes, and return what it returns in each, rank by rank.

    Each costs some 8 s before it does anything, so a fixture (`scope="module"`) makes them once and has one function
    do all the fits that its tests look at: the process group of the first fit serves those after it.

    Args:
        ranks: How many processes.
        function: Of a module, by name: the processes import it. Trainers in it take `sharded(ranks)`, or
            `{"strategy": "ddp", "devices": ranks}`.
        *args: What it is called with.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (ranks, port, folder, function, args), nprocs=ranks)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result = function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))


def sharded(ranks: int, **settings: Any) -> dict[str, Any]:
    """What a Trainer on so many ranks takes, to shard its model; a rank that waits for others gives up after 2 min."""
    settings = {"timeout": timedelta(seconds=120), "save_distributed_checkpoint": False} | settings
    strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, **settings)
    return {"accelerator": "cpu", "devices": ranks, "strategy": strategy}


class ShardsItself:
    """Stands before LightningModule among the bases of a module: shards `model`, each of its `blocks` and the rest."""

    def configure_model(self) -> None:
        if any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached; of a sharded one on all ranks, which must ask together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module, whole, by name."""
    return {name: whole(parameter) for name, parameter in module.named_parameters()}
