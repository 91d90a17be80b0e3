"""`sparsefit study` from a recipe: whole, stopped and taken up again, and with what cannot work."""

from __future__ import annotations

import csv
import json
import statistics

import pytest
from lightning.pytorch import LightningDataModule

from sparsefit.callbacks import slow_precision
from sparsefit.modules import ImageClassifierModule

pytestmark = [pytest.mark.slow, pytest.mark.figures]

CONFIG = {"num_channels": 1, "patch_size": 4, "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}


class WrongHead(ImageClassifierModule):
    """Knows fewer classes than there are digits."""

    def __init__(self) -> None:
        super().__init__("convnext", {**CONFIG, "num_labels": 4})


class Unmeasured(ImageClassifierModule):
    """Says nothing of what it measures."""

    metrics = {}  # noqa: RUF012 - as the class has it

    def __init__(self) -> None:
        super().__init__("convnext", {**CONFIG, "num_labels": 10})


class Untested(LightningDataModule):
    """Nothing to measure on."""

    def train_dataloader(self):
        return []


@pytest.fixture
def recipe(tmp_path):
    """A study of a tiny ConvNeXt on a part of the digits."""
    return {
        "study": {"folder": str(tmp_path / "study")},
        "models": {
            "net": {
                "class_path": "sparsefit.modules.ImageClassifierModule",
                "init_args": {"model": "convnext", "config": CONFIG, "num_classes": 10, "learning_rate": 0.003},
            }
        },
        "data": {
            "class_path": "sparsefit.data.DigitsDataModule",
            "init_args": {
                "train_source": "digits:train[:256]",
                "test_source": "digits:test[:100]",
                "calibration_samples": 64,
            },
        },
        "grid": {"scores": ["magnitude", "wanda"], "granularities": ["output", "layer"], "sparsities": [0.5, 0.8]},
        "training": {"epochs": 1},
        "finetuning": {"epochs": 1, "granularities": ["layer"], "sparsities": [0.8], "learning_rate": 0.001},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }


def table(tmp_path):
    with (tmp_path / "study/results.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def about(tmp_path):
    return json.loads((tmp_path / "study/study.json").read_text())


def test_a_study_measures_each_point_and_reports(sparsefit, recipe, tmp_path):
    status, output, errors = sparsefit("study", recipe=recipe)
    assert status == 0, errors
    rows = table(tmp_path)
    stages = [row["stage"] for row in rows]
    assert (stages.count("dense"), stages.count("pruned"), stages.count("finetuned")) == (1, 8, 2)
    pruned = {(row["score"], row["granularity"], row["sparsity"]): row for row in rows if row["stage"] == "pruned"}
    for row in rows:
        assert 0 <= float(row["accuracy"]) <= float(row["top5_accuracy"]) <= 1
        if row["stage"] == "finetuned":
            before = pruned[row["score"], row["granularity"], row["sparsity"]]
            assert row["digest"] == before["digest"]
            assert float(row["counted"]) == pytest.approx(float(before["counted"]), abs=1e-9)
            assert row["accuracy"] != before["accuracy"]
        if row["granularity"] == "layer":
            assert float(row["counted"]) == pytest.approx(float(row["sparsity"]), abs=0.01)
    found = about(tmp_path)
    assert found["models"]["net"]["calibration"]["samples"] == 64
    assert found["models"]["net"]["training"]["epochs"] == 1
    assert "model.classifier.weight" in found["models"]["net"]["left_dense"]
    assert set(found["seconds"]) == {"selection", "evaluation", "finetuning", "calibration", "training", "other"}
    page = (tmp_path / "study/study.html").read_text()
    assert "wanda" in page
    assert "</html>" in page
    assert "<svg" in (tmp_path / "study/figures/scores.svg").read_text()
    assert "net: wanda layer 0.8 finetuned: accuracy" in output


def test_seeds_draw_other_calibration_images_and_other_trainings(sparsefit, recipe, tmp_path):
    recipe["grid"] = {"scores": ["magnitude", "wanda"], "granularities": ["layer"], "sparsities": [0.8]}
    assert sparsefit("study", recipe=recipe)[0] == 0
    first, page = table(tmp_path), (tmp_path / "study/study.html").read_text()
    assert "Single-run differences" in page
    recipe["study"]["calibration_seeds"], recipe["finetuning"]["seeds"] = 2, 3
    status, output, errors = sparsefit("study", recipe=recipe)
    assert status == 0, errors
    rows = table(tmp_path)
    assert rows[: len(first)] == first
    found = {(row["score"], row["stage"], row["calibration_seed"], row["training_seed"]): row for row in rows}
    assert len({found["wanda", "pruned", seed, ""]["digest"] for seed in "01"}) == 2
    assert ("magnitude", "pruned", "1", "") not in found
    tuned = [(row["accuracy"], row["top5_accuracy"]) for row in rows if row["stage"] == "finetuned"]
    assert len(rows) == about(tmp_path)["planned"] == 1 + 3 + 6
    assert len(set(tuned)) > 2
    assert "net: wanda layer 0.8 finetuned, seed 2: accuracy" in output
    with (tmp_path / "study/summary.csv").open(newline="") as lines:
        means = {(row["score"], row["stage"]): row for row in csv.DictReader(lines)}
    wanda = means["wanda", "after 1 epoch"]
    values = [float(row["accuracy"]) for row in rows if (row["score"], row["stage"]) == ("wanda", "finetuned")]
    assert wanda["seeds"] == "3"
    assert float(wanda["accuracy"]) == pytest.approx(statistics.mean(values))
    assert float(wanda["accuracy_deviation"]) == pytest.approx(statistics.stdev(values))
    assert means["magnitude", "pruned"]["accuracy_deviation"] == ""
    page = (tmp_path / "study/study.html").read_text()
    assert "3 seeds" in page
    assert "<h2>Differences</h2>" in page


def test_seeds_draw_other_calibration_text(sparsefit, tmp_path):
    for part in range(8):
        words = (f"number {number} of {number % 7} and {number % 11}" for number in range(100 * part, 100 * part + 100))
        (tmp_path / f"{part}.txt").write_text(" ".join(words))
    recipe = {
        "study": {"folder": str(tmp_path / "study"), "calibration_seeds": 3},
        "models": {"net": {"class_path": "sparsefit.modules.CausalLMModule", "init_args": {"model": "tiny-llama"}}},
        "data": {
            "class_path": "sparsefit.data.TextDataModule",
            "init_args": {
                "tokenizer": "tiny-llama",
                "calibration_source": str(tmp_path / "*.txt"),
                "test_source": str(tmp_path / "*.txt"),
                "sequence_length": 32,
                "calibration_samples": 4,
                "test_windows": 2,
            },
        },
        "grid": {"scores": ["wanda"], "granularities": ["own"], "sparsities": [0.5]},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    status, _, errors = sparsefit("study", recipe=recipe)
    assert status == 0, errors
    pruned = [row for row in table(tmp_path) if row["stage"] == "pruned"]
    assert [row["calibration_seed"] for row in pruned] == ["0", "1", "2"]
    assert len({row["digest"] for row in pruned}) == 3


def test_a_study_continues_with_the_model_that_it_trained(sparsefit, recipe, tmp_path):
    recipe["grid"]["sparsities"], recipe["finetuning"] = [0.5], {"epochs": 0}
    assert sparsefit("study", recipe=recipe)[0] == 0
    first, weights = table(tmp_path), (tmp_path / "study/models/net.safetensors").read_bytes()
    before = about(tmp_path)

    recipe["grid"]["sparsities"] = [0.5, 0.8]
    status, output, _ = sparsefit("study", recipe=recipe)
    assert status == 0
    assert "0.5 pruned" not in output
    assert "0.8 pruned" in output
    assert table(tmp_path)[: len(first)] == first
    assert len(table(tmp_path)) == 1 + 8
    assert (tmp_path / "study/models/net.safetensors").read_bytes() == weights
    assert about(tmp_path)["models"]["net"]["training"] == before["models"]["net"]["training"]

    assert sparsefit("study", "--finetuning.epochs=1", "--finetuning.scores=[wanda]", recipe=recipe)[0] == 0
    assert [row["stage"] for row in table(tmp_path)].count("finetuned") == 4


def test_perplexity_of_language_models_in_the_order_of_the_paper(sparsefit, recipe, tmp_path, model):
    (tmp_path / "text.txt").write_text(" ".join(f"the lazy dog jumps over {number} wizards" for number in range(200)))
    recipe["models"] = {"llama": {"class_path": "sparsefit.modules.CausalLMModule", "init_args": {"model": str(model)}}}
    recipe["data"] = {
        "class_path": "sparsefit.data.TextDataModule",
        "init_args": {
            "tokenizer": str(model),
            "calibration_source": str(tmp_path / "*.txt"),
            "test_source": str(tmp_path / "*.txt"),
            "sequence_length": 16,
            "calibration": "pack",
            "calibration_samples": 8,
        },
    }
    grid = {"scores": ["wanda"], "granularities": ["own"], "sparsities": [0.5], "patterns": ["2:4"]}
    recipe |= {"grid": grid | {"updates": ["none", "block"]}, "training": {"epochs": 0}, "finetuning": {"epochs": 0}}
    status, output, errors = sparsefit("study", recipe=recipe)
    assert status == 0, errors
    rows = table(tmp_path)
    assert [(row["update"], row["pattern"]) for row in rows[1:]] == [
        ("none", ""),
        ("none", "2:4"),
        ("block", ""),
        ("block", "2:4"),
    ]
    assert len({row["digest"] for row in rows[1:]}) == 4
    assert all(float(row["perplexity"]) > 1 for row in rows)
    assert "perplexity" in output


def test_a_point_that_fails_is_reported_and_the_rest_goes_on(sparsefit, recipe, tmp_path):
    recipe |= {"grid": {"scores": ["magnitude"], "granularities": ["layer"], "sparsities": [0.5], "patterns": ["3:7"]}}
    recipe["finetuning"] = {"epochs": 0}
    status, _, errors = sparsefit("study", recipe=recipe)
    assert status == 1, errors
    rows = table(tmp_path)
    assert [bool(row["error"]) for row in rows] == [False, False, True]
    assert "ConfigError" in rows[-1]["error"]
    assert "pwconv" in rows[-1]["error"]
    assert rows[-1]["accuracy"] == ""
    assert "pwconv" in (tmp_path / "study/study.html").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"models": {}}, "no models"),
        ({"models": {"a/b": {"class_path": f"{__name__}.WrongHead"}}}, "'a/b' cannot be a file name"),
        ({"models": {"net": {"class_path": f"{__name__}.WrongHead"}}}, "4"),
        ({"models": {"net": {"class_path": f"{__name__}.Unmeasured"}}}, "has no `metrics`"),
        ({"grid": {"scores": ["wonda"]}}, "unknown score 'wonda'"),
        ({"finetuning": {"epochs": -1}}, "epochs is -1"),
        ({"finetuning": {"epochs": 1, "seeds": 0}}, "finetuning.seeds is 0"),
        ({"finetuning": {"epochs": 1, "scores": ["wnada"]}}, "finetuning selects no point"),
        ({"trainer": {"accelerator": "cpu", "fast_dev_run": True}}, "does not support trainer.fast_dev_run"),
        (
            {"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging"}]}},
            "does not support trainer.callbacks",
        ),
        ({"data": {"class_path": f"{__name__}.Untested"}}, "has no test_dataloader"),
        ({"trainer": {"accelerator": "cpu", "devices": 2}}, "one device"),
    ],
)
def test_what_cannot_work_is_reported(sparsefit, recipe, tmp_path, change, words):
    status, _, errors = sparsefit("study", recipe=recipe | change)
    assert status == 2
    assert words in errors
    assert not (tmp_path / "study/results.csv").exists() or not table(tmp_path)


