"""Convolutions as matrices: each output position multiplies a patch of the input by the flattened kernels.

The matrix of a weight (out, channels, positions...) is `weight.flatten(1)`, (out, channels * positions): its columns go
channel by channel and, within one, kernel position by kernel position. With groups the rows of each group see the
patches of their own input channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefit.pruning.layers.base import Handler, PrunableWeight, See, is_dense

PIECE = 2**22
"""Approximate number of elements of patches that are copied at a time."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def matrices(module: nn.Module) -> list[PrunableWeight]:
    """The weight of a convolution, unless it is depthwise, transposed or uninitialized.

    >>> [(weight.name, weight.shape) for weight in matrices(nn.Conv2d(3, 8, kernel_size=3))]
    [('weight', (8, 27))]
    """
    if not isinstance(module, _CONVOLUTIONS) or is_depthwise(module) or not is_dense(module.weight):
        return []
    return [PrunableWeight("weight", module.weight, (module,))]


def is_depthwise(module: nn.Module) -> bool:
    """Whether this is a convolution with one input channel per output.

    >>> is_depthwise(nn.Conv2d(8, 8, kernel_size=3, groups=8))
    True
    """
    return isinstance(module, _CONVOLUTIONS) and 1 < module.groups == module.in_channels


def channels_side_by_side(weight: Tensor) -> Tensor | None:
    """The column order of an (out, channels, positions...) weight's matrix that puts the input channels of one kernel
    position next to each other; None if there is only one position.

    >>> channels_side_by_side(torch.zeros(8, 3, 2)).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    channels, positions = weight.shape[1], math.prod(weight.shape[2:])
    if positions == 1:
        return None
    return torch.arange(channels * positions, device=weight.device).view(channels, positions).t().flatten()


class _Geometry(NamedTuple):
    """The geometry of a convolution, for each spatial dimension."""

    kernel: tuple[int, ...]  # positions
    stride: tuple[int, ...]  # steps from one output to the next
    padding: tuple[tuple[int, int], ...]  # zeros before and after the input
    dilation: tuple[int, ...]  # steps from one position of the kernel to the next


def _geometry_of(call: Mapping[str, Any]) -> _Geometry:
    """The geometry from the arguments of F.conv1d, F.conv2d or F.conv3d."""
    kernel = tuple(call["weight"].shape[2:])

    def for_each(value: int | Sequence[int]) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * len(kernel) if len(values) == 1 else values

    dilation, padding = for_each(call["dilation"]), call["padding"]
    if padding == "same":  # of an odd number of zeros, the extra one is at the end
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        pairs = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pairs = tuple((zeros, zeros) for zeros in for_each(0 if padding == "valid" else padding))
    return _Geometry(kernel, for_each(call["stride"]), pairs, dilation)


def _patches(inputs: Tensor, geometry: _Geometry) -> Iterator[Tensor]:
    """The rows that a convolution's matrix multiplies, padding included: one for each output, in the outputs' order.

    The patches of a sample are many times as large as the sample, so they are made in pieces,
    (outputs, channels * positions), of whole samples or, if one is larger than PIECE, of some rows of outputs.
    """
    dims = len(geometry.kernel)
    windows = _windows(inputs if inputs.ndim == dims + 2 else inputs[None], geometry)
    features = windows.shape[1] * math.prod(geometry.kernel)
    rows, *rest = windows.shape[2 : 2 + dims]
    row = max(1, math.prod(rest) * features)
    for samples in windows.split(max(1, PIECE // max(1, rows * row))):
        for some in samples.split(max(1, min(rows, PIECE // row)), dim=2):
            # Feature by feature: neighbouring inputs are then copied together, several times as fast as patch by patch.
            order = (1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims))
            yield some.permute(order).reshape(features, -1).t()


def _windows(samples: Tensor, geometry: _Geometry) -> Tensor:
    """(samples, channels, outputs..., positions...): a view of the padded samples."""
    if any(map(any, geometry.padding)):
        samples = F.pad(samples, [zeros for pair in reversed(geometry.padding) for zeros in pair])
    dimensions = zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    for i, (positions, step, dilation) in enumerate(dimensions):
        samples = samples.unfold(2 + i, dilation * (positions - 1) + 1, step)[..., ::dilation]
    return samples


def _convolve(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], see: See) -> Any:
    call = {**_DEFAULTS, **dict(zip(_NAMES, args, strict=False)), **kwargs}
    inputs, weight, groups = call["input"], call["weight"], call["groups"]
    if see.holds(weight):
        geometry = _geometry_of(call)
        for group, rows in enumerate(weight.chunk(groups)):
            how = (geometry, group, groups)
            see(rows, inputs, partial(_tokens, inputs, *how), key=how)
    return function(*args, **kwargs)


def _tokens(inputs: Tensor, geometry: _Geometry, group: int, groups: int) -> Iterator[Tensor]:
    channels = -len(geometry.kernel) - 1
    own = inputs.detach().chunk(groups, dim=channels)[group]
    if math.prod(geometry.kernel) > 1:
        return _patches(own, geometry)
    # A kernel of one position steps over the padded image. Its inputs in the padding are zero and add nothing, so they
    # are left out: (positions, channels).
    steps = zip(geometry.padding, geometry.stride, strict=True)
    points = own[(..., *(slice(-zeros % step, None, step) for (zeros, _), step in steps))]
    return iter([points.movedim(channels, -1).reshape(-1, own.shape[channels])])


PRODUCTS: dict[Callable[..., Any], Handler] = {F.conv1d: _convolve, F.conv2d: _convolve, F.conv3d: _convolve}
"""The functions that nn.Conv1d, nn.Conv2d and nn.Conv3d call; torch.conv1d and so on are the same objects."""
