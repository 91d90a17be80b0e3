"""The first tokens of the windows that a model generates."""

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
    """The id of the token that begins a text; without one, that of the token that ends the previous text."""
    return end_of(tokenizer) if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def from_prompts(
    shards: list[Shard],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    windows: int,
    length: int,
    generator: torch.Generator,
) -> list[list[int]]:
    """The first tokens of randomly drawn documents, including special tokens; shorter documents are skipped.

    Args:
        shards: the documents.
        tokenizer: the model's tokenizer.
        tokens: how many tokens of each document.
        windows: the maximum number of documents.
        length: tokens in a window.
        generator: the random number generator.

    Raises:
        ConfigError: if the first tokens would fill a window.
        DataError: if no document has that many tokens.
    """
    if tokens >= length:
        raise ConfigError(f"prompt_tokens is {tokens}, and a window has only {length} tokens: set fewer")
    drawn = tokenised(shuffled(documents(shards), _BUFFER, generator), tokenizer)
    found = list(islice((ids[:tokens] for _, ids in drawn if len(ids) >= tokens), windows))
    if not found:
        raise DataError(f"no document of the prompts has {tokens} tokens: set fewer prompt_tokens, or name other text")
    return found
