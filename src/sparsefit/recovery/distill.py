"""Distillation from the dense model, whose logits are computed in the sparse model with the removed values restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsefit.errors import ConfigError
from sparsefit.pruning.masks import pack_bits
from sparsefit.pruning.undo import Removed
from sparsefit.recovery.export import adapted_part
from sparsefit.recovery.gather_shards import own_part
from sparsefit.settings import named_settings, number
from sparsefit.sharded import is_sharded, reshard, shard_of

_LOGITS_AT_ONCE = 2**22
"""Student logits per chunk in `divergence`: 16 MB in float32, small enough to avoid page faults on a CPU."""


@named_settings
@dataclass
class DistillSettings:
    """Settings of distillation (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        weight: Weight of the divergence from the teacher in the loss, in (0, 1]; the rest is the loss on the labels.
        temperature: Temperature of both distributions.
    """

    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.weight = number("the weight of the distillation", self.weight, above=0, most=1)
        self.temperature = number("the temperature of the distillation", self.temperature, above=0)


def divergence(student: Tensor, teacher: Tensor, counted: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Mean over tokens of T^2 KL(teacher || student), in nats, in float32.

    Tokens are processed in chunks, and the backward pass recomputes their probabilities. With large vocabularies, the
    float32 copies of all logits would otherwise dominate the memory of a training step.

    Args:
        student: Logits (..., vocabulary).
        teacher: Logits of the same shape.
        counted: (...) bool; tokens with False are left out. None counts all tokens.
        temperature: The temperature T.
    """
    tokens = max(1, _LOGITS_AT_ONCE // student.shape[-1])
    parts = zip(student.flatten(0, -2).split(tokens), teacher.flatten(0, -2).split(tokens), strict=True)
    recomputed = partial(checkpoint, _divergences, use_reentrant=False, preserve_rng_state=False)
    by_token = torch.cat([recomputed(*part, temperature) for part in parts])
    if counted is None:
        return by_token.mean() * temperature**2
    counted = counted.flatten()
    return (by_token * counted).sum() / counted.sum().clamp(min=1) * temperature**2


def _divergences(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of each token, (tokens,), from logits (tokens, vocabulary)."""
    log_student = torch.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = torch.log_softmax(teacher.float() / temperature, dim=-1)
    return nn.functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)


class DenseTeacher:
    """The dense model as a teacher, stored as its difference from the pruned model.

    It is created while the model is dense. After pruning, `settle` keeps only the difference: for a frozen weight that
    was only masked, the removed values and one bit per weight for their positions; for a weight that was updated or
    trains, a dense copy; for all other weights, nothing. If weights were sharded in the meantime, each rank keeps the
    difference for its shards.

    Args:
        model: The dense model, with or without adapters, or a module that holds it; its parameters are copied to CPU
            memory until `settle`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._dense = {name: shard_of(p).to("cpu", copy=True) for name, p in model.named_parameters()}
        # Running statistics change as the student trains.
        self._dense_buffers = {n: b.detach().to("cpu", copy=True) for n, b in _running_statistics(model)}
        self._removed: list[tuple[nn.Parameter, Removed]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []  # a parameter or buffer, and its dense values
        self.settled = False

    @property
    def bytes(self) -> int:
        """Bytes that the teacher holds in addition to the model."""
        removed = sum(removed.bits.nbytes + removed.values().nbytes for _, removed in self._removed)
        return removed + sum(copy.nbytes for _, copy in self._copies) + sum(t.nbytes for t in self._dense.values())

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        """Keep only the difference between the dense model and `model`, on the devices of the model's parameters.

        Raises:
            ConfigError: if a weight was quantized since, so that dense values cannot be swapped in.
        """
        reshard(model)
        for name, parameter in model.named_parameters():
            dense, own = self._dense.pop(name, None), shard_of(parameter)
            if dense is None:
                continue
            if dense.shape == parameter.shape:
                dense = own_part(dense, parameter)
            if dense.shape != own.shape or dense.dtype != own.dtype:
                raise ConfigError(
                    f"{name} was quantized after the dense model was taken as the teacher: distillation needs a base "
                    "in floats. Leave out `distill`, or `quantize`"
                )
            dense = dense.to(own.device, copy=dense.shape != parameter.shape)  # a view would keep the whole alive
            kept = own == dense
            if parameter.requires_grad:
                self._copies.append((parameter, dense))
            elif not bool(kept.all()):
                gone = own.masked_select(~kept)
                if bool(gone.any()):  # not merely masked
                    self._copies.append((parameter, dense))
                else:
                    bits, values = pack_bits(kept).to(dense.device), dense.masked_select(~kept)
                    self._removed.append((parameter, Removed(bits, lambda values=values: values)))
        for name, buffer in _running_statistics(model):
            if (dense := self._dense_buffers.get(name)) is not None:
                self._copies.append((buffer, dense.to(buffer.device)))
        self._dense.clear()
        self._dense_buffers.clear()
        self.settled = True

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Swap the dense weights into the model, in evaluation mode and without gradients; restore it at the end.

        Must not be used between a forward pass and its backward pass, which would see changed weights.
        """
        training = [module for module in model.modules() if module.training]
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        copies_of_autocast = torch.is_autocast_cache_enabled()
        reshard(model)
        students = [shard_of(held).clone() if is_sharded(held) else held.data for held, _ in self._copies]
        with ExitStack() as stack, torch.no_grad():
            stack.callback(_require_gradients, trained)  # PEFT makes all re-enabled adapters trainable
            if (adapted := adapted_part(model)) is not None:
                stack.enter_context(adapted.disable_adapter())
            try:
                # Autocast caches half-precision copies of the student's weights, which the teacher must not use.
                torch.set_autocast_cache_enabled(False)
                model.eval()
                for parameter, removed in self._removed:
                    removed.put_back(shard_of(parameter))
                for held, dense in self._copies:
                    _give(held, dense)
                yield
            finally:
                reshard(model)
                for (held, _), student in zip(self._copies, students, strict=True):
                    _give(held, student)
                for parameter, removed in self._removed:
                    removed.take_out(shard_of(parameter))
                for module in training:
                    module.training = True
                torch.set_autocast_cache_enabled(copies_of_autocast)


def _give(held: Tensor, values: Tensor) -> None:
    """Set the values of a parameter or buffer; a shard is written in place, as FSDP2 gathers from its memory."""
    if is_sharded(held):
        shard_of(held).copy_(values)
    else:
        held.data = values


def _require_gradients(trained: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)


def _running_statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The running means and variances of batch normalisation layers, by name."""
    for path, module in model.named_modules():
        if getattr(module, "track_running_stats", False):
            for name, buffer in module.named_buffers(prefix=path, recurse=False):
                if buffer.is_floating_point():
                    yield name, buffer