def test_a_precision_that_the_processor_is_slow_in_is_reported(sparsefit, recipe, monkeypatch):
    monkeypatch.setattr(slow_precision, "slowdown", lambda dtype: 20.0)
    recipe["models"] = {"net": {"class_path": f"{__name__}.Unmeasured"}}
    recipe["trainer"]["precision"] = "bf16-mixed"
    with pytest.warns(UserWarning, match="20 times as long for a product of matrices in bfloat16"):
        sparsefit("study", recipe=recipe)


def test_a_folder_of_something_else_is_left_alone(sparsefit, recipe, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study/thesis.txt").write_text("mine")
    status, _, errors = sparsefit("study", recipe=recipe)
    assert status == 2
    assert "not empty and holds no study" in errors
    assert [file.name for file in (tmp_path / "study").iterdir()] == ["thesis.txt"]


def test_damaged_weights_of_a_trained_model_are_reported(sparsefit, recipe, tmp_path):
    recipe |= {"grid": {"scores": ["magnitude"], "sparsities": [0.5]}, "finetuning": {"epochs": 0}}
    assert sparsefit("study", recipe=recipe)[0] == 0
    file = tmp_path / "study/models/net.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    status, _, errors = sparsefit("study", recipe=recipe)
    assert status == 2
    assert "net.safetensors is damaged" in errors
