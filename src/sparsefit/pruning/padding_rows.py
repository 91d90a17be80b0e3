"""Which rows of a weight's inputs are padding, by the mask of the sequences that they are of."""

from __future__ import annotations

import math

from torch import Tensor, nn

from sparsefit.calibration.padding_masks import PaddingMask
from sparsefit.pruning.watch import Seen


def real_rows(mask: PaddingMask, seen: Seen) -> Tensor | str | None:
    """Which of the rows that a weight multiplies are no padding, in their order.

    Returns:
        (tokens,) bool; None if the inputs are none of the mask's sequences; a word for why it cannot be told.

    >>> import torch
    >>> from sparsefit.pruning.layers import matrices_of
    >>> [weight], mask = matrices_of(nn.Linear(4, 4)), torch.tensor([[True, False], [True, True]])
    >>> seen = Seen(weight, None, torch.ones(2, 2, 4), 0, lambda: iter(()), None)
    >>> real_rows(PaddingMask(mask, mask), seen)
    tensor([ True, False,  True,  True])
    """
    real, layer, inputs = mask.real, seen.weight.layers[0], seen.inputs
    if seen.weight.index is not None:
        return "experts get tokens in an order of their own"
    if isinstance(layer, nn.RNNBase | nn.MultiheadAttention):  # these give theirs sequence by sequence
        return real.flatten() if inputs.ndim == 3 and inputs.shape[:2] in (real.shape, real.t().shape) else None
    if seen.weight.view.ndim > 2:  # (batch, channels, positions)
        lead = (inputs.shape[0], *inputs.shape[2:])
        return real.flatten() if lead == real.shape else "of a signal" if mask.of_signal else None
    lead = tuple(inputs.shape[:-1])
    if mask.of_signal and len(lead) == 2 and lead[0] == len(real) and real.shape[1] % lead[1] == 0:
        real = real[:, :: real.shape[1] // lead[1]]  # as a convolution of that stride goes over them
    return _expanded(real, lead, mask)


def _expanded(real: Tensor, lead: tuple[int, ...], mask: PaddingMask) -> Tensor | str | None:
    """A (batch, sequence) mask for inputs (*lead, in)."""
    (batch, length), total = real.shape, real.numel()
    by_step = lead[:2] == (length, batch)
    if by_step and (mask.seq_first or lead[:2] != (batch, length)):
        return _spread(real.t(), lead, (0, 1))
    if len(lead) > 1 and lead[0] == batch and length in lead[1:]:
        return _spread(real, lead, (0, lead.index(length, 1)))
    if math.prod(lead) == total:
        return (real.t() if mask.seq_first and len(lead) == 1 else real).flatten()
    if mask.of_signal:
        return "several samples of a signal make one state"
    if len(lead) == 1 and lead[0] < total and lead[0] not in (batch, int(real.sum())):
        return "only some tokens come"
    return None


def _spread(real: Tensor, lead: tuple[int, ...], places: tuple[int, int]) -> Tensor:
    shape = [size if place in places else 1 for place, size in enumerate(lead)]
    return real.reshape(shape).expand(lead).flatten()
