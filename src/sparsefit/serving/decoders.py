"""A common interface to language models in any runtime: `start` reads a prompt, `step` one more token."""

from __future__ import annotations

import inspect
from typing import Protocol

import torch
from torch import Tensor, nn

from sparsefit.errors import ConfigError


class Decoder(Protocol):
    """A language model that keeps its own cache.

    Attributes:
        weight_bytes: Memory of the weights in the runtime's format.
        note: A remark on its measurements.
    """

    weight_bytes: int
    note: str

    def start(self, ids: Tensor) -> Tensor:
        """Read prompts (batch, tokens) into an empty cache; returns the logits (batch, tokens, vocabulary)."""
        ...

    def step(self, token: Tensor) -> Tensor:
        """Read one more token (batch, 1) of each sequence; returns its logits (batch, 1, vocabulary)."""
        ...


class TorchDecoder:
    """A model of transformers in torch, with weights in dense or sparse tensors.

    Raises:
        ConfigError: if the model does not keep its state in `past_key_values`.
    """

    def __init__(self, model: nn.Module, note: str = "") -> None:
        check_cache(model)
        self.model = model
        self.note = note
        self.weight_bytes = weight_bytes(model)
        self._cache = None

    @torch.inference_mode()
    def start(self, ids: Tensor) -> Tensor:
        """See `Decoder`."""
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self.model.config)
        return self.step(ids)

    @torch.inference_mode()
    def step(self, token: Tensor) -> Tensor:
        """See `Decoder`."""
        token = token.to(next(self.model.parameters()).device)
        return self.model(token, past_key_values=self._cache, use_cache=True).logits


def check_cache(model: nn.Module) -> None:
    """Check that a model has a key-value cache.

    Raises:
        ConfigError: if its forward does not take one, as in Mamba and RWKV.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"a {type(model).__name__} takes no past_key_values: only language models with a key-value cache can run "
            "token by token here"
        )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights; shared ones are counted once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(sum(part.nbytes for part in _parts(tensor)) for tensor in tensors.values())


def _parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that store a sparse one."""
    if tensor.layout == torch.sparse_csr:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    # torch's semi-structured tensors list the names of their parts, like all of torch's tensor subclasses.
    if hasattr(tensor, "__tensor_flatten__"):
        return [part for name in tensor.__tensor_flatten__()[0] if (part := getattr(tensor, name)) is not None]
    return [tensor]
