"""Data sets of token windows: the streamed one for training, and small ones in memory for calibration and tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from sparsefit.data.data_position import Place, samples_dealt
from sparsefit.data.packing import deal, draw_crops, pack, shuffled
from sparsefit.data.text import Document, Shard, documents, wikitext_as_one
from sparsefit.errors import CalibrationError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]
Name = tuple[str, int]  # of a document: (location of its shard, its number there)

_TOKENISED_AT_ONCE = 64
_CALIBRATION_BUFFER = 10_000


class Calibration(NamedTuple):
    """Calibration windows, each (length,), and the names of the documents that they come from."""

    windows: list[Tensor]
    used: frozenset[Name]


class Windows(Dataset[Tensor]):
    """Windows of (length,) tokens, kept in memory."""

    def __init__(self, windows: list[Tensor]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index]


class PackedText(IterableDataset[Tensor]):
    """One epoch of packed training windows, shuffled, read lazily.

    Each worker of a loader reads its own documents. All ranks read the same documents and divide the windows among
    themselves, so that each gets the same number of different windows. The order depends on the epoch, the seed and the
    number of workers.

    Args:
        shards: the training text.
        tokenizer: a tokenizer with an end-of-text token, which closes each document.
        length: tokens in a window.
        seed: the seed of the order.
        excluded: names of documents that are left out.
        rank: the rank of this process.
        world_size: the number of processes.
        shuffle_buffer: documents, and windows, kept in memory to draw from.
    """

    def __init__(
        self,
        shards: list[Shard],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
        excluded: frozenset[Name] = frozenset(),
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 1000,
    ) -> None:
        self.shards = shards
        self.tokenizer = tokenizer
        self.length = length
        self.seed = seed
        self.excluded = excluded
        self.rank = rank
        self.world_size = world_size
        self.shuffle_buffer = shuffle_buffer
        self.epoch = 0
        self.taken: tuple[int, ...] = ()  # windows of each worker that were taken with other numbers of ranks

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        generator = generator_of(self.seed, self.epoch, worker)
        order = torch.randperm(len(self.shards), generator=generator_of(self.seed, self.epoch)).tolist()
        shards = [self.shards[place] for place in order]
        texts = (document for document in _part(shards, worker, workers) if document.name not in self.excluded)
        texts = shuffled(texts, self.shuffle_buffer, generator)
        tokens = (tokens for _, tokens in tokenised(texts, self.tokenizer))
        windows = shuffled(pack(tokens, self.length, end_of(self.tokenizer)), self.shuffle_buffer, generator)
        return deal(islice(windows, self.taken[worker] if self.taken else 0, None), self.rank, self.world_size)


class TrainLoader(DataLoader):
    """A loader of `PackedText` that starts at the current position in the training data whenever it is iterated.

    Args:
        dataset: the training windows.
        position: returns the position where training continues.
        settings: for `torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: PackedText, position: Callable[[], Place], **settings: Any) -> None:
        super().__init__(dataset, **settings)
        self.position = position

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        place, workers = self.position(), max(1, self.num_workers)
        taken = (samples_dealt(place.before, self.batch_size, worker, workers) for worker in range(workers))
        self.dataset.epoch, self.dataset.taken = place.epoch, tuple(taken)
        return islice(super().__iter__(), place.batches, None)


def loader(
    dataset: Dataset[Tensor], batch_size: int, num_workers: int, position: Callable[[], Place] | None = None
) -> DataLoader:
    """A loader of batches {"input_ids": int64 (batch, length)}; with `position`, a `TrainLoader`."""
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "collate_fn": collate,
        "worker_init_fn": _init_worker,
        "pin_memory": torch.cuda.is_available(),
    }
    return DataLoader(dataset, **settings) if position is None else TrainLoader(dataset, position, **settings)


def collate(windows: list[Tensor]) -> Batch:
    """{"input_ids": (batch, length)} of windows of equal length."""
    return {"input_ids": torch.stack(windows)}


def tokenised(texts: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Name, list[int]]]:
    """(name, token ids) of each document, with the special tokens of the tokenizer; a few are tokenised at a time."""
    texts = iter(texts)
    while group := list(islice(texts, _TOKENISED_AT_ONCE)):
        # verbose=False: no warning for documents longer than the model's context, which are cut later
        encoded = tokenizer([text for _, text in group], verbose=False)["input_ids"]
        yield from ((name, ids) for (name, _), ids in zip(group, encoded, strict=True))


def evaluation_windows(shards: list[Shard], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Tensor]:
    """Non-overlapping windows of a text, in order, as for published perplexities.

    WikiText's rows are joined by two newlines and tokenised once, including special tokens; in other texts each
    document is closed by the end token.
    """
    for shard in (shard for shard in shards if shard.kind == "wikitext"):
        ids = tokenizer(wikitext_as_one(shard), verbose=False)["input_ids"]
        yield from pack([ids], length, end=None)
    others = [shard for shard in shards if shard.kind != "wikitext"]
    if others:
        tokens = (tokens for _, tokens in tokenised(documents(others), tokenizer))
        yield from pack(tokens, length, end_of(tokenizer))


def calibration_windows(
    shards: list[Shard], tokenizer: PreTrainedTokenizerBase, count: int, length: int, method: str, seed: int
) -> Calibration:
    """`count` windows of text drawn at random, for calibration.

    Args:
        shards: the text; documents are drawn without replacement, from a buffer of 10,000.
        tokenizer: the model's tokenizer.
        count: the number of windows.
        length: tokens in a window.
        method: "crop" takes a random crop of each document that has more than `length` tokens, as the papers of
            SparseGPT and Wanda do; "pack" joins documents, each closed by the end token.
        seed: the seed of the draw.

    Raises:
        CalibrationError: if the text is too short; says what there is and what is needed.
    """
    generator = generator_of(seed)
    texts = shuffled(documents(shards), _CALIBRATION_BUFFER, generator)
    if method == "crop":
        drawn = draw_crops(tokenised(texts, tokenizer), count, length, generator)
        return Calibration([window for _, window in drawn], frozenset(name for name, _ in drawn))
    used: list[Name] = []
    windows = list(islice(pack(_recorded(tokenised(texts, tokenizer), used), length, end_of(tokenizer)), count))
    if len(windows) < count:
        raise CalibrationError(
            f"the calibration text gives {len(windows)} windows of {length} tokens, but {count} samples are wanted: "
            "add text, or use a shorter calibration_length or fewer calibration_samples"
        )
    return Calibration(windows, frozenset(used))


def end_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the tokenizer's end-of-text token.

    Raises:
        ConfigError: if it has none.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no end-of-text token to close documents with: set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def generator_of(*seeds: int) -> torch.Generator:
    """A random number generator seeded by several numbers."""
    seed = 0
    for number in seeds:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def _part(shards: list[Shard], worker: int, workers: int) -> Iterator[Document]:
    """The documents of one worker: whole shards if there are enough of them, else every `workers`-th document."""
    if len(shards) >= workers:
        yield from documents(shards[worker::workers])
    else:
        yield from islice(documents(shards), worker, None, workers)


def _recorded(pairs: Iterable[tuple[Name, list[int]]], names: list[Name]) -> Iterator[list[int]]:
    for name, tokens in pairs:
        names.append(name)
        yield tokens


def _init_worker(_: int) -> None:
    # a forked worker must not use the tokenizer's threads, which would print a long warning
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
