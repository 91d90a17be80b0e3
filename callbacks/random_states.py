"""The states of all global random number generators of a process: noted, set back, kept in a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomStates:
    """The global generators of torch (CPU and every CUDA device), numpy and Python at one moment."""

    torch: Tensor
    cuda: list[Tensor]
    numpy: tuple[Any, ...]
    python: tuple[Any, ...]

    @classmethod
    def now(cls) -> RandomStates:
        """As they stand."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())

    def set(self) -> None:
        """Have all generators go on from here; devices that are not there are left out."""
        torch.set_rng_state(self.torch)
        for device, state in enumerate(self.cuda[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def plain(self) -> dict[str, Any]:
        """As tensors and numbers, which load with `torch.load(weights_only=True)`."""
        name, keys, *numpy = self.numpy
        version, words, gauss = self.python
        return {
            "torch": self.torch,
            "cuda": self.cuda,
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *numpy],
            "python": [version, torch.tensor(words), gauss],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RandomStates:
        """What `plain` gave."""
        name, keys, *numpy = plain["numpy"]
        version, words, gauss = plain["python"]
        return cls(
            plain["torch"].cpu(),
            [state.cpu() for state in plain["cuda"]],
            (name, keys.cpu().numpy().astype(np.uint32), *numpy),
            (version, tuple(words.tolist()), gauss),
        )
