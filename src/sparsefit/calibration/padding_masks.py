"""Reading padding masks from the arguments with which a module is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_MEMORY = ("encoder_hidden_states", "memory")
"""The names of a decoder's parameters for the states that it attends to."""


@dataclass(frozen=True, eq=False)
class PaddingMask:
    """Which tokens of some sequences are not padding.

    Attributes:
        real: (batch, sequence) bool, True = a real token.
        source: The mask tensor that a module was called with.
        seq_first: Whether hidden states are (sequence, batch, width), if both sizes are equal.
        of_signal: Whether the mask is over audio samples, several of which make one hidden state.
    """

    real: Tensor
    source: Tensor
    seq_first: bool = False
    of_signal: bool = False

    @property
    def has_padding(self) -> bool:
        """Whether any token is padding."""
        return not bool(self.real.all())


@dataclass(frozen=True)
class Given:
    """The masks among the arguments of one call.

    Attributes:
        main: The mask of the sequences that the module works on.
        memory: The mask of the sequences that a decoder attends to.
        ahead: The mask of the sequences of the decoder inside an encoder-decoder model.
    """

    main: PaddingMask | None = None
    memory: PaddingMask | None = None
    ahead: PaddingMask | None = None

    def any(self) -> bool:
        """Whether there is any mask."""
        return self.main is not None or self.memory is not None or self.ahead is not None


def masks_given(given: Mapping[str, Tensor], names: frozenset[str], seq_first: bool = False) -> Given:
    """The padding masks among the tensors that a module is called with.

    In masks named like torch's `key_padding_mask` True is padding; in transformers' `attention_mask` 1 is a real token.
    A mask that fits no other tensor (tokens by tokens, or for a cache), or does not have two dimensions, is ignored.

    Args:
        given: The tensors, by the names of the module's parameters.
        names: All names of its parameters.
        seq_first: Whether the module's hidden states are (sequence, batch, width).

    >>> ids, mask = torch.ones(1, 3), torch.tensor([[False, False, True]])
    >>> masks_given({"src": ids, "src_key_padding_mask": mask}, frozenset()).main.real
    tensor([[ True,  True, False]])
    """
    main = memory = ahead = None
    for name in sorted((name for name in given if may_be_mask(name)), key=_rank):
        real = _real(name, given[name])
        if real is None:
            continue
        if name.startswith(("encoder_", "memory_")):
            memory = memory or PaddingMask(real, given[name], seq_first)
        elif name.startswith("decoder_") or (name.startswith("tgt_") and "src" in names):
            ahead = ahead or PaddingMask(real, given[name], seq_first)
        elif main is None and (kind := _fits_call(real, name, given)) is not None:
            main = PaddingMask(real, given[name], seq_first, kind == "signal")
    labels = given.get("labels")
    if ahead is None and "decoder_input_ids" in names and labels is not None and labels.ndim == 2:
        real = until_last(labels != -100)
        ahead = PaddingMask(real, real)
    return Given(main, memory, ahead)


def until_last(found: Tensor) -> Tensor:
    """(batch, sequence) bool: True up to the last True of each row.

    >>> until_last(torch.tensor([[False, True, False]]))
    tensor([[ True,  True, False]])
    """
    return found.flip(1).cumsum(1).flip(1) > 0


def memory_of(given: Mapping[str, Tensor]) -> list[Tensor]:
    """The states that a decoder or cross-attention attends to when it is called with these tensors.

    >>> memory_of({"tgt": torch.ones(1), "memory": torch.zeros(1)})
    [tensor([0.])]
    """
    found = [given[name] for name in _MEMORY if name in given]
    query = given.get("query")
    if query is not None and "key" in given and storage_of(query) != storage_of(given["key"]):
        found += [given[name] for name in ("key", "value") if name in given]
    return found


def storage_of(tensor: Tensor) -> int:
    """A number that is the same for all views of one tensor.

    >>> tensor = torch.zeros(2, 3)
    >>> storage_of(tensor.t()) == storage_of(tensor)
    True
    """
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def in_sequence(tensor: Tensor, mask: PaddingMask) -> bool:
    """Whether a tensor can be hidden states, or a part of them, of the sequences of a mask.

    >>> mask = PaddingMask(torch.ones(2, 5) > 0, torch.ones(2, 5))
    >>> [in_sequence(torch.ones(*shape), mask) for shape in ((2, 5, 8), (5, 2, 8), (10, 8), (2, 3, 16, 16))]
    [True, True, True, False]
    """
    (batch, length), shape = mask.real.shape, tensor.shape
    if mask.of_signal:
        return True
    if len(shape) < 2:
        return False
    if shape[:2] == (length, batch) or shape[0] == batch * length or (shape[0] == batch and length in shape[1:]):
        return True
    return len(shape) == 3 and shape[0] * shape[1] == batch * length


def may_be_mask(name: str) -> bool:
    """Whether a parameter has the name of a padding mask.

    >>> [name for name in ("attention_mask", "src_key_padding_mask", "mask", "attn_mask") if may_be_mask(name)]
    ['attention_mask', 'src_key_padding_mask']
    """
    return name.endswith("attention_mask") or ("pad" in name and "mask" in name)


def _rank(name: str) -> tuple[int, str]:
    """A sort key that puts masks of a single modality last."""
    order = ("attention_mask", "src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask", "padding_mask")
    return (order.index(name) if name in order else len(order)), name


def _real(name: str, mask: Tensor) -> Tensor | None:
    if name == "patch_attention_mask" and mask.ndim == 3:
        mask = mask.flatten(1)
    if mask.ndim != 2:
        return None
    if mask.is_floating_point():
        if bool(((mask == 0) | (mask == 1)).all()) and "key_padding" not in name:
            return mask == 1
        # A mask that is added to attention scores: minus infinity is padding.
        return mask == 0 if "pad" in name else None
    # A `padding_mask` of integers is an attention mask under another name (EnCodec).
    return ~mask if "pad" in name and mask.dtype is torch.bool else mask != 0


def _fits_call(real: Tensor, name: str, given: Mapping[str, Tensor]) -> str | None:
    """What kind of other tensor in a call a mask fits: "tokens", a "signal", or None."""
    batch, length = real.shape
    others = [tensor for other, tensor in given.items() if not may_be_mask(other)]
    sound = [t for t in others if t.is_floating_point() and (t.shape == real.shape or t.shape[::2] == real.shape)]
    if any(t.ndim >= 2 and t.shape[:2] in ((batch, length), (length, batch)) for t in others):
        return "signal" if any(t.shape == real.shape for t in sound) and "input_values" in given else "tokens"
    if name == "patch_attention_mask":
        return "tokens"
    return "signal" if any(t.ndim == 3 for t in sound) else None
