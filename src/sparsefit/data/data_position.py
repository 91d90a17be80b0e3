"""Positions in the training data, and checks that a saved position refers to the same batches in a resumed run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsefit.data.text import Shard
from sparsefit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Settings = Mapping[str, tuple[Any, Any]]
"""Name of a setting -> (its value as given by the user, the value that is compared)."""

Dealt = tuple[tuple[int, int], ...]
"""How an epoch's data were divided before the number of ranks changed: (number of ranks, batches of each), in order."""


class Place(NamedTuple):
    """The position in the training data where training continues.

    Attributes:
        epoch: The epoch.
        batches: Batches per rank that are done in this epoch with the current number of ranks.
        before: What was done in this epoch with other numbers of ranks.
    """

    epoch: int
    batches: int
    before: Dealt = ()


def samples_dealt(before: Dealt, batch_size: int, worker: int = 0, workers: int = 1) -> int:
    """How many samples of those that one worker of a loader reads were taken by earlier numbers of ranks together.

    Workers yield their batches to a loader in rotation. If one worker had reached the end of its share, the others
    yielded more than is counted here.

    >>> samples_dealt(((2, 3),), batch_size=4), samples_dealt(((2, 3),), batch_size=4, worker=1, workers=2)
    (24, 8)
    """
    return sum(ranks * batch_size * len(range(worker, batches, workers)) for ranks, batches in before)


def check_same_data(saved: Mapping[str, Iterable[Any]], now: Settings) -> None:
    """Check that a saved position refers to the same batches in this run.

    Args:
        saved: `Settings` from a checkpoint; names that are in only one of the two are not compared.
        now: The settings of this run.

    Raises:
        ConfigError: if it refers to other batches; names the settings, with their old and new values.
    """
    then = {name: tuple(pair) for name, pair in saved.items()}
    others = [name for name in now if name in then and then[name][1] != now[name][1]]
    if not others:
        return
    renamed = [name for name in others if then[name][0] != now[name][0]]
    told = [f"{name} was {then[name][0]!r} and is {now[name][0]!r}" for name in renamed]
    # A file may have changed under its name.
    told = told or [f"{name} is {now[name][0]!r} as it was, but what it holds has changed" for name in others]
    raise ConfigError(
        f"the checkpoint is from a run on other training data, in which its position means other batches: "
        f"{', '.join(told)}. Resume with the settings of its run (config.yaml in the run folder), or start a new run "
        "in another folder"
    )


def text_digest(shards: Iterable[Shard]) -> str:
    """A digest of a text's files: their names (without folders, which may have moved), sizes and slices."""
    return _digest([[*_file(shard.location), shard.kind, shard.start, shard.stop] for shard in shards])


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of a tokenizer's tokens and their ids."""
    return _digest(sorted(tokenizer.get_vocab().items()))


def _file(location: str) -> tuple[str, int | None]:
    try:
        return Path(location).name, os.path.getsize(location)
    except OSError:  # not a file of this machine
        return location, None


def _digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]
