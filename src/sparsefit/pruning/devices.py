"""What the device of a tensor can do."""

from __future__ import annotations

from functools import cache
from warnings import warn

import torch


def precise_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it; Apple's GPUs alone do not. Gram matrices of real activations have condition
    numbers of 1e5 and more even when damped: factoring them in float32 keeps two or three digits.

    >>> precise_dtype(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


@cache
def triton_works(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device, tried once for each. Where not, tensor operations do the same.

    >>> triton_works(torch.device("cpu"))
    False
    """
    if device.type != "cuda":
        return False
    try:
        from sparsefit.pruning.selection_kernels import n_of_m

        n_of_m(torch.ones(1, 4, device=device), None, 2, 4)
    except Exception as error:  # no Triton or C compiler, a GPU that is too old, ...: they have no common class
        warn(f"Triton does not work on {device} ({error}); slower tensor operations are used", stacklevel=2)
        return False
    return True
