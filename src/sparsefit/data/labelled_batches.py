"""Batches of labelled text: tokenized rows and their labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from sparsefit.data.labelled_rows import number_of
from sparsefit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Task = Literal["sequence_classification", "token_classification", "seq2seq", "pairs"]
Row: TypeAlias = dict[str, Any]
IGNORED = -100


@dataclass(frozen=True)
class Columns:
    """The columns of texts and labels, and how they are encoded; see `LabelledTextDataModule`."""

    tokenizer: PreTrainedTokenizerBase
    task: Task
    text: str
    text_pair: str | None
    label: str
    class_names: list[str] | None
    score_range: tuple[float, float]
    prefix: str
    max_length: int
    max_label_length: int


def encode(rows: list[Row], columns: Columns) -> dict[str, Tensor]:
    """Encode rows as a batch: the tokenizer's outputs, and `labels`.

    Raises:
        DataError: for a row without a text or a label, or with an invalid label.
    """
    if columns.task == "token_classification":
        return _classes_of_words(rows, columns)
    if columns.task == "pairs":
        both = _tokens([*_texts(rows, columns.text, columns), *_texts(rows, str(columns.text_pair), columns)], columns)
        # (2 * batch, length) -> (batch, 2, length)
        inputs = {name: torch.stack(tensor.chunk(2), dim=1) for name, tensor in both.items()}
        return inputs | {"labels": torch.tensor([_score(row, columns) for row in rows])}
    pair = None
    if columns.text_pair is not None:
        pair = [_text(row, columns.text_pair) for row in rows]
    inputs = _tokens(_texts(rows, columns.text, columns), columns, pair)
    if columns.task == "seq2seq":
        return inputs | {"labels": _texts_to_write(rows, columns)}
    labels = [number_of(row[columns.label], columns.class_names, _shown(row, columns.text)) for row in rows]
    return inputs | {"labels": torch.tensor(labels)}


def encode_for_calibration(chosen: list[tuple[Row, str]], columns: Columns) -> dict[str, Tensor]:
    """Encode texts, each given by a row and its column, as a batch; texts of pairs are separate samples. Labels are
    included only for a decoder."""
    rows = [row for row, _ in chosen]
    if columns.task == "pairs":
        return _tokens([columns.prefix + _text(row, column) for row, column in chosen], columns)
    batch = encode(rows, columns)
    return batch if columns.task == "seq2seq" else {name: t for name, t in batch.items() if name != "labels"}


def _tokens(texts: list[str], columns: Columns, pair: list[str] | None = None) -> dict[str, Tensor]:
    settings = {"truncation": True, "max_length": columns.max_length, "padding": True, "return_tensors": "pt"}
    return dict(columns.tokenizer(texts, pair, **settings))


def _texts_to_write(rows: list[Row], columns: Columns) -> Tensor:
    targets = [_text(row, columns.label) for row in rows]
    settings = {"truncation": True, "max_length": columns.max_label_length, "padding": True, "return_tensors": "pt"}
    found = columns.tokenizer(text_target=targets, **settings)
    return found["input_ids"].masked_fill(found["attention_mask"] == 0, IGNORED)


def _classes_of_words(rows: list[Row], columns: Columns) -> dict[str, Tensor]:
    """Encode rows of words; the class of a word is the label of its first token."""
    if not columns.tokenizer.is_fast:
        raise ConfigError(
            f"{type(columns.tokenizer).__name__} does not tell which word a token is of: token classification needs a "
            "fast tokenizer (tokenizer.json)"
        )
    for row in rows:
        words, labels = row[columns.text], row[columns.label]
        if not isinstance(words, list) or not isinstance(labels, list) or len(words) != len(labels):
            raise DataError(
                f"{_shown(row, columns.text)} is no list of words with a label for each: {columns.text!r} and "
                f"{columns.label!r} must be lists of the same length"
            )
    settings = {"truncation": True, "max_length": columns.max_length, "padding": True, "return_tensors": "pt"}
    found = columns.tokenizer([row[columns.text] for row in rows], is_split_into_words=True, **settings)
    labels = torch.full_like(found["input_ids"], IGNORED)  # (batch, length)
    for place, row in enumerate(rows):
        numbers = [number_of(label, columns.class_names, _shown(row, columns.text)) for label in row[columns.label]]
        before = None
        for position, word in enumerate(found.word_ids(place)):
            if word is not None and word != before:
                labels[place, position] = numbers[word]
            before = word
    return {name: found[name] for name in found} | {"labels": labels}


def _score(row: Row, columns: Columns) -> float:
    """The score of a pair, scaled from score_range to [0, 1], or to [-1, 1] if the lowest score is below 0."""
    (low, high), score = columns.score_range, row[columns.label]
    if not isinstance(score, int | float) or not low <= score <= high:
        raise DataError(
            f"{_shown(row, columns.text)} has the score {score!r}, and score_range is {low} to {high}: set score_range"
        )
    share = (score - low) / (high - low)
    return 2 * share - 1 if low < 0 else share


def _texts(rows: list[Row], column: str, columns: Columns) -> list[str]:
    return [columns.prefix + _text(row, column) for row in rows]


def _text(row: Row, column: str) -> str:
    if not isinstance(row[column], str):
        raise DataError(f"the column {column!r} holds {row[column]!r:.60} where a text is wanted: name another column")
    return row[column]


def _shown(row: Row, column: str) -> str:
    return f"the row with {row[column]!r:.60}"
