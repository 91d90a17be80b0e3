"""A language model behind two calls, whatever runs it: read a prompt, then one token after the other."""

from __future__ import annotations

import inspect
from typing import Protocol

import torch
from torch import Tensor, nn

from sparsefit.errors import ConfigError


class Decoder(Protocol):
    """A language model with a cache of its own.

    Attributes:
        weight_bytes: What its weights take in memory, in the format that the runtime computes with.
        note: What is to be known of its figures.
    """

    weight_bytes: int
    note: str

    def start(self, ids: Tensor) -> Tensor:
        """Read a prompt (batch, tokens) into an empty cache; the logits (batch, tokens, vocabulary)."""
        ...

    def step(self, token: Tensor) -> Tensor:
        """Read one more token (batch, 1) behind what was read; its logits (batch, 1, vocabulary)."""
        ...


class TorchDecoder:
    """A model of transformers in torch, its weights in whatever tensors they are.

    Raises:
        ConfigError: if the model keeps its state elsewhere than in `past_key_values`.
    """

    def __init__(self, model: nn.Module, note: str = "") -> None:
        check_cache(model)
        self.model = model
        self.note = note
        self.weight_bytes = weight_bytes(model)
        self._cache = None

    @torch.inference_mode()
    def start(self, ids: Tensor) -> Tensor:
        """As of `Decoder`."""
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self.model.config)
        return self.step(ids)

    @torch.inference_mode()
    def step(self, token: Tensor) -> Tensor:
        """As of `Decoder`."""
        token = token.to(next(self.model.parameters()).device)
        return self.model(token, past_key_values=self._cache, use_cache=True).logits


def check_cache(model: nn.Module) -> None:
    """See that a model reads on from a cache of keys and values.

    Raises:
        ConfigError: if its forward takes none, as that of a Mamba or an RWKV.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"a {type(model).__name__} takes no past_key_values: only language models with a cache of keys and values "
            "can be run token by token here"
        )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights, those that several layers share counted once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(sum(part.nbytes for part in _parts(tensor)) for tensor in tensors.values())


def _parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that a sparse one is held in."""
    if tensor.layout == torch.sparse_csr:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    # torch's semi-structured tensors name the tensors that they are made of, as all of torch's subclasses do.
    if hasattr(tensor, "__tensor_flatten__"):
        return [part for name in tensor.__tensor_flatten__()[0] if (part := getattr(tensor, name)) is not None]
    return [tensor]
