"""Sources of text: a string names a source, which is read as a stream of documents.

| source | documents |
|---|---|
| `c4:calibration`, `c4:train`, `c4:validation` | C4 `en` on the hub: its first training shard, its other ones, \
its first validation shard |
| `wikitext:train`, `wikitext:validation`, `wikitext:test` | WikiText-2 raw on the hub, a document for each article |
| `wikitext:FILE` | the same from a raw text file (`wiki.test.raw`) |
| `python-docs:train`, `:calibration`, `:test` | Python's own documentation, a document for each module |
| a `.jsonl`, `.json`, `.jsonl.gz` or `.json.gz` file | the field `text` of each line, as in C4's own files |
| any other file | the whole file is one document |
| a folder or a pattern (`texts/*.txt`) | its files, by name |

`SOURCE[start:stop]` takes a part of the documents: `c4.jsonl[:900]` for training, `c4.jsonl[900:]` for testing.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import fsspec

from sparsefit.data import python_docs
from sparsefit.data.source_slices import split_slice
from sparsefit.errors import ConfigError, DataError, SparsefitError
from sparsefit.modules.lookup_hints import hub_problem, nearest_path

_JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_TEXT_SUFFIXES = (".txt", ".md", ".rst")
_HUB = "hf://datasets/"
_C4 = _HUB + "allenai/c4/en/c4-"
_C4_SHARDS = {
    "calibration": [f"{_C4}train.00000-of-01024.json.gz"],
    "train": [f"{_C4}train.{shard:05d}-of-01024.json.gz" for shard in range(1, 1024)],
    "validation": [f"{_C4}validation.00000-of-00008.json.gz"],
}
_WIKITEXT = _HUB + "Salesforce/wikitext/wikitext-2-raw-v1/{split}-00000-of-00001.parquet"
_WIKITEXT_SPLITS = ("train", "validation", "test")
_ARTICLE = re.compile(r" = (?!= )[^\n]+ = \n?")  # ' = Title = '; sections have ' = = Title = = '


class Document(NamedTuple):
    """A text and its name: (location of its shard, its number there)."""

    name: tuple[str, int]
    text: str


@dataclass(frozen=True)
class Shard:
    """A file of documents, or a part of one.

    Args:
        kind: how it is read: "json", "file", "wikitext" or "python-docs".
        location: a path, an `hf://` URL, or a part of Python's documentation.
        start: the number of its first document.
        stop: the number after its last document; None takes all.
    """

    kind: str
    location: str
    start: int = 0
    stop: int | None = None

    def overlaps(self, other: Shard) -> bool:
        """Whether the two shards share documents."""
        if (self.kind, self.location) != (other.kind, other.location):
            return False
        return (self.stop is None or other.start < self.stop) and (other.stop is None or self.start < other.stop)


def shards_of(source: str | Iterable[str], text_kind: str = "file") -> list[Shard]:
    """The shards of a source, or of several. Checks that files exist, but does not contact the hub.

    Args:
        source: one source or several; see the module's table.
        text_kind: how a plain text file is read: "file" or "wikitext".

    Raises:
        DataError: for files that are missing or empty.
        ConfigError: for an invalid source.
    """
    sources = [source] if isinstance(source, str) else list(source)
    shards = [shard for one in sources for shard in _shards_of_one(str(one), text_kind)]
    if not shards:
        raise ConfigError("no source of text is given: name files, or c4:train, wikitext:train, python-docs:train")
    return shards


def documents(shards: Iterable[Shard]) -> Iterator[Document]:
    """All documents of the shards, in order, read lazily.

    Raises:
        DataError: if a file cannot be read; names the file and, if possible, the line.
    """
    for shard in shards:
        texts = islice(_READERS[shard.kind](shard.location), shard.start, shard.stop)
        for number, text in enumerate(texts, shard.start):
            yield Document((shard.location, number), text)


def wikitext_as_one(shard: Shard) -> str:
    """WikiText's rows joined by two newlines: the text on which perplexities are published. A slice takes articles."""
    articles = islice(_rows_of_articles(shard.location), shard.start, shard.stop)
    return "\n\n".join(row for rows in articles for row in rows)


def _shards_of_one(source: str, text_kind: str) -> list[Shard]:
    name, start, stop = split_slice(source, "document")
    kind, _, rest = name.partition(":")
    if kind == "c4" and rest in _C4_SHARDS:
        shards = [Shard("json", location) for location in _C4_SHARDS[rest]]
    elif kind == "wikitext" and rest in _WIKITEXT_SPLITS:
        shards = [Shard("wikitext", _WIKITEXT.format(split=rest))]
    elif kind == "python-docs" and rest in python_docs.PARTS:
        shards = [Shard("python-docs", rest)]
    elif kind == "wikitext" and rest:
        shards = [Shard("wikitext", location) for location in _files_of(rest)]
    elif kind == "c4" and rest:
        shards = [Shard("json", location) for location in _files_of(rest)]
    elif kind in (parts := {"c4": _C4_SHARDS, "wikitext": _WIKITEXT_SPLITS, "python-docs": python_docs.PARTS}):
        parts = [f"{kind}:{part}" for part in parts[kind]]
        raise ConfigError(f"unknown source {source!r}: use {', '.join(parts)}")
    else:
        shards = [
            Shard("json" if file.endswith(_JSON_SUFFIXES) else text_kind, location=file) for file in _files_of(name)
        ]
    if (start, stop) == (0, None):
        return shards
    return _slice(shards, start, stop, source)


