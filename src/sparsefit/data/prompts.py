"""What a text that a model writes begins with."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import torch

from sparsefit.data.packing import shuffled
from sparsefit.data.text import Shard, documents
from sparsefit.data.windows import end_of, tokenised
from sparsefit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BUFFER = 10_000


def start_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that begins a text; of a tokenizer without one, that which ends the text before it."""
    return end_of(tokenizer) if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def from_prompts(
    shards: list[Shard],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    windows: int,
    length: int,
    generator: torch.Generator,
) -> list[list[int]]:
    """The first tokens of documents drawn at random, special tokens included; those that have fewer are passed over.

    Args:
        shards: the documents.
        tokenizer: of the model.
        tokens: how many of each document.
        windows: no more documents than these are taken.
        length: tokens of a window.
        generator: draws.

    Raises:
        ConfigError: where they would fill a window.
        DataError: where no document has so many.
    """
    if tokens >= length:
        raise ConfigError(f"prompt_tokens is {tokens}, and a window has only {length} tokens: set fewer")
    drawn = tokenised(shuffled(documents(shards), _BUFFER, generator), tokenizer)
    found = list(islice((ids[:tokens] for _, ids in drawn if len(ids) >= tokens), windows))
    if not found:
        raise DataError(f"no document of the prompts has {tokens} tokens: set fewer prompt_tokens, or name other text")
    return found
