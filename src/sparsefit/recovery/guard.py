"""Keeping pruned weights at zero while they are trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsefit.pruning import MaskSet
from sparsefit.pruning.naming import canonical_name


class MaskGuard:
    """Holds the pruned weights that train at exactly zero, whatever the optimizer does.

    Their gradients are masked as they arise, so that momentum, second moments and the clipped norm see the
    kept weights only; and they are set to zero after every optimizer step, so that state from before the
    pruning or weight decay cannot bring one back. Frozen weights are left alone: nothing runs for them.

    Args:
        masks: The masks of a model.
    """

    def __init__(self, masks: MaskSet) -> None:
        self.masks = masks
        self._pruned: dict[nn.Parameter, Tensor] = {}  # True = pruned, in the parameter's layout
        self._guarded_optimizers: set[int] = set()
        self._handles: list[RemovableHandle] = []

    def watch(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> int:
        """Guard every masked parameter of a model that requires a gradient. May be called again, as when
        parameters are unfrozen later.

        Returns:
            How many parameters are guarded now.
        """
        named = {canonical_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
        for name in self.masks.parameters:
            parameter = named.get(name)
            if parameter is not None and parameter.requires_grad and parameter not in self._pruned:
                pruned = ~self.masks.for_parameter(name, parameter)
                self._pruned[parameter] = pruned
                self._handles.append(parameter.register_hook(lambda grad, gone=pruned: grad.masked_fill(gone, 0)))
        for optimizer in optimizers if self._pruned else ():
            if id(optimizer) not in self._guarded_optimizers:
                self._guarded_optimizers.add(id(optimizer))
                self._handles.append(optimizer.register_step_post_hook(lambda *_: self._zero()))
        return len(self._pruned)

    def remove(self) -> None:
        """Take all hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._pruned.clear()
        self._guarded_optimizers.clear()

    @torch.no_grad()
    def _zero(self) -> None:
        for parameter, pruned in self._pruned.items():
            parameter.masked_fill_(pruned, 0)
