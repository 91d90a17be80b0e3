"""Looking for NaN and infinity, and telling where they come from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsefit.errors import CalibrationError
from sparsefit.pruning.calibration import MicroBatch
from sparsefit.pruning.watch import Seen


def all_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite; without a temporary of their size.

    >>> all_finite(torch.tensor([1.0, torch.inf]))
    False
    """
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())


def check_finite(tokens: Tensor, seen: Seen, batch: MicroBatch | None) -> None:
    """Check the (tokens, in) inputs of one weight.

    Raises:
        CalibrationError: naming the layer and the calibration batch.

    >>> from sparsefit.pruning.layers import matrices_of
    >>> [weight], inputs = matrices_of(nn.Linear(2, 2)), torch.ones(3, 2)
    >>> check_finite(inputs, Seen(weight, None, inputs, 0, lambda: iter([inputs]), None), batch=None)
    """
    if bool(tokens.float().square().isfinite().all()):
        return
    origin = batch.origin if batch is not None else ()
    samples = _finite_samples(seen, len(origin))
    if samples is not None:
        origin = tuple(number for number, fine in zip(origin, samples, strict=True) if not fine)[:1] or origin
    batches = " or ".join(map(str, dict.fromkeys(origin))) or "?"
    raise CalibrationError(
        f"the inputs of {seen.weight.name} are NaN or infinite in calibration batch {batches}. The model was left as "
        "it was; look at that batch, or run the model in float32 or bfloat16 if it overflows in float16"
    )


def _finite_samples(seen: Seen, count: int) -> list[bool] | None:
    """Of each sample whether all its tokens are finite; None where the samples do not come one after the other."""
    # The tokens of packed sequences come step by step, and those of an expert in an order of their own.
    if seen.weight.index is not None or (seen.inputs.ndim == 2 and isinstance(seen.weight.layers[0], nn.RNNBase)):
        return None
    finite = torch.cat([tokens.float().square().isfinite().all(dim=1) for tokens in seen.tokens()])
    return finite.reshape(count, -1).all(dim=1).tolist() if count and len(finite) % count == 0 else None
