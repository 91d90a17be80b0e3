from __future__ import annotations

import gzip
import json
import time

import pyarrow
import pyarrow.parquet
import pytest

from sparsefit.data.text import documents, shards_of, wikitext_as_one
from sparsefit.errors import ConfigError, DataError
from sparsefit.modules import loading


def texts(source, text_kind="file"):
    return [document.text for document in documents(shards_of(source, text_kind))]


def lines(rows):
    return "".join(json.dumps({"text": text, "timestamp": "", "url": ""}, ensure_ascii=False) + "\n" for text in rows)


@pytest.mark.parametrize("name", ["c4.jsonl", "c4.json", "c4.json.gz", "c4.jsonl.gz"])
def test_json_lines_are_documents(tmp_path, name):
    rows = ["one", "two\u2028still two\n\nlines", "drei ä"]
    write = gzip.open if name.endswith("gz") else open
    with write(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write(lines(rows) + "\n")
    assert texts(str(tmp_path / name)) == rows


@pytest.mark.parametrize(("part", "expected"), [("[:2]", "ab"), ("[2:]", "cde"), ("[1:3]", "bc"), ("[:]", "abcde")])
def test_a_slice_takes_a_part_and_keeps_the_numbers(tmp_path, part, expected):
    (tmp_path / "c4.jsonl").write_text(lines("abcde"))
    found = list(documents(shards_of(f"{tmp_path}/c4.jsonl{part}")))
    assert "".join(document.text for document in found) == expected
    assert [document.name[1] for document in found] == ["abcde".index(document.text) for document in found]


def test_folders_patterns_and_lists_of_files(tmp_path):
    for name in ("b.txt", "a.txt", "c.log"):
        (tmp_path / name).write_text(name)
    assert texts(str(tmp_path)) == ["a.txt", "b.txt"]
    assert texts(f"{tmp_path}/*.log") == ["c.log"]
    assert texts([f"{tmp_path}/c.log", f"{tmp_path}/a.txt"]) == ["c.log", "a.txt"]
    assert texts(f"{tmp_path}/*.txt[1:]") == ["b.txt"]


WIKI = " \n = Title = \n \n Text a . \n = = Part = = \n Text b . \n \n = Other = \n Text c . \n"
WIKI_ROWS = [
    "",
    " = Title = \n",
    "",
    " Text a . \n",
    " = = Part = = \n",
    " Text b . \n",
    "",
    " = Other = \n",
    " Text c . \n",
]


@pytest.mark.parametrize("form", ["raw", "parquet"])
def test_wikitext_is_read_by_rows_and_by_articles(tmp_path, form):
    file = tmp_path / f"wiki.{form}"
    if form == "raw":
        file.write_text(WIKI)
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": WIKI_ROWS}), file)
    (shard,) = shards_of(f"wikitext:{file}")
    assert wikitext_as_one(shard) == "\n\n".join(WIKI_ROWS)
    articles = texts(f"wikitext:{file}")
    assert [article.split(" = ")[1] for article in articles] == ["Title", "Other"]
    assert "".join(articles) == "".join(WIKI_ROWS)
    assert texts(str(file), "wikitext") == articles
    (last,) = shards_of(f"wikitext:{file}[1:]")
    assert wikitext_as_one(last) == "\n\n".join(WIKI_ROWS[-2:])


def test_the_wikitext_test_file_has_the_rows_of_the_hub(shared_data):
    (shard,) = shards_of(f"wikitext:{shared_data}/wikitext2/test_raw.txt")
    text = wikitext_as_one(shard)
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")
    assert text.count("\n\n") >= 4357
    assert len(texts(f"wikitext:{shared_data}/wikitext2/test_raw.txt")) in range(55, 70)  # it has about 60 articles


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines("ab") + '{"text": "cut', r"bad\.jsonl, line 3 is not JSON"),
        (lines("a") + '{"content": "b"}\n', r'bad\.jsonl, line 2 has no string in the field "text": it has content'),
        (lines("a") + "[1]\n", r"bad\.jsonl, line 2 .* it has a list"),
        (b"\xff\xfe\x00", r"bad\.jsonl cannot be read: .*utf-8"),
        ("", r"bad\.jsonl is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        texts(str(file))


def test_a_cut_archive_is_named(tmp_path):
    file = tmp_path / "cut.json.gz"
    file.write_bytes(gzip.compress(lines(["text " * 1000] * 100).encode())[:200])
    with pytest.raises(DataError, match=r"cut\.json\.gz cannot be read"):
        texts(str(file))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("{}/c4_trian.jsonl", DataError, r"no file .*c4_trian\.jsonl.*Did you mean .*/c4_train\.jsonl\?"),
        ("{}/none/*.txt", DataError, "no file"),
        ("{}/c4_train.jsonl[3:2]", ConfigError, "its slice ends before it starts"),
        ("c4:tset", DataError, "no file"),
        ("python-docs:tset", ConfigError, "use python-docs:test, python-docs:calibration, python-docs:train"),
        ([], ConfigError, "no source of text"),
        ("", ConfigError, "names no source of documents"),
        (" [3:5]", ConfigError, "names no source of documents"),
        ("wikitext:", ConfigError, "use wikitext:train, wikitext:validation, wikitext:test"),
    ],
)
def test_sources_that_cannot_be_found(tmp_path, source, error, message):
    (tmp_path / "c4_train.jsonl").write_text(lines("abc"))
    with pytest.raises(error, match=message):
        texts(source.format(tmp_path) if isinstance(source, str) else source)


def test_an_empty_folder_and_a_binary_text_file(tmp_path):
    with pytest.raises(DataError, match="holds no text"):
        texts(str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text"):
        texts(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("source", ["c4:calibration", "c4:train", "c4:validation", "wikitext:test"])
def test_an_unreachable_hub_is_reported_at_once(monkeypatch, tmp_path, source):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("sparsefit.data.text.hub_problem", lambda: "http://127.0.0.1:9 cannot be reached: refused")
    start = time.monotonic()
    with pytest.raises(DataError, match=r"not in the local cache and cannot be fetched: .*refused.*hf download"):
        next(documents(shards_of(source)))
    assert time.monotonic() - start < 10


def test_the_hub_is_probed_without_retries(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    problem = loading.hub_problem()
    assert problem is not None
    assert "http://127.0.0.1:9 cannot be reached" in problem
    assert time.monotonic() - start < 8
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert loading.hub_problem() == "HF_HUB_OFFLINE is set"


def test_calibration_and_training_shards_of_c4_differ():
    calibration, train = (shards_of(f"c4:{part}") for part in ("calibration", "train"))
    assert (len(calibration), len(train)) == (1, 1023)
    assert not any(shard.overlaps(calibration[0]) for shard in train)


def test_parts_of_a_file_overlap_where_they_share_a_document(tmp_path):
    file = tmp_path / "c4.jsonl"
    file.write_text(lines("abcde"))
    first, second, whole = (shards_of(f"{file}{part}")[0] for part in ("[:3]", "[3:]", ""))
    assert not first.overlaps(second)
    assert not second.overlaps(first)
    assert whole.overlaps(first)
    assert second.overlaps(whole)