def _slice(shards: list[Shard], start: int, stop: int | None, source: str) -> list[Shard]:
    if all(shard.kind == "file" for shard in shards):
        if start >= len(shards):
            raise DataError(f"{source!r} takes no document: there are {len(shards)} files")
        return shards[start:stop]
    if len(shards) > 1:
        raise ConfigError(f"{source!r} takes a part of {len(shards)} files: give each file its own [start:stop]")
    return [replace(shards[0], start=start, stop=stop)]


def _files_of(name: str) -> list[str]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = [str(file) for file in sorted(path.rglob("*")) if file.name.endswith(_JSON_SUFFIXES + _TEXT_SUFFIXES)]
        if not files:
            raise DataError(f"the folder {path} holds no text: no file ends in {', '.join(_TEXT_SUFFIXES)} or .jsonl")
    elif path.exists():
        files = [str(path)]
    else:
        files = sorted(glob.glob(str(path), recursive=True))
        if not files:
            raise DataError(f"there is no file {path} to read text from.{nearest_path(path)}")
    for file in files:
        if Path(file).stat().st_size == 0:
            raise DataError(f"{file} is empty: remove it from the sources, or fetch it again")
    return [str(Path(file).resolve()) for file in files]


def _json_lines(location: str) -> Iterator[str]:
    # Not with `datasets`: inside a loader's worker its streams divide their files among the workers once more, so that
    # all but the first would read nothing of a single file; it infers a schema from the first 10 MB, and cannot name
    # the number of a bad line.
    with (
        _reading(location),
        fsspec.open(_address(location), "rt", encoding="utf-8", compression="infer", newline="\n") as file,
    ):
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _text_of_line(line, location, number)


def _text_of_line(line: str, location: str, number: int) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{location}, line {number} is not JSON: {error.msg} at column {error.colno}. Each line must be one "
            'record such as {"text": "…"}; a file that was cut short must be fetched again.'
        ) from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise DataError(f'{location}, line {number} has no string in the field "text": it has {fields}')
    return text


def _whole_file(location: str) -> Iterator[str]:
    yield _read_file(location)


def _read_file(location: str) -> str:
    try:
        # newline="" keeps a lone "\r": only "\n" separates WikiText's rows
        with open(location, encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise DataError(f"{location} is not UTF-8 text: {error}. Convert it, or leave it out.") from error
    except OSError as error:
        raise DataError(f"{location} cannot be read: {error}") from error


def _wikitext_rows(location: str) -> list[str]:
    """Rows as on the hub: a line with its newline, or the empty string for a blank line."""
    if not location.endswith(".parquet"):
        lines = _read_file(location).split("\n")
        rows = [line + "\n" for line in lines[:-1]] + lines[-1:] * bool(lines[-1])
        return [row if row.strip() else "" for row in rows]
    from datasets import load_dataset

    with _reading(location):
        return list(load_dataset("parquet", data_files=_address(location), split="train", streaming=True)["text"])


def _rows_of_articles(location: str) -> Iterator[list[str]]:
    """The rows of each article; blank rows before the first title belong to the first article."""
    article: list[str] = []
    for row in _wikitext_rows(location):
        if _ARTICLE.fullmatch(row) and any(article):
            yield article
            article = []
        article.append(row)
    yield article


def _wikitext_articles(location: str) -> Iterator[str]:
    return ("".join(article) for article in _rows_of_articles(location) if any(article))


@contextmanager
def _reading(location: str) -> Iterator[None]:
    """Turns errors of a reader into a DataError that names the file."""
    try:
        yield
    except SparsefitError:
        raise
    except Exception as error:  # errors of compression, Parquet, files and the network have no common base class
        raise DataError(f"{location} cannot be read: {error or type(error).__name__}. {_way_out(location)}") from error


def _address(location: str) -> str:
    """The path or URL to read a location from: the local cache of a hub file, else the hub, which must be reachable."""
    if not location.startswith(_HUB):
        return location
    from huggingface_hub import try_to_load_from_cache

    repository, file = _hub_parts(location)
    cached = try_to_load_from_cache(repository, file, repo_type="dataset")
    if isinstance(cached, str):
        return cached
    if problem := hub_problem():
        raise DataError(
            f"{file} of the data set {repository} is not in the local cache and cannot be fetched: {problem}. "
            f"{_way_out(location)}"
        )
    return location


def _hub_parts(location: str) -> tuple[str, str]:
    owner, name, file = location.removeprefix(_HUB).split("/", 2)
    return f"{owner}/{name}", file


def _way_out(location: str) -> str:
    if not location.startswith(_HUB):
        return "Fetch the file again."
    repository, file = _hub_parts(location)
    kind = "c4" if "c4" in repository else "wikitext"
    return (
        f"Without a network: on a connected machine run `hf download {repository} {file} --repo-type dataset "
        f"--local-dir FOLDER`, copy the file here, and name it as the source: "
        + ("its path." if kind == "c4" else "wikitext: and the path of the raw text (wiki.test.raw) or this file.")
    )


_READERS: dict[str, Callable[[str], Iterator[str]]] = {
    "json": _json_lines,
    "file": _whole_file,
    "wikitext": _wikitext_articles,
    "python-docs": lambda part: iter(python_docs.documents(part)),
}
