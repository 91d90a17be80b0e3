from __future__ import annotations

import json

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparsefit.data import LabelledTextDataModule
from sparsefit.errors import CalibrationError, ConfigError, DataError, SparsefitError

LETTERS = [chr(ord("a") + n) for n in range(26)]


@pytest.fixture(scope="module")
def tokenizer():
    """A token a letter: words of several letters are several tokens."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {token: n for n, token in enumerate([*special, *LETTERS])}
    inner = Tokenizer(
        models.WordPiece(vocabulary | {f"##{c}": 30 + n for n, c in enumerate(LETTERS)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(count=10):
    return [{"text": " ".join(LETTERS[: 1 + n % 5]), "label": ["no", "yes"][n % 2], "number": n} for n in range(count)]


def data_of(tokenizer, source, **settings):
    return LabelledTextDataModule(
        tokenizer, train_source=source, **{"batch_size": 4, "calibration_samples": 4} | settings
    )


def rows_of(loader):
    return [
        tuple(ids[mask == 1].tolist())
        for batch in loader
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_texts_and_classes(tmp_path, tokenizer):
    source = write(tmp_path / "rows.jsonl", texts())
    data = data_of(tokenizer, f"{source}[2:]", val_source=f"{source}[:2]")
    data.setup("fit")
    assert data.class_names == ["no", "yes"]
    assert data.num_classes == 2
    (batch,) = data.val_dataloader()
    assert batch["input_ids"].tolist() == [[1, 4, 2, 0], [1, 4, 5, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == 8
    assert all("labels" not in batch for batch in data.calibration_dataloader())


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "jsonl"])
def test_formats(tmp_path, tokenizer, ending):
    table = Dataset.from_list([{"text": row["text"], "label": row["number"] % 3} for row in texts()])
    place = str(tmp_path / f"rows.{ending}")
    if ending in ("csv", "tsv"):
        table.to_csv(place, index=False, sep="\t" if ending == "tsv" else ",")
    else:
        table.to_parquet(place) if ending == "parquet" else table.to_json(place)
    data = data_of(tokenizer, place, test_source=place)
    labels = [int(label) for batch in data.test_dataloader() for label in batch["labels"]]
    assert labels == [n % 3 for n in range(10)]
    assert data.class_names is None


def test_the_names_of_a_column_of_classes_count(tmp_path, tokenizer):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["yes", "no"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).to_parquet(tmp_path / "rows.parquet")
    data = data_of(tokenizer, str(tmp_path / "rows.parquet"), test_source=str(tmp_path / "rows.parquet"))
    assert data.class_names == ["yes", "no"]
    assert next(iter(data.test_dataloader()))["labels"].tolist() == [1, 0]
    given = data_of(tokenizer, write(tmp_path / "rows.jsonl", texts()), class_names=["yes", "no"])
    assert given.class_names == ["yes", "no"]


def test_the_class_of_a_word_stands_at_its_first_token(tmp_path, tokenizer):
    features = Features({"words": List(Value("string")), "tags": List(ClassLabel(names=["o", "name"]))})
    rows = {"words": [["ab", "c", "def"], ["a"]], "tags": [[0, 1, 1], [1]]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    place = str(tmp_path / "rows.parquet")
    settings = {"task": "token_classification", "text": "words", "label": "tags"}
    data = data_of(tokenizer, place, test_source=place, **settings)
    assert data.class_names == ["o", "name"]
    (batch,) = data.test_dataloader()
    assert batch["labels"].tolist() == [[-100, 0, -100, 1, 1, -100, -100, -100], [-100, 1, *[-100] * 6]]
    cut = data_of(tokenizer, place, test_source=place, max_length=4, **settings)
    assert next(iter(cut.test_dataloader()))["labels"].tolist() == [[-100, 0, -100, -100], [-100, 1, -100, -100]]


def test_texts_to_write(tmp_path, tokenizer):
    place = write(tmp_path / "rows.jsonl", [{"de": "a", "en": "b c"}, {"de": "a b", "en": "c"}])
    data = data_of(tokenizer, place, test_source=place, task="seq2seq", text="de", label="en", prefix="x ")
    (batch,) = data.test_dataloader()
    assert batch["input_ids"].tolist() == [[1, 27, 4, 2, 0], [1, 27, 4, 5, 2]]
    assert batch["labels"].tolist() == [[1, 5, 6, 2], [1, 6, 2, -100]]
    data = data_of(tokenizer, place, task="seq2seq", text="de", label="en", calibration_samples=2)
    assert all("labels" in batch for batch in data.calibration_dataloader())  # the decoder reads them


def test_pairs(tmp_path, tokenizer):
    place = write(tmp_path / "rows.jsonl", [{"a": "a b", "b": "c", "s": 5}, {"a": "d", "b": "e", "s": 1}])
    settings = {"task": "pairs", "text": "a", "text_pair": "b", "label": "s"}
    data = data_of(tokenizer, place, test_source=place, score_range=(0, 5), **settings)
    (batch,) = data.test_dataloader()
    assert batch["input_ids"].tolist() == [[[1, 4, 5, 2], [1, 6, 2, 0]], [[1, 7, 2, 0], [1, 8, 2, 0]]]
    assert batch["labels"].tolist() == pytest.approx([1.0, 0.2])
    assert sorted(rows_of(data.calibration_dataloader())) == [(1, 4, 5, 2), (1, 6, 2), (1, 7, 2), (1, 8, 2)]
    with pytest.raises(DataError, match=r"the score 5, and score_range is 0\.0 to 1\.0"):
        list(data_of(tokenizer, place, test_source=place, **settings).test_dataloader())


def test_two_texts_of_a_class(tmp_path, tokenizer):
    place = write(tmp_path / "rows.jsonl", [{"a": "a b", "b": "c", "label": 1}])
    data = data_of(tokenizer, place, test_source=place, text="a", text_pair="b")
    assert next(iter(data.test_dataloader()))["input_ids"].tolist() == [[1, 4, 5, 2, 6, 2]]


def test_the_order_is_the_seeds_and_a_resumed_run_continues(tmp_path, tokenizer):
    rows = [{"text": " ".join([LETTERS[n % 26]] * (1 + n // 26)), "label": 0} for n in range(40)]
    place = write(tmp_path / "rows.jsonl", rows)
    first = data_of(tokenizer, place, seed=1)
    order = rows_of(first.train_dataloader())
    assert len(set(order)) == 40
    assert order == rows_of(data_of(tokenizer, place, seed=1).train_dataloader())
    assert order != rows_of(data_of(tokenizer, place, seed=2).train_dataloader())
    assert order != rows_of(data_of(tokenizer, place).val_dataloader())
    resumed = data_of(tokenizer, place, seed=1)
    resumed.load_state_dict({"epoch": 0, "batches": 3, "settings": {k: list(v) for k, v in first.deciding.items()}})
    assert rows_of(resumed.train_dataloader()) == order[12:]
    resumed.load_state_dict({"epoch": 1, "batches": 0})
    later = rows_of(resumed.train_dataloader())
    assert sorted(later) == sorted(order)
    assert later != order
    other = data_of(tokenizer, place, seed=1, batch_size=5)
    with pytest.raises(ConfigError, match="batch_size"):
        other.load_state_dict({"epoch": 0, "batches": 3, "settings": {k: list(v) for k, v in first.deciding.items()}})


def test_calibration_draws_the_same_texts(tmp_path, tokenizer):
    place = write(tmp_path / "rows.jsonl", texts(20))
    drawn = [rows_of(data_of(tokenizer, place, calibration_samples=7).calibration_dataloader()) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 7
    with pytest.raises(CalibrationError, match="has 20 texts and calibration_samples is 21"):
        data_of(tokenizer, place, calibration_samples=21).calibration_dataloader()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "classification"}, "unknown task 'classification'"),
        ({"task": "pairs"}, "needs text_pair"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"score_range": (1, 1)}, "score_range is"),
        ({"text": "txt"}, "no column 'txt'; its columns are text, label, number"),
        ({"label": "text", "task": "token_classification"}, "no list of words with a label for each"),
        ({"class_names": ["yes"]}, "'no', which is none of the classes"),
        ({"text": "number"}, "holds . where a text is wanted"),
    ],
)
def test_settings_that_do_not_fit_are_reported(tmp_path, tokenizer, settings, message):
    place = write(tmp_path / "rows.jsonl", texts())
    with pytest.raises(SparsefitError, match=message):
        list(data_of(tokenizer, place, test_source=place, **settings).test_dataloader())


def test_sources_that_cannot_be_read(tmp_path, tokenizer):
    write(tmp_path / "rows.jsonl", texts())
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1nothing")
    for name, message in (
        ("row.jsonl", "Did you mean .*rows.jsonl"),
        ("rows.jsonl[20:]", "takes no row"),
        ("damaged.parquet", "cannot be read"),
        ("nothing:train", "there is no folder"),
    ):
        with pytest.raises(DataError, match=message):
            data_of(tokenizer, str(tmp_path / name)).setup("fit")
    with pytest.raises(ConfigError, match="has no train_source"):
        LabelledTextDataModule(tokenizer).train_dataloader()
