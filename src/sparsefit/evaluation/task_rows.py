"""Reading files of evaluation items as rows with the fields that the harness's tasks expect.

A file has JSON lines, either with the fields of the task's data set on the hub, or in the format of llm-foundry: for
most tasks {"query": text, "choices": [texts], "gold": number of the right one}. The harness builds its prompts from the
former, so the latter is converted back; a line that cannot be converted is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from sparsefit.errors import DataError

Row = dict[str, Any]

_BOOLQ = re.compile(r"Passage: (.*)\nQuestion: (.*)\?", re.DOTALL)  # of several such lines the last one asks


@dataclass(frozen=True)
class TaskFile:
    """How the file of a task of the harness is read.

    Args:
        pattern: the pattern of the file's name.
        split: the split of the data set that the harness evaluates on.
        row: converts the object of a line to the fields of the data set; raises a DataError that says what is wrong.
        form: these fields, for error messages.
    """

    pattern: str
    split: str
    row: Callable[[Mapping[str, Any]], Row]
    form: str


def boolq_row(line: Mapping[str, Any]) -> Row:
    """{passage, question, label}, from llm-foundry's "Passage: ...\\nQuestion: ...?" or from the same fields.

    llm-foundry's file has "\\nQuestion" wherever a passage had " question": that is undone. It lacks the titles that
    the data set on the hub puts before each passage ("Ethanol fuel -- ...").

    >>> boolq_row({"query": "Passage: It is so.\\nQuestion: is it so?", "choices": ["no", "yes"], "gold": 1})
    {'passage': 'It is so.', 'question': 'is it so', 'label': 1}
    """
    if "query" not in line:
        return {"passage": _text(line, "passage"), "question": _text(line, "question"), "label": _label(line, 2)}
    parts = _BOOLQ.fullmatch(_text(line, "query"))
    if parts is None:
        raise DataError("the query is not 'Passage: ...', a line break, 'Question: ...?'")
    choices, gold = _choices(line)
    if choices != ["no", "yes"]:
        raise DataError(f"the choices are {choices} and not ['no', 'yes']")
    return {"passage": parts[1].replace("\nQuestion", " question"), "question": parts[2], "label": gold}


def rte_row(line: Mapping[str, Any]) -> Row:
    """{sentence1, sentence2, label}; label 0 means that the second sentence follows from the first.

    >>> rte_row({"idx": 0, "sentence1": "It rains.", "sentence2": "It is wet.", "label": 0})
    {'sentence1': 'It rains.', 'sentence2': 'It is wet.', 'label': 0}
    """
    row = {"sentence1": _text(line, "sentence1"), "sentence2": _text(line, "sentence2"), "label": _label(line, 2)}
    name = ("entailment", "not_entailment")[row["label"]]
    if line.get("label_name", name) != name:  # some copies of the data have the labels reversed
        raise DataError(f"the label is {row['label']} and its name {line['label_name']!r}: 0 is 'entailment'")
    return row


def hellaswag_row(line: Mapping[str, Any]) -> Row:
    """{activity_label, ctx_a, ctx_b, endings, label}, with the label as text, as on the hub.

    >>> line = {"activity_label": "Rowing", "ctx_a": "He rows.", "ctx_b": "he", "endings": ["stops.", "flies."]}
    >>> hellaswag_row(line | {"label": 0})["label"]
    '0'
    """
    if "query" in line:
        raise DataError("it has a query, which the harness's own cleaning of the text has gone through already")
    endings = _texts(line, "endings")
    row = {key: _text(line, key) for key in ("activity_label", "ctx_a", "ctx_b")}
    return row | {"endings": endings, "label": str(_label(line, len(endings)))}


def winogrande_row(line: Mapping[str, Any]) -> Row:
    """{sentence, option1, option2, answer}, where "_" in the sentence stands for the option.

    llm-foundry has the sentence up to and including each option, and its end. The common beginning, in whole words, is
    that of the sentence; so each context and continuation of the harness is exactly the text of the file.

    >>> row = winogrande_row({"context_options": ["So Ann", "So Bo"], "continuation": "won.", "gold": 1})
    >>> row["sentence"], row["option1"], row["option2"], row["answer"]
    ('So _ won.', 'Ann', 'Bo', '2')
    """
    if "context_options" not in line:
        row = {key: _text(line, key) for key in ("sentence", "option1", "option2", "answer")}
        if "_" not in row["sentence"] or row["answer"] not in ("1", "2"):
            raise DataError("the sentence has no '_' for the option, or the answer is not '1' or '2'")
        return row
    contexts, continuation = _texts(line, "context_options"), _text(line, "continuation")
    if len(contexts) != 2 or contexts[0] == contexts[1]:
        raise DataError("there are not two different context_options")
    if any("_" in text for text in (*contexts, continuation)):
        raise DataError("a text holds '_', which marks the place of the option")
    begin = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*contexts, strict=False)))
    begin = begin[: begin.rfind(" ") + 1]
    first, second = (context[len(begin) :] for context in contexts)
    if not first or not second:
        raise DataError("one of context_options is the beginning of the other and no option is left")
    answer = str(_gold(line, 2) + 1)
    return {"sentence": f"{begin}_ {continuation}", "option1": first, "option2": second, "answer": answer}


def arc_row(line: Mapping[str, Any]) -> Row:
    """{question, choices: {text, label}, answerKey}; llm-foundry's query is "Question: " and the question.

    >>> row = arc_row({"query": "Question: What is wet?", "choices": ["rain", "sand"], "gold": 0})
    >>> row["question"], row["choices"]["text"], row["answerKey"]
    ('What is wet?', ['rain', 'sand'], 'A')
    """
    if "query" not in line:
        return {"question": _text(line, "question")} | _lettered_row(line)
    query = _text(line, "query")
    if not query.startswith("Question: "):
        raise DataError("the query does not begin with 'Question: '")
    return {"question": query.removeprefix("Question: ")} | _lettered(*_choices(line))


def openbookqa_row(line: Mapping[str, Any]) -> Row:
    """{question_stem, choices: {text, label}, answerKey}; llm-foundry's query is the stem.

    >>> openbookqa_row({"query": "Predators eat", "choices": ["lions", "bunnies"], "gold": 1})["answerKey"]
    'B'
    """
    if "query" not in line:
        return {"question_stem": _text(line, "question_stem")} | _lettered_row(line)
    return {"question_stem": _text(line, "query")} | _lettered(*_choices(line))


_FOUNDRY = "or llm-foundry's query, choices, gold"
TASK_FILES = {
    "boolq": TaskFile("boolq*", "validation", boolq_row, f"passage, question, label, {_FOUNDRY}"),
    "rte": TaskFile("rte*", "validation", rte_row, "sentence1, sentence2, label"),
    "hellaswag": TaskFile(
        "hellaswag*", "validation", hellaswag_row, "the original activity_label, ctx_a, ctx_b, endings, label"
    ),
    "winogrande": TaskFile(
        "winogrande*",
        "validation",
        winogrande_row,
        "sentence, option1, option2, answer, or llm-foundry's context_options, continuation, gold",
    ),
    "arc_easy": TaskFile("arc_easy*", "test", arc_row, f"question, choices, answerKey, {_FOUNDRY}"),
    "arc_challenge": TaskFile("arc_challenge*", "test", arc_row, f"question, choices, answerKey, {_FOUNDRY}"),
    "openbookqa": TaskFile("openbook*qa*", "test", openbookqa_row, f"question_stem, choices, answerKey, {_FOUNDRY}"),
}
"""The tasks that can be read from local files, by the harness's names."""


