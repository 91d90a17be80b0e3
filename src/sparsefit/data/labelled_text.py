"""A LightningDataModule of labelled text: classes of texts or of words, texts to write, pairs with a score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sparsefit.data.count_settings import check_counts
from sparsefit.data.data_position import Settings, vocabulary_digest
from sparsefit.data.image_loading import EpochSampler
from sparsefit.data.labelled_batches import Columns, Row, Task, encode, encode_for_calibration
from sparsefit.data.labelled_rows import names_of_classes, open_rows
from sparsefit.data.resumable_data import ResumableDataModule
from sparsefit.data.windows import generator_of
from sparsefit.errors import CalibrationError, ConfigError
from sparsefit.modules.loading import load_tokenizer
from sparsefit.settings import as_text

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_SOURCES = ("train_source", "val_source", "test_source", "calibration_source")


class LabelledTextDataModule(ResumableDataModule):
    """Batches of labelled text, padded to the longest: the tokenizer's outputs, and `labels`.

    | task | text column | label column | labels |
    |---|---|---|---|
    | "sequence_classification" | a text (and one in `text_pair`) | its class | (batch,) |
    | "token_classification" | a list of words | their classes | (batch, length), -100 except at a word's start |
    | "seq2seq" | a text | the target text | (batch, length), -100 for padding |
    | "pairs" | a text, and one in `text_pair` | how similar they are | (batch,); inputs are (batch, 2, length) |

    A source is a file (JSON lines, CSV, TSV, parquet), a pattern, or NAME:SPLIT or NAME:CONFIGURATION:SPLIT, a split of
    a data set on the hub or in a folder. `SOURCE[start:stop]` takes a part of its rows.

    Args:
        tokenizer: a folder or a hub name; in Python also a tokenizer.
        task: see the table.
        train_source: rows to train on.
        calibration_source: rows to calibrate on; None takes the training rows.
        val_source: rows to validate on; None validates on nothing.
        test_source: rows to test on.
        text: column of the text.
        text_pair: column of the second text; None without one.
        label: column of the label.
        class_names: the names of the classes 0, 1, ...; None takes those of the column, or sorts them alphabetically.
        score_range: the lowest and the highest score of "pairs", which are scaled to [0, 1], or to [-1, 1] if the
            lowest is negative.
        prefix: prepended to each text, as T5 expects ("translate English to German: ").
        max_length: the maximum number of tokens of a text; longer texts are truncated.
        max_label_length: the maximum number of tokens of a target text; None takes `max_length`.
        batch_size: rows in a training batch.
        evaluation_batch_size: rows in any other batch; None takes `batch_size`.
        calibration_samples: texts to calibrate on.
        seed: the seed of all random draws.
        num_workers: processes that read and tokenise.
    """

    def __init__(
        self,
        tokenizer: str,
        task: Task = "sequence_classification",
        train_source: str | None = None,
        calibration_source: str | None = None,
        val_source: str | None = None,
        test_source: str | None = None,
        text: str = "text",
        text_pair: str | None = None,
        label: str = "label",
        class_names: list[str] | None = None,
        score_range: tuple[float, float] = (0.0, 1.0),
        prefix: str = "",
        max_length: int = 128,
        max_label_length: int | None = None,
        batch_size: int = 16,
        evaluation_batch_size: int | None = None,
        calibration_samples: int = 128,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        tokenizer = as_text(tokenizer)
        settings = {name: as_text(value) for name, value in locals().items() if name not in ("self", "__class__")}
        _check(settings)
        named = isinstance(tokenizer, str)
        self.save_hyperparameters(
            settings | {"tokenizer": tokenizer if named else type(tokenizer).__name__, "score_range": list(score_range)}
        )
        if not named:
            self.tokenizer = tokenizer
        self._opened: dict[str, Dataset] = {}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when it is first needed."""
        tokenizer = load_tokenizer(self.hparams.tokenizer)
        if tokenizer.pad_token is None:  # as with many decoders; padding is masked
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def class_names(self) -> list[str] | None:
        """The names of the classes 0, 1, ...; None if they are only numbers, or the task has none."""
        if not self.hparams.task.endswith("classification"):
            return None
        if self.hparams.class_names is not None:
            return list(self.hparams.class_names)
        return names_of_classes(self._rows(self._first_source()), self.hparams.label)

    @property
    def num_classes(self) -> int | None:
        """The number of classes; None if they are only numbers, or the task has none."""
        return None if self.class_names is None else len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        """Opens the sources that the stage needs, so that missing files and columns raise before a model is changed."""
        wanted = _SOURCES if stage in ("fit", None) else (f"{stage.removesuffix('idate')}_source",)
        for name in wanted:
            if name in _SOURCES and self.hparams[name] is not None:
                self._rows(name)
        _ = self.class_names

    def train_dataloader(self) -> DataLoader:
        """One epoch of shuffled rows; each epoch has another order. The last batch may be smaller."""
        rows, size = self._rows("train_source"), self.hparams.batch_size
        sampler = EpochSampler(len(rows), size, self.hparams.seed, self.rank_and_world_size())
        return _TrainingLoader(self.position, rows, size, sampler=sampler, **self._settings())

    def calibration_dataloader(self) -> DataLoader:
        """Exactly `calibration_samples` texts: the same for the same seed, and on every rank.

        Raises:
            CalibrationError: if there are fewer.
        """
        name = "train_source" if self.hparams.calibration_source is None else "calibration_source"
        rows, count = self._rows(name), self.hparams.calibration_samples
        columns = [self.hparams.text, self.hparams.text_pair] if self.hparams.task == "pairs" else [self.hparams.text]
        if len(rows) * len(columns) < count:
            raise CalibrationError(
                f"{self.hparams[name]} has {len(rows) * len(columns)} texts and calibration_samples is {count}: give "
                "more rows, or set fewer calibration_samples"
            )
        order = torch.randperm(len(rows), generator=generator_of(self.hparams.seed))[: -(-count // len(columns))]
        chosen = [(row, column) for row in rows.select(order.tolist()) for column in columns][:count]
        collate = partial(encode_for_calibration, columns=self._columns)
        return DataLoader(chosen, self._evaluation_size, collate_fn=collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The rows of `val_source`; an empty list without one."""
        return [] if self.hparams.val_source is None else self._evaluation_loader("val_source")

    def test_dataloader(self) -> DataLoader:
        """The rows of `test_source`."""
        return self._evaluation_loader("test_source")

    @property
    def deciding(self) -> Settings:
        """The settings that decide which batches a position in the training data refers to."""
        given = self.hparams
        if given.train_source is None:
            return {}
        source = (given.train_source, [Path(given.train_source).name, len(self._rows("train_source"))])
        named = ("batch_size", "seed", "task", "text", "text_pair", "label", "max_length", "prefix")
        settings: dict[str, tuple[Any, Any]] = {name: (given[name], given[name]) for name in named}
        return settings | {
            "train_source": source,
            "tokenizer": (given.tokenizer, vocabulary_digest(self.tokenizer)),
        }

    def batches_in_epoch(self, ranks: int) -> float:
        """The number of batches per rank in an epoch."""
        return math.ceil(len(self._rows("train_source")) // ranks / self.hparams.batch_size)

    @cached_property
    def _columns(self) -> Columns:
        given = self.hparams
        low, high = given.score_range
        if self.tokenizer.pad_token is None:
            raise ConfigError("the tokenizer has no token that pads: set its pad_token")
        return Columns(
            tokenizer=self.tokenizer,
            task=given.task,
            text=given.text,
            text_pair=given.text_pair,
            label=given.label,
            class_names=self.class_names,
            score_range=(low, high),
            prefix=given.prefix,
            max_length=given.max_length,
            max_label_length=given.max_label_length or given.max_length,
        )

    @property
    def _evaluation_size(self) -> int:
        return self.hparams.evaluation_batch_size or self.hparams.batch_size

    def _settings(self) -> dict[str, Any]:
        return {"collate_fn": partial(encode, columns=self._columns), "num_workers": self.hparams.num_workers}

    def _evaluation_loader(self, name: str) -> DataLoader:
        return DataLoader(self._rows(name), self._evaluation_size, **self._settings())  # type: ignore[arg-type]

    def _first_source(self) -> str:
        return next((name for name in _SOURCES if self.hparams[name] is not None), "train_source")

    def _rows(self, name: str) -> Dataset:
        given = self.hparams
        source = given[name]
        if source is None:
            raise ConfigError(f"{type(self).__name__} has no {name}: name the rows to read")
        if source not in self._opened:
            columns = [given.text, given.label, *([given.text_pair] if given.text_pair is not None else [])]
            self._opened[source] = open_rows(source, columns)
        return self._opened[source]


class _TrainingLoader(DataLoader[Row]):
    """A loader that starts at the position of a resumed run."""

    def __init__(self, position: Any, *args: Any, **settings: Any) -> None:
        self.position = position
        super().__init__(*args, **settings)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        self.sampler.start(self.position())  # type: ignore[attr-defined]
        return super().__iter__()  # type: ignore[return-value]


def _check(settings: dict[str, Any]) -> None:
    counts = ("max_length", "batch_size", "calibration_samples")
    check_counts(settings, counts, optional=("max_label_length", "evaluation_batch_size"))
    tasks = get_args(Task)
    if settings["task"] not in tasks:
        raise ConfigError(f"unknown task {settings['task']!r}: the choices are {', '.join(tasks)}")
    if settings["task"] == "pairs" and settings["text_pair"] is None:
        raise ConfigError('the task "pairs" needs text_pair, the column of the second text')
    low, high = settings["score_range"]
    if not low < high:
        raise ConfigError(f"score_range is {settings['score_range']}: the lowest score and then the highest")
