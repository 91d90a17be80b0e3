"""Finding out which tokens are padding, from the masks with which a model and its modules are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsefit.calibration.padding_masks import (
    Given,
    PaddingMask,
    in_sequence,
    masks_given,
    may_be_mask,
    memory_of,
    storage_of,
)

_SEQUENCES = ("input_ids", "inputs_embeds", "input_values", "input_features")


@dataclass(frozen=True)
class Scope:
    """The masks that hold while a module runs.

    Attributes:
        main: The mask of the sequences that the module works on; None if nothing is padding or there is no mask.
        memory: The mask of the sequences that it attends to (encoder states in a decoder).
        ahead: The mask of the sequences of a decoder inside the module.
        decoder: Whether the module is a decoder, or in one.
        states: The states that a decoder attends to, by storage.
        own: The first two dimensions of a decoder's own states.
        foreign: The shapes of inputs of the model other than the sequences, such as images.
    """

    main: PaddingMask | None = None
    memory: PaddingMask | None = None
    ahead: PaddingMask | None = None
    decoder: bool = False
    states: frozenset[int] = frozenset()
    own: torch.Size | None = None
    foreign: frozenset[torch.Size] = frozenset()

    @property
    def is_empty(self) -> bool:
        """Whether there is no mask."""
        return self.main is None and self.memory is None and self.ahead is None

    def entered(self, given: Mapping[str, Tensor], found: Given) -> Scope:
        """The scope inside a module that is called with these tensors and the masks found among them."""
        if self.is_empty and not found.any():
            return self
        states = memory_of(given)
        main, memory, ahead = (_with_padding(own, self) for own in (found.main, found.memory, found.ahead))
        if states and found.main is not None and "query" in given:  # the mask of a cross-attention is that of its keys
            main, memory, decoder = self.main, main, True
        elif states or found.memory is not None:
            decoder = True
            if found.main is None:
                main = self.main if self.decoder else self.ahead
            if found.memory is None:
                memory = self.memory if self.decoder else self.main
        else:
            decoder = self.decoder
            memory = self.memory
            ahead = ahead if found.ahead is not None else self.ahead
            if found.main is None:
                main = self.main if self.main is not None and self._goes_on(given) else None
        foreign = self.foreign
        if found.main is not None:
            foreign |= {t.shape for t in given.values() if t.is_floating_point() and not _leads(t, found.main)}
        attended = self.states | {storage_of(state) for state in states}
        return Scope(main, memory, ahead, decoder, attended, _own(given, states) if states else self.own, foreign)

    def _goes_on(self, given: Mapping[str, Tensor]) -> bool:
        """Whether a module that is called without a mask works on the same sequences, or on some of their tokens; a
        module that processes images does not."""
        if not any(tensor.ndim > 1 for tensor in given.values()):
            return True
        own = [tensor for tensor in given.values() if tensor.shape not in self.foreign]
        return any(in_sequence(tensor, self.main) or _are_some_tokens(tensor, self.main) for tensor in own)

    def mask_of(self, inputs: Tensor) -> PaddingMask | None:
        """The mask of the sequences of a weight's inputs; None if nothing in them is padding."""
        return self.memory if self._is_memory(inputs) else self.main

    def _is_memory(self, inputs: Tensor) -> bool:
        """Whether a weight's inputs are the states that a decoder attends to, possibly with positions added."""
        if storage_of(inputs) in self.states:
            return True
        if not self.decoder or self.memory is None or inputs.ndim != 3:
            return False
        lead, turned = inputs.shape[:2], inputs.shape[1::-1]
        return self.memory.real.shape in (lead, turned) and self.own not in (lead, turned)


def _own(given: Mapping[str, Tensor], states: list[Tensor]) -> torch.Size | None:
    """The first two dimensions of the first tensor in a decoder's call that is not one it attends to."""
    known = {storage_of(state) for state in states}
    others = (t for name, t in given.items() if not may_be_mask(name) and storage_of(t) not in known)
    return next((tensor.shape[:2] for tensor in others), None)


def _are_some_tokens(tensor: Tensor, mask: PaddingMask) -> bool:
    return tensor.is_floating_point() and tensor.ndim == 2 and len(mask.real) < len(tensor) < mask.real.numel()


