"""The states of all global random number generators of a process, as a checkpoint takes them: noted and set back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

RandomStates = dict[str, Any]
"""Of torch (CPU and every CUDA device), numpy and Python at one moment: tensors and plain values."""


def random_states() -> RandomStates:
    """As they stand."""
    name, keys, *position = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *position],
        "python": [version, torch.from_numpy(np.array(words, dtype=np.int64)), gauss],
    }


def set_random_states(states: RandomStates) -> None:
    """Have all generators go on from there; devices that are not there are left out."""
    torch.set_rng_state(states["torch"].cpu())
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state.cpu(), device)
    name, keys, *position = states["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *position))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
