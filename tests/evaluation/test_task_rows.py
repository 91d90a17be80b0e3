from __future__ import annotations

import json

import pytest

from sparsefit.errors import DataError
from sparsefit.evaluation.task_rows import TASK_FILES, read_rows, task_file

BOOLQ = {"query": "Passage: Rain is wet.\nIt falls.\nQuestion: is rain wet?", "choices": ["no", "yes"], "gold": 1}
RTE = {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 1, "label_name": "not_entailment"}
HELLASWAG = {
    "activity_label": "Rowing",
    "ctx_a": "A man [header] rows.",
    "ctx_b": "he",
    "endings": ["stops.", "flies [substeps] away.", "sings.", "sinks."],
    "label": 2,
}
WINOGRANDE = {"context_options": ["So the Sandra", "So the Sandy"], "continuation": "won it.", "gold": 0}
ARC = {"query": "Question: What is wet?", "choices": ["sand", "rain", "fire"], "gold": 1}
OPENBOOKQA = {"query": "Predators eat", "choices": ["lions", "bunnies"], "gold": 1}

# A line of a file, and the same item as the hub has it.
ITEMS = {
    "boolq": (BOOLQ, {"passage": "Rain is wet.\nIt falls.", "question": "is rain wet", "label": 1}),
    "rte": (RTE, {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 1}),
    "hellaswag": (HELLASWAG, HELLASWAG | {"label": "2"}),
    "winogrande": (
        WINOGRANDE,
        {"sentence": "So the _ won it.", "option1": "Sandra", "option2": "Sandy", "answer": "1"},
    ),
    "arc_easy": (
        ARC,
        {
            "question": "What is wet?",
            "choices": {"text": ["sand", "rain", "fire"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
    ),
    "openbookqa": (
        OPENBOOKQA,
        {
            "question_stem": "Predators eat",
            "choices": {"text": ["lions", "bunnies"], "label": ["A", "B"]},
            "answerKey": "B",
        },
    ),
}
ITEMS["arc_challenge"] = ITEMS["arc_easy"]


def written(folder, task, *lines):
    path = folder / f"{task}.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("task", TASK_FILES)
def test_a_line_becomes_the_fields_of_the_hub(tmp_path, task):
    line, item = ITEMS[task]
    assert read_rows(task, written(tmp_path, task, line)) == [item]


@pytest.mark.parametrize("task", TASK_FILES)
def test_the_fields_of_the_hub_stay(tmp_path, task):
    _, item = ITEMS[task]
    assert read_rows(task, written(tmp_path, task, item | {"idx": 3}, item)) == [item, item]


def test_of_several_questions_the_last_one_is_asked(tmp_path):
    # llm-foundry's file has "\nQuestion" for every " question" of a passage
    query = "Passage: He answers\nQuestions in\nQuestion: the book.\nQuestion: does he answer?"
    (row,) = read_rows("boolq", written(tmp_path, "boolq", BOOLQ | {"query": query}))
    assert row["passage"] == "He answers questions in question: the book."
    assert row["question"] == "does he answer"


@pytest.mark.parametrize(
    ("contexts", "sentence", "options"),
    [
        (["Ann won, so Ann", "Ann won, so Bo"], "Ann won, so _ left.", ("Ann", "Bo")),
        (["The box", "The box lid"], "The _ left.", ("box", "box lid")),  # whole words
        (["Ann", "Bo"], "_ left.", ("Ann", "Bo")),
        (["the old cup", "the new cup"], "the _ left.", ("old cup", "new cup")),
    ],
)
def test_the_place_of_an_option(tmp_path, contexts, sentence, options):
    line = WINOGRANDE | {"context_options": contexts, "continuation": "left."}
    (row,) = read_rows("winogrande", written(tmp_path, "winogrande", line))
    assert (row["sentence"], (row["option1"], row["option2"])) == (sentence, options)


@pytest.mark.parametrize(
    ("task", "change", "reported"),
    [
        ("boolq", {"query": "Rain is wet.\nQuestion: is it?"}, "is not 'Passage: "),
        ("boolq", {"choices": ["yes", "no"]}, r"\['yes', 'no'\] and not"),
        ("boolq", {"gold": 2}, "'gold' is 2 and not a number from 0 to 1"),
        ("rte", {"label": 0}, "the label is 0 and its name 'not_entailment'"),
        ("rte", {"sentence2": None}, "no text 'sentence2'"),
        ("hellaswag", {"query": "Rowing: A man rows. He"}, "cleaning of the text"),
        ("hellaswag", {"endings": "stops."}, "'endings' is no list"),
        ("hellaswag", {"label": ""}, "'label' is ''"),
        ("winogrande", {"context_options": ["So he", "So he"]}, "not two different"),
        ("winogrande", {"continuation": "won _ it."}, "holds '_'"),
        ("arc_easy", {"query": "What is wet?"}, "does not begin with 'Question: '"),
        ("arc_challenge", {"gold": "B"}, "'gold' is 'B'"),
        ("openbookqa", {"choices": ["lions", 3]}, "'choices' is no list of two or more texts"),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path, task, change, reported):
    line, _ = ITEMS[task]
    path = written(tmp_path, task, line, "", line | change)
    with pytest.raises(DataError, match=reported) as error:
        read_rows(task, path)
    assert f"{path}, line 3 is no item of {task}" in str(error.value)
    assert TASK_FILES[task].form in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_a_line_that_is_no_object(tmp_path, text):
    with pytest.raises(DataError, match="line 1 is no item of rte"):
        read_rows("rte", written(tmp_path, "rte", text))


def test_an_empty_file(tmp_path):
    with pytest.raises(DataError, match="holds no items of rte"):
        read_rows("rte", written(tmp_path, "rte", ""))


def test_the_file_of_a_task(tmp_path):
    (tmp_path / "hellaswag_val_1000.jsonl").touch()
    (tmp_path / "openbook_qa.jsonl").touch()
    assert task_file("hellaswag", tmp_path).name == "hellaswag_val_1000.jsonl"
    assert task_file("openbookqa", tmp_path).name == "openbook_qa.jsonl"
    with pytest.raises(DataError, match=r"holds no files rte\*\.jsonl .* There: hellaswag_val_1000\.jsonl, openbook"):
        task_file("rte", tmp_path)
    (tmp_path / "hellaswag_test.jsonl").touch()
    with pytest.raises(DataError, match=r"holds 2 files .* There: hellaswag_test\.jsonl, hellaswag_val_1000\.jsonl"):
        task_file("hellaswag", tmp_path)
    with pytest.raises(DataError, match=r"no local form of the task 'piqa': a folder serves boolq, rte"):
        task_file("piqa", tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        task_file("rte", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("task", "count"),
    [
        ("boolq", 3270),
        ("rte", 277),
        ("hellaswag", 1000),
        ("winogrande", 1267),
        ("arc_easy", 2376),
        ("arc_challenge", 1172),
        ("openbookqa", 500),
    ],
)
def test_every_line_of_the_shared_files_is_an_item(shared_data, task, count):
    assert len(read_rows(task, task_file(task, shared_data / "zeroshot"))) == count
