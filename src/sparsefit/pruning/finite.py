"""Looking for NaN and infinity, and telling where they come from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsefit.calibration.batches import MicroBatch
from sparsefit.errors import CalibrationError
from sparsefit.pruning.watch import Seen


def all_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite; without a temporary of their size.

    >>> all_finite(torch.tensor([1.0, torch.inf]))
    False
    """
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())


def check_finite(tokens: Tensor, seen: Seen, batch: MicroBatch) -> None:
    """Raise a CalibrationError that names the layer and the batch if some of its (tokens, in) inputs are not finite.

    >>> from sparsefit.pruning.layers import matrices_of
    >>> [weight], inputs = matrices_of(nn.Linear(2, 2)), torch.ones(3, 2)
    >>> check_finite(inputs, Seen(weight, None, inputs, 0, lambda: iter([inputs])), MicroBatch(inputs, origin=(0, 1)))
    """
    if all_finite(tokens.float().square()):
        return
    origin = batch.origin
    # The tokens of packed sequences come step by step, and those of an expert in an order of their own.
    packed = seen.inputs.ndim == 2 and isinstance(seen.weight.layers[0], nn.RNNBase)
    if seen.weight.index is None and not packed:
        finite = torch.cat([tokens.float().square().isfinite().all(dim=1) for tokens in seen.tokens()])
        if len(finite) % len(origin) == 0:
            samples = finite.view(len(origin), -1).all(dim=1).tolist()
            origin = [number for number, fine in zip(origin, samples, strict=True) if not fine][:1] or origin
    raise CalibrationError(
        f"the inputs of {seen.weight.name} are NaN or infinite in calibration batch "
        f"{' or '.join(map(str, dict.fromkeys(origin)))}. The model was left as it was; look at that batch, or run the "
        "model in float32 or bfloat16 if it overflows in float16"
    )
