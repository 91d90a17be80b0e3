"""Saving and restoring the states of all global random number generators of a process, in a form for checkpoints."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

RandomStates = dict[str, Any]
"""The states of torch (CPU and every CUDA device), numpy and Python: tensors and plain values."""


def random_states() -> RandomStates:
    """The current states."""
    name, keys, *position = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *position],
        "python": [version, torch.from_numpy(np.array(words, dtype=np.int64)), gauss],
    }


def set_random_states(states: RandomStates) -> None:
    """Restore the states; those of CUDA devices that this process does not have are skipped."""
    torch.set_rng_state(states["torch"].cpu())
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state.cpu(), device)
    name, keys, *position = states["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *position))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
