"""The Gram matrix G = X X^T of a layer's inputs: scaling, Cholesky factors, and the reconstruction error.

A layer's error ||(W' - W) X||_F^2 over the calibration tokens is a sum over rows, one for each output, and depends on
X through G alone. The products of a micro-batch are summed in float32: if less than `RESOLUTION` of an input's power is
independent of the other inputs, the remainder is rounding noise, and dividing by it would fit weights to that noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefit.errors import CalibrationError

RESOLUTION = torch.finfo(torch.float32).eps


def precise_dtype(device: torch.device) -> torch.dtype:
    """float64 on devices that have it, which are all but Apple's GPUs. Gram matrices of real activations have condition
    numbers of 1e5 and more even when damped: factoring them in float32 keeps two or three digits.

    >>> precise_dtype(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


def unit_gram(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale G to a mean diagonal of one, with ones on the diagonal for dead inputs (zero in every token).

    Returns G in `precise_dtype`, the scale it was divided by, (), and which inputs are dead, (in,) bool. Raises a
    CalibrationError if the matrix is not finite.

    >>> unit_gram(torch.diag(torch.tensor([4.0, 0.0])))[0].tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """
    diagonal = gram.diagonal()
    dead = diagonal == 0
    scale = diagonal.to(precise_dtype(gram.device)).mean()
    scale = torch.where(scale > 0, scale, 1)
    unit = gram.to(scale.dtype) / scale
    if not unit.sum().isfinite():
        raise CalibrationError(
            "the Gram matrix of the inputs is not finite: some activations are infinite or NaN; "
            "load the model in bfloat16 or float32 instead of float16, and check the calibration data"
        )
    unit.diagonal()[dead] = 1
    return unit, scale, dead


def cholesky(systems: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors of (..., n, n) systems, and whether each can be relied on: (...) bool.

    >>> cholesky(torch.ones(2, 2))[1]
    tensor(False)
    """
    lower, info = torch.linalg.cholesky_ex(systems)
    left = lower.diagonal(dim1=-2, dim2=-1).square()  # the part of each input's power that earlier ones do not explain
    power = systems.diagonal(dim1=-2, dim2=-1)
    return lower, (info == 0) & (left > RESOLUTION * power).all(dim=-1)  # False for NaN


def next_damping(damping: float) -> float:
    """The damping to try after one that was too small; both are shares of the diagonal's mean.

    >>> next_damping(0.0), next_damping(0.01)
    (1e-06, 0.1)
    """
    return max(damping * 10, 1e-6)


def reconstruction_error(weight: Tensor, changed: Tensor, gram: Tensor) -> Tensor:
    """(w' - w) G (w' - w)^T of each row w of the dense (out, in) weights and w' of the changed ones: (out,) in
    `precise_dtype`.

    >>> reconstruction_error(torch.ones(1, 2), torch.zeros(1, 2), torch.eye(2))
    tensor([2.], dtype=torch.float64)
    """
    dtype = precise_dtype(gram.device)
    difference = changed.to(dtype) - weight.to(dtype)
    return ((difference @ gram.to(dtype)) * difference).sum(dim=1).clamp_min_(0)