def task_file(task: str, folder: Path) -> Path:
    """The file of a task in a folder: the only one whose name matches the task's pattern.

    Raises:
        DataError: for a task that cannot be read from a file, or if there is no file or more than one.
    """
    if task not in TASK_FILES:
        raise DataError(f"there is no local form of the task {task!r}: a folder serves {', '.join(TASK_FILES)}")
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} with the files of the tasks")
    pattern = f"{TASK_FILES[task].pattern}.jsonl"
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        there = ", ".join(file.name for file in found or sorted(folder.glob("*.jsonl"))) or "no .jsonl file"
        raise DataError(
            f"{folder} holds {len(found) or 'no'} files {pattern} for the task {task}, and one is wanted. There: "
            f"{there}"
        )
    return found[0]


def read_rows(task: str, path: Path) -> list[Row]:
    """The rows of a task's file.

    Raises:
        DataError: if it cannot be read, is empty, or a line is not an item of the task; names the line.
    """
    kind = TASK_FILES[task]
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    rows = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise DataError("it is no JSON object")
            rows.append(kind.row(line))
        except ValueError as error:  # from json, or from `kind.row`
            raise DataError(f"{path}, line {number} is no item of {task}: {error}. An item has {kind.form}") from error
    if not rows:
        raise DataError(f"{path} holds no items of {task}")
    return rows


def _text(line: Mapping[str, Any], key: str) -> str:
    if not isinstance(line.get(key), str):
        raise DataError(f"it has no text {key!r}")
    return line[key]


def _texts(line: Mapping[str, Any], key: str) -> list[str]:
    texts = line.get(key)
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
        raise DataError(f"{key!r} is no list of two or more texts")
    return texts


def _label(line: Mapping[str, Any], count: int, key: str = "label") -> int:
    label = line.get(key)
    number = int(label) if isinstance(label, int) or (isinstance(label, str) and label.isdigit()) else -1
    if not 0 <= number < count:
        raise DataError(f"{key!r} is {label!r} and not a number from 0 to {count - 1}")
    return number


def _gold(line: Mapping[str, Any], count: int) -> int:
    return _label(line, count, "gold")


def _choices(line: Mapping[str, Any]) -> tuple[list[str], int]:
    choices = _texts(line, "choices")
    return choices, _gold(line, len(choices))


def _lettered(choices: list[str], gold: int) -> Row:
    letters = [chr(ord("A") + place) for place in range(len(choices))]
    return {"choices": {"text": choices, "label": letters}, "answerKey": letters[gold]}


def _lettered_row(line: Mapping[str, Any]) -> Row:
    choices = line.get("choices")
    if not isinstance(choices, dict):
        raise DataError("'choices' is no object with text and label")
    texts, labels, answer = _texts(choices, "text"), _texts(choices, "label"), _text(line, "answerKey").lstrip()
    if len(texts) != len(labels) or answer not in labels:
        raise DataError("'choices' does not have as many labels as texts, or the answerKey is not one of them")
    return {"choices": {"text": texts, "label": labels}, "answerKey": answer}
