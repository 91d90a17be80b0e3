"""From documents to windows, as streams: packing, random crops, shuffling, and dividing items among ranks.

A document is a list of token ids; a window is an int64 tensor of exactly `length` tokens. Nothing is padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from sparsefit.errors import CalibrationError

_Item = TypeVar("_Item")


def pack(documents: Iterable[Sequence[int]], length: int, end: int | None) -> Iterator[Tensor]:
    """Cut the stream of all documents, each closed by the token `end`, into windows; the remainder is dropped.

    Args:
        documents: token ids of each document.
        length: tokens in a window.
        end: the token that closes a document, added unless it is already the last one; None adds none.

    Yields:
        Windows, int64 (length,), consecutive and without gaps or overlaps.
    """
    buffer: list[int] = []
    for tokens in documents:
        buffer.extend(tokens)
        if end is not None and (not tokens or tokens[-1] != end):
            buffer.append(end)
        whole = len(buffer) // length * length
        for start in range(0, whole, length):
            yield torch.tensor(buffer[start : start + length])
        del buffer[:whole]


def crop(tokens: Sequence[int], length: int, generator: torch.Generator) -> Tensor:
    """A random window of a document that has more than `length` tokens: int64 (length,)."""
    start = int(torch.randint(len(tokens) - length, (), generator=generator))
    return torch.tensor(tokens[start : start + length])


def draw_crops(
    documents: Iterable[tuple[_Item, Sequence[int]]], count: int, length: int, generator: torch.Generator
) -> list[tuple[_Item, Tensor]]:
    """Calibration samples as in Wanda and SparseGPT: keep documents of more than `length` tokens, crop each at random.

    Args:
        documents: (name, token ids) of each document, already in random order.
        count: windows to draw, each from another document.
        length: tokens in a window.
        generator: draws the positions of the crops.

    Returns:
        `count` pairs (name of the document, its window of (length,) tokens).

    Raises:
        CalibrationError: if fewer than `count` documents are long enough.
    """
    drawn: list[tuple[_Item, Tensor]] = []
    if count == 0:
        return drawn
    seen = longest = 0
    for name, tokens in documents:
        seen, longest = seen + 1, max(longest, len(tokens))
        if len(tokens) > length:
            drawn.append((name, crop(tokens, length, generator)))
            if len(drawn) == count:
                return drawn
    raise CalibrationError(
        f"{len(drawn)} of {seen} documents have more than sequence_length={length} tokens (the longest has {longest}), "
        f'but {count} calibration samples are wanted. Use calibration="pack" to join documents into windows, '
        "a shorter calibration_length, fewer calibration_samples, or more documents."
    )


def shuffled(items: Iterable[_Item], buffer_size: int, generator: torch.Generator) -> Iterator[_Item]:
    """The items in random order, with `buffer_size` of them in memory: a full shuffle if there are no more items."""
    buffer: list[_Item] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        place = int(torch.randint(buffer_size, (), generator=generator))
        buffer[place], item = item, buffer[place]
        yield item
    for place in torch.randperm(len(buffer), generator=generator).tolist():
        yield buffer[place]


def deal(items: Iterable[_Item], rank: int, world_size: int) -> Iterator[_Item]:
    """Every `world_size`-th item, starting with number `rank`; an incomplete last round is dropped.

    All ranks get the same number of items, so that none waits for another at the end of an epoch.
    """
    hand: _Item | None = None
    for number, item in enumerate(items):
        if number % world_size == rank:
            hand = item
        if number % world_size == world_size - 1:
            yield hand  # type: ignore[misc]  # the round is complete, so it holds this rank's item
