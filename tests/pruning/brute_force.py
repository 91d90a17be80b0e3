"""Computes Wanda's masks by brute force: whole passes of a model, one sample at a time, once for each block.

It shares nothing with the engine: what a weight is multiplied by is seen where ATen's own products are called, and the
masks come from a stable sort.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from reference_products import unfolded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

TOLERANCE = 1e-5  # scores that are nearer to each other may go either way, as sums of squares are rounded
aten = torch.ops.aten
FACTORS = {  # where the two matrices of a product stand among its arguments
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}


class SquaredInputs(TorchDispatchMode):
    """While active, adds up the squares of what each place of the watched parameters is multiplied by.

    Attributes:
        sums: By the parameter's name, in its own shape; NaN where nothing was.
        transposed: The parameters of which columns are the outputs, as they are stored.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        assert all(p.is_contiguous() for p in parameters.values())
        self._names = {p.untyped_storage().data_ptr(): name for name, p in parameters.items()}
        self._parameters = dict(parameters)
        self.sums = {name: torch.full_like(p, torch.nan, dtype=torch.float32) for name, p in parameters.items()}
        self.transposed: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in FACTORS:
            left, right = args[FACTORS[func] :][:2]
            if left.ndim == 3:
                for one, other in zip(left, right, strict=True):
                    self._see_product(one, other)
            else:
                self._see_product(left, right)
        elif func in (aten.mv.default, aten.addmv.default):
            matrix, vector = args[-2:]
            self._add(matrix, vector[None])
        elif func is aten.convolution.default:
            self._see_convolution(*args)
        return func(*args, **(kwargs or {}))

    def _see_product(self, left: Tensor, right: Tensor) -> None:
        self._add(right.t(), left)
        self._add(left, right.t())

    def _add(self, matrix: Tensor, tokens: Tensor) -> None:
        """Add the squares for an (out, in) matrix and (tokens, in) inputs."""
        name = self._names.get(matrix.untyped_storage().data_ptr())
        if name is None or not tokens.numel():
            return
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            self.transposed.add(name)
        offset = matrix.storage_offset() - self._parameters[name].storage_offset()
        place = self.sums[name].as_strided(matrix.shape, matrix.stride(), offset)
        place.copy_(place.nan_to_num(0) + tokens.float().square().sum(dim=0))

    def _see_convolution(self, image: Tensor, kernels: Tensor, bias: Any, stride: list, padding: list, *rest: Any):
        name = self._names.get(kernels.untyped_storage().data_ptr())
        if name is None:
            return
        dilation, transposed, _, groups = rest
        assert not transposed
        layer = SimpleNamespace(
            kernel_size=tuple(kernels.shape[2:]),
            stride=tuple(stride),
            dilation=tuple(dilation),
            groups=groups,
            padding_mode="zeros",
            _reversed_padding_repeated_twice=[size for size in reversed(padding) for _ in range(2)],
        )
        for place, tokens in zip(self.sums[name].chunk(groups), unfolded(layer, image), strict=True):
            place.copy_(place.nan_to_num(0) + tokens.float().square().sum(dim=0).view(place.shape[1:]))


class Comparison(NamedTuple):
    """Compares the masks of a pruning with those of the brute force.

    Attributes:
        bits: How many were compared.
        equal: How many of them are the same.
        wrong: The parameters with a bit that the rounding of a sum does not explain.
        unseen: Those whose inputs the brute force did not see, which are not compared.
    """

    bits: int
    equal: int
    wrong: tuple[str, ...]
    unseen: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The result in one word."""
        if self.wrong:
            return "no"
        return "yes" if not self.unseen else "not compared"


@torch.no_grad()
def compare(
    dense: nn.Module, pruned: nn.Module, result: Any, samples: Iterable[Mapping[str, Tensor]], blocks: Iterable[str]
) -> Comparison:
    """Compare the masks of Wanda at 50% per output with those from passes of a model that is pruned block by block.

    Args:
        dense: A copy from before the pruning; becomes the pruned model, block by block.
        pruned: The model after it.
        result: Of the pruning.
        samples: Each of batch size 1, without padding.
        blocks: The names of the lists of repeated blocks, in calling order.
    """
    samples, bits, equal, wrong, unseen = list(samples), 0, 0, [], []
    for names in stages(dense, result, blocks):
        parameters = {name: dense.get_parameter(name) for name in names}
        seen = squared_inputs(dense, parameters, samples)
        for name, parameter in parameters.items():
            by_magnitude = any(note.startswith(name) and "by magnitude" in note for note in result.notes)
            if bool(seen.sums[name].isnan().all()) and not by_magnitude:
                unseen.append(name)
                continue
            mask = result.masks.for_parameter(name, parameter)
            scores = parameter.float().abs() * _factors(seen.sums[name], by_magnitude).sqrt()
            if name in seen.transposed:
                mask, scores = mask.mT, scores.mT
            elif parameter.ndim > 2 and "[" not in result.masks.parameters[name][0]:  # a convolution
                mask, scores = mask.flatten(1), scores.flatten(1)
            same, fits = _rows_compared(mask.reshape(-1, mask.shape[-1]), scores.reshape(-1, scores.shape[-1]))
            bits, equal = bits + mask.numel(), equal + same
            wrong += [] if fits else [name]
        for name, parameter in parameters.items():
            parameter.copy_(pruned.get_parameter(name))
    return Comparison(bits, equal, tuple(wrong), tuple(unseen))


def _factors(sums: Tensor, by_magnitude: bool) -> Tensor:
    """The factors for the squares of the weights: 1 for experts without tokens."""
    if by_magnitude:
        nothing = sums.nan_to_num(0).flatten(1).sum(dim=1) == 0
        sums = torch.where(nothing.view(-1, *[1] * (sums.ndim - 1)), 1, sums)
    return sums


def _rows_compared(mask: Tensor, scores: Tensor) -> tuple[int, bool]:
    """The number of bits that equal those of a stable sort, and whether rounding explains the others."""
    count = scores.shape[1] // 2
    expected = torch.ones_like(mask)
    expected.scatter_(1, scores.argsort(dim=1, stable=True)[:, :count], False)
    fits = bool(((~mask).sum(dim=1) == count).all())
    if count:
        largest_gone = scores.masked_fill(mask, -1).amax(dim=1)
        fits &= bool((largest_gone <= scores.masked_fill(~mask, torch.inf).amin(dim=1) * (1 + TOLERANCE)).all())
    return int((mask == expected).sum()), fits


def squared_inputs(
    model: nn.Module, parameters: Mapping[str, Tensor], samples: Iterable[Mapping[str, Tensor]]
) -> SquaredInputs:
    """Run the model on one sample at a time, with experts one after another."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    seen = SquaredInputs(parameters)
    try:
        with seen if parameters else nullcontext():
            for sample in samples:
                model(**sample)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return seen


def stages(model: nn.Module, result: Any, blocks: Iterable[str]) -> list[list[str]]:
    """The parameters that are pruned from the same passes, in order: one block after another, then those outside of
    blocks."""
    names = list(result.masks.parameters)
    if result.update == "none":
        return [names]
    members = [f"{one}.{key}." for one in blocks for key, _ in model.get_submodule(one).named_children()]
    found = [[name for name in names if name.startswith(member)] for member in members]
    return [*found, [name for name in names if not any(name in stage for stage in found)]]