def _leads(tensor: Tensor, mask: PaddingMask) -> bool:
    return mask.of_signal or tensor.shape[:2] in (mask.real.shape, mask.real.t().shape)


def _with_padding(mask: PaddingMask | None, outer: Scope) -> PaddingMask | None:
    for known in (outer.main, outer.memory, outer.ahead):
        if mask is not None and known is not None and known.source is mask.source:
            return known  # already checked for padding
    return mask if mask is not None and mask.has_padding else None


class MaskSeen(BaseException):
    """Stops a pass that is only run to see the masks. (Not an `Exception`, which a model might catch.)"""

    def __init__(self, given: Mapping[str, Tensor], found: Given) -> None:
        super().__init__()
        self.given, self.found = given, found


@dataclass(eq=False)
class PaddingWatch:
    """Follows the masks through the modules of a model, for each micro-batch.

    When a block runs without its model, the masks from the time when the model called it hold.

    Attributes:
        follows: Whether any module of the model takes a mask.
        stops: Whether to end a pass with `MaskSeen` at the first call with a mask.
    """

    follows: bool
    stops: bool = False
    _scopes: list[Scope] = field(default_factory=list)
    _base: Scope = field(default_factory=Scope)
    _known: dict[int, Scope] = field(default_factory=dict)  # by id of a module

    def begin(self, mask: PaddingMask | None, known: dict[int, Scope]) -> None:
        """Called before a pass of the model, or of one block, with a micro-batch.

        Args:
            mask: The padding mask, as far as it is known.
            known: The scope of each module by its id; filled during the pass.
        """
        self._scopes, self._known = [], known
        self._base = Scope() if mask is None else Scope(mask)

    @property
    def scope(self) -> Scope:
        """The current scope."""
        return self._scopes[-1] if self._scopes else self._base

    def enter(self, module: nn.Module, names: list[str], seq_first: bool, args: Any, kwargs: Any) -> None:
        """Called before the forward of a module.

        Args:
            module: The module.
            names: The names of its forward's parameters, in the order of their positions.
            seq_first: Whether its hidden states are (sequence, batch, width).
            args: The positional arguments.
            kwargs: The keyword arguments.

        Raises:
            MaskSeen: if `stops` is set, and the arguments have a mask, or a transformers model is called without its
                mask.
        """
        if self._scopes:
            outer = self._known[id(module)] = self._scopes[-1]
        else:
            outer = self._known.setdefault(id(module), self._base)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        found = masks_given(given, frozenset(names), seq_first)
        if self.stops and (found.any() or _goes_without(given, names)):
            raise MaskSeen(given, found)
        self._scopes.append(outer.entered(given, found))

    def leave(self, *_: Any) -> None:
        """Called after the forward of a module."""
        if self._scopes:
            self._scopes.pop()


@contextmanager
def watching_padding(model: nn.Module) -> Iterator[PaddingWatch]:
    """Follow the masks of a model inside the context.

    >>> with watching_padding(nn.TransformerEncoderLayer(4, 1)) as watch: print(watch.follows)
    True
    """
    modules = [module for module in model.modules() if next(module.children(), None) is not None]
    names = {id(module): _parameters(module.forward) for module in modules}
    watch = PaddingWatch(follows=any(may_be_mask(name) for own in names.values() for name in own))
    handles = []

    def entering(names: list[str], seq_first: bool) -> Callable[..., None]:
        return lambda module, args, kwargs: watch.enter(module, names, seq_first, args, kwargs)

    try:
        for module in modules if watch.follows else ():
            enter = entering(names[id(module)], _is_seq_first(module))
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(watch.leave))
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _goes_without(given: Mapping[str, Tensor], names: list[str]) -> bool:
    """Whether a transformers model is called with sequences and no mask: then nothing in them is padding."""
    return "attention_mask" in names and "attention_mask" not in given and any(name in given for name in _SEQUENCES)


def _parameters(forward: Callable[..., Any]) -> list[str]:
    """The parameter names of a forward: positional ones first, then keyword-only ones."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # compiled code
        return []
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _is_seq_first(module: nn.Module) -> bool:
    attention = next((part for part in module.modules() if isinstance(part, nn.MultiheadAttention)), None)
    return attention is not None and not attention.batch_first
