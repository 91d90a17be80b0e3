"""Several processes that communicate with gloo, for tests of runs on several devices.

The processes are forked from a server that has imported the libraries once (`multiprocessing`'s forkserver): a spawned
process takes some 6 s before it does anything, a forked one none, and no thread or state of the tests is in it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

multiprocessing.set_forkserver_preload(["preloaded"])


def forking() -> ForkServerContext:
    """The context of processes that are forked from the server; starts the server if it does not run."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]  # the server has no other `sys.path`
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths))):
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a function in several processes. Returns its results, rank by rank.

    Args:
        ranks: How many processes.
        function: Of a module, by name: the processes import it. Trainers in it take `ddp(ranks)` or
            `sharded_fits.sharded(ranks)`; without a trainer, `torch.distributed.init_process_group("gloo")`
            makes the group. The group of the first fit serves those after it.
        *args: What it is called with; each process has a copy.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forking()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, port, folder, pickle.dumps((function, args)))
        torch.multiprocessing.start_processes(_rank, arguments, nprocs=ranks, start_method="forkserver")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, folder: str, task: bytes) -> None:
    # As torchrun would tell them, so that Lightning takes the processes as they are.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.modules["matplotlib"] = None  # reports without figures, as in most tests
    function, args = pickle.loads(task)
    result = function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))


def ddp(ranks: int) -> dict[str, Any]:
    """Settings of a Trainer in a function of `on_ranks`, to train with a number of ranks."""
    return {"accelerator": "cpu", "devices": ranks, "strategy": "ddp"}
