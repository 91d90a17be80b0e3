"""LightningDataModules of text for causal language models: training, calibration, validation and test windows."""

from __future__ import annotations

from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from sparsefit.data.count_settings import check_counts
from sparsefit.data.data_position import Settings, text_digest, vocabulary_digest
from sparsefit.data.resumable_data import ResumableDataModule
from sparsefit.data.text import Shard, documents, shards_of
from sparsefit.data.windows import (
    Calibration,
    PackedText,
    Windows,
    calibration_windows,
    end_of,
    evaluation_windows,
    loader,
)
from sparsefit.errors import CalibrationError, ConfigError, DataError
from sparsefit.modules.loading import load_tokenizer
from sparsefit.settings import as_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DECIDING = ("sequence_length", "batch_size", "shuffle_buffer", "seed")  # with the text, these decide the windows


class TextDataModule(ResumableDataModule):
    """Windows of text; each batch is {"input_ids": int64 (batch, length)}, without padding.

    A source is a file, a folder, a pattern, or one of `c4:train`, `c4:calibration`, `c4:validation`,
    `wikitext:train`, `wikitext:validation`, `wikitext:test`, `wikitext:FILE`, `python-docs:train`,
    `python-docs:calibration`, `python-docs:test`. `SOURCE[start:stop]` takes a part of its documents:
    `c4.jsonl[:900]` to train on, `c4.jsonl[900:]` to test on.

    Documents that calibration draws are never trained on.

    Args:
        tokenizer: "tiny-llama", a folder, a .gguf file or a hub name; in Python also a tokenizer.
        train_source: text to train on.
        calibration_source: text to calibrate on; None takes the training text.
        val_source: text to validate on; None validates on nothing.
        test_source: text to test on.
        sequence_length: tokens in a training window.
        calibration_length: tokens in a calibration window; None takes `sequence_length`.
        evaluation_length: tokens in a validation or test window; None takes `sequence_length`.
        batch_size: windows in a training, validation or test batch.
        calibration_batch_size: windows in a calibration batch.
        calibration_samples: calibration windows.
        calibration: "crop" draws long documents and crops them, as the papers do; "pack" joins documents.
        val_windows: the maximum number of validation windows.
        test_windows: the maximum number of test windows; None uses all.
        shuffle_buffer: documents, and windows, that the shuffling of the training text keeps in memory.
        seed: the seed of all random draws; the same seed gives the same windows.
        num_workers: processes that read and tokenise the training text.
    """

    text_kind: str = "file"
    """How a plain text file is read: as a "file" (one document) or as "wikitext"."""

    def __init__(
        self,
        tokenizer: str,
        train_source: str | list[str] | None = None,
        calibration_source: str | list[str] | None = None,
        val_source: str | list[str] | None = None,
        test_source: str | list[str] | None = None,
        sequence_length: int = 1024,
        calibration_length: int | None = None,
        evaluation_length: int | None = None,
        batch_size: int = 8,
        calibration_batch_size: int = 8,
        calibration_samples: int = 128,
        calibration: Literal["crop", "pack"] = "crop",
        val_windows: int = 64,
        test_windows: int | None = None,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        tokenizer = as_text(tokenizer)
        settings = {name: as_text(value) for name, value in locals().items() if name not in ("self", "__class__")}
        _check(settings)
        self._drawn: dict[int, Calibration] = {}  # by seed
        self._evaluated: dict[tuple[str, int, int | None], list[Tensor]] = {}  # a run evaluates several models
        named = isinstance(tokenizer, str)
        self.save_hyperparameters(settings | {"tokenizer": tokenizer if named else type(tokenizer).__name__})
        if not named:
            self.tokenizer = tokenizer

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when it is first needed."""
        return load_tokenizer(self.hparams.tokenizer)

    def setup(self, stage: str | None = None) -> None:
        """Finds the sources that the stage needs, so that missing files raise before a model is changed."""
        end_of(self.tokenizer)
        if stage in ("fit", None) and self.hparams.train_source is not None:
            train = self._shards("train_source")
            self._shards("calibration_source")
            for name in ("val_source", "test_source"):
                if self.hparams[name] is not None and _overlap(train, self._shards(name)):
                    rank_zero_warn(f"train_source and {name} share documents: use FILE[start:stop] to part them")
        if stage == "test":
            self._shards("test_source")

    def train_dataloader(self) -> DataLoader:
        """One epoch of shuffled windows, read as a stream; each epoch has another order."""
        rank, world_size = self.rank_and_world_size()
        shards, excluded = self._shards("train_source"), self._calibration_documents()
        if self.trainer is None or 0 not in (self.trainer.max_steps, self.trainer.max_epochs):
            self._check_text("train_source", shards, excluded)
        windows = PackedText(
            shards,
            self.tokenizer,
            self.hparams.sequence_length,
            self.hparams.seed,
            excluded,
            rank,
            world_size,
            self.hparams.shuffle_buffer,
        )
        return loader(windows, self.hparams.batch_size, self.hparams.num_workers, self.position)

    def calibration_dataloader(self) -> DataLoader:
        """Exactly `calibration_samples` windows: the same for the same seed, and on every rank.

        Raises:
            CalibrationError: if the text is too short.
        """
        return loader(Windows(self._calibration.windows), self.hparams.calibration_batch_size, num_workers=0)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The first `val_windows` windows of the validation text; an empty list without a validation text."""
        if self.hparams.val_source is None:
            return []
        return self._evaluation_loader("val_source", self.hparams.val_windows)

    def test_dataloader(self) -> DataLoader:
        """The test text in non-overlapping windows, the remainder dropped."""
        return self._evaluation_loader("test_source", self.hparams.test_windows)

    @cached_property
    def deciding(self) -> Settings:
        """The settings that decide which windows a position in the training data refers to."""
        if self.hparams.train_source is None:  # a subclass with other training data
            return {}
        given, train = self.hparams, self._shards("train_source")
        settings: dict[str, tuple[Any, Any]] = {name: (given[name], given[name]) for name in _DECIDING}
        settings["tokenizer"] = (given.tokenizer, vocabulary_digest(self.tokenizer))
        settings["train_source"] = (given.train_source, text_digest(train))
        settings["num_workers"] = (given.num_workers, max(1, given.num_workers))  # one worker reads as none does
        # What calibration draws is left out of the training text.
        calibration = self._shards("calibration_source")
        drawn = {name: given[name] for name in ("calibration", "calibration_samples", "calibration_length")}
        drawn["calibration_length"] = given.calibration_length or given.sequence_length
        drawn["calibration_source"] = text_digest(calibration)
        apart = not _overlap(train, calibration)
        return settings | {name: (given[name], None if apart else value) for name, value in drawn.items()}

    @property
    def _calibration(self) -> Calibration:
        """The calibration windows of the current seed; a study uses several seeds."""
        settings = self.hparams
        if settings.seed not in self._drawn:
            self._drawn[settings.seed] = calibration_windows(
                self._shards("calibration_source"),
                self.tokenizer,
                settings.calibration_samples,
                settings.calibration_length or settings.sequence_length,
                settings.calibration,
                settings.seed,
            )
        return self._drawn[settings.seed]

    def _calibration_documents(self) -> frozenset[tuple[str, int]]:
        if not _overlap(self._shards("train_source"), self._shards("calibration_source")):
            return frozenset()
        try:
            return self._calibration.used
        except CalibrationError:  # nothing can be calibrated on this text, so nothing is left out
            return frozenset()

    def _evaluation_loader(self, name: str, limit: int | None) -> DataLoader:
        length = self.hparams.evaluation_length or self.hparams.sequence_length
        windows = self._evaluation_windows(name, length, limit)
        if not windows:
            raise DataError(
                f"the text of {name} ({self.hparams[name]}) has fewer than the {length} tokens of one window: "
                "add text, or set a shorter evaluation_length"
            )
        return loader(Windows(windows), self.hparams.batch_size, num_workers=0)

    def _evaluation_windows(self, name: str, length: int, limit: int | None) -> list[Tensor]:
        key = name, length, limit
        if key not in self._evaluated:
            shards = self._shards(name)
            self._check_text(name, shards)
            self._evaluated[key] = list(islice(evaluation_windows(shards, self.tokenizer, length), limit))
        return self._evaluated[key]

    def _check_text(self, name: str, shards: list[Shard], excluded: frozenset[tuple[str, int]] = frozenset()) -> None:
        """Check that a source has text other than the excluded documents."""
        if any(document.text.strip() for document in documents(shards) if document.name not in excluded):
            return
        raise DataError(
            f"no text of {name} ({self.hparams[name]}) is left to train on: calibration drew its {len(excluded)} "
            "documents. Give calibration_source other text, or train_source more"
            if excluded
            else f"the text of {name} ({self.hparams[name]}) is empty: there is nothing in it but white space"
        )

    def _shards(self, name: str) -> list[Shard]:
        source = self.hparams[name]
        if source is None and name == "calibration_source":
            name, source = "train_source", self.hparams.train_source
        if source is None:
            raise ConfigError(f"{type(self).__name__} has no {name}: name the files (or the source) to read")
        return shards_of(source, self.text_kind)


def _overlap(some: list[Shard], others: list[Shard]) -> bool:
    return any(shard.overlaps(other) for shard in some for other in others if shard.location == other.location)


def _check(settings: dict[str, Any]) -> None:
    counts = ("sequence_length", "batch_size", "calibration_batch_size", "calibration_samples", "val_windows")
    optional = ("calibration_length", "evaluation_length", "test_windows")
    check_counts(settings, (*counts, "shuffle_buffer"), optional)
    if settings["calibration"] not in ("crop", "pack"):
        raise ConfigError(f'calibration is {settings["calibration"]!r}: use "crop" or "pack"')
