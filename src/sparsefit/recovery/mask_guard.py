"""Keeps pruned weights at zero during training."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsefit.bare_model import canonical_name
from sparsefit.pruning import MaskSet
from sparsefit.pruning.masks import pack_bits, unpack_bits
from sparsefit.recovery.gather_shards import own_part
from sparsefit.sharded import is_sharded, reshard, shard_of


class MaskGuard:
    """Keeps pruned weights of trained parameters at exactly zero, with any optimizer.

    Gradients are masked when they are computed, so momentum, second moments and gradient clipping see only the kept
    weights. Pruned weights are also set to zero after every optimizer step, so that neither older optimizer state nor
    weight decay can change them. Frozen parameters are not guarded; a parameter that is unfrozen is guarded from the
    next step on. The guard needs one bit per weight, unpacked on the weight's device when needed. If a parameter is
    sharded, each rank guards its shard.

    Args:
        masks: The masks of a model.
    """

    def __init__(self, masks: MaskSet) -> None:
        self.masks = masks
        self._frozen: dict[nn.Parameter, str] = {}
        self._pruned: dict[nn.Parameter, Tensor] = {}  # bits, 1 = pruned, in the parameter's layout
        self._optimizers: list[Optimizer] = []
        self._zeroing: set[int] = set()  # ids of optimizers with a post-step hook that calls `_zero`
        self._handles: list[RemovableHandle] = []

    def watch(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> int:
        """Guard every masked parameter of a model that requires a gradient now or before a later optimizer step. May
        be called again, for instance when parameters were replaced.

        Returns:
            How many parameters are guarded now.
        """
        reshard(model)  # the optimizer trains the shards
        named = {canonical_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
        masked = {named[name]: name for name in self.masks.parameters if name in named}
        self._frozen = {parameter: name for parameter, name in masked.items() if parameter not in self._pruned}
        for optimizer in optimizers:
            if not any(optimizer is known for known in self._optimizers):
                self._optimizers.append(optimizer)
                self._handles.append(optimizer.register_step_pre_hook(lambda *_: self._guard_unfrozen()))
        self._guard_unfrozen()
        return len(self._pruned)

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._frozen.clear()
        self._pruned.clear()
        self._optimizers.clear()
        self._zeroing.clear()

    def _guard_unfrozen(self) -> None:
        for parameter in [parameter for parameter in self._frozen if parameter.requires_grad]:
            kept = self.masks.for_parameter(self._frozen.pop(parameter), parameter)
            bits = self._pruned[parameter] = pack_bits(~own_part(kept, parameter)).to(parameter.device)
            if is_sharded(parameter):  # FSDP2 sets gradients outside autograd, and calls only this kind of hook
                hook = parameter.register_post_accumulate_grad_hook(partial(_mask_gradient, bits=bits))
            else:
                hook = parameter.register_hook(partial(_without, bits=bits))
            self._handles.append(hook)
            if parameter.grad is not None:
                _mask_gradient(parameter, bits)
        for optimizer in self._optimizers if self._pruned else ():
            if id(optimizer) not in self._zeroing:
                self._zeroing.add(id(optimizer))
                self._handles.append(optimizer.register_step_post_hook(lambda *_: self._zero()))

    @torch.no_grad()
    def _zero(self) -> None:
        for parameter, bits in self._pruned.items():
            _set_to_zero(shard_of(parameter), bits)


def _mask_gradient(parameter: nn.Parameter, bits: Tensor) -> None:
    _set_to_zero(shard_of(parameter.grad), bits)


def _set_to_zero(values: Tensor, bits: Tensor) -> None:
    values.masked_fill_(unpack_bits(bits, tuple(values.shape), values.device), 0)


def _without(gradient: Tensor, bits: Tensor) -> Tensor:
    """A copy of a gradient with zeros for the pruned weights."""
    return gradient.masked_fill(unpack_bits(bits, tuple(gradient.shape), gradient.device), 0)
