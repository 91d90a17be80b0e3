"""The files that keep the text a model writes itself."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from written_text import data_of, windows, written

from sparsefit.errors import DataError


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", vocab_size=257)


def test_what_is_written_is_read_by_all_who_ask_for_the_same(tokenizer, tmp_path, model, monkeypatch):
    first = written(tokenizer, tmp_path, model)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    monkeypatch.setattr(type(model), "generate", None)
    assert written(tokenizer, tmp_path, copy.deepcopy(model), batch_size=4, calibration_batch_size=1) == first
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == files
    reported = json.loads(next(tmp_path.glob("training-*.json")).read_text())
    assert (reported["windows"], reported["length"], reported["seed"], reported["temperature"]) == (9, 12, 0, 1.0)


def one_weight(model):
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 4] = 0


def setting(model):
    model.config.rms_norm_eps = 0.1


@pytest.mark.parametrize("change", [one_weight, setting])
def test_another_model_writes_its_own(tokenizer, tmp_path, model, change):
    first = written(tokenizer, tmp_path, model)
    other = copy.deepcopy(model)
    change(other)
    written(tokenizer, tmp_path, other)
    assert len(list(tmp_path.glob("*.npy"))) == 4
    assert written(tokenizer, tmp_path, model) == first


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"first_tokens": 3},
        {"train_tokens": 50},
        {"writing_batch_size": 4},
        {"sequence_length": 11},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_settings_are_another_text(tokenizer, tmp_path, model, changed):
    written(tokenizer, tmp_path, model)
    written(tokenizer, tmp_path, model, **changed)
    assert len(list(tmp_path.glob("training-*.npy"))) == 2


def test_a_pruned_model_reads_what_it_wrote_when_it_was_dense(tokenizer, tmp_path, model):
    data = data_of(tokenizer, tmp_path)
    data.write_with(model)
    first = windows(data.train_dataloader())
    one_weight(model)
    data.write_with(model)
    assert windows(data.train_dataloader()) == first
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_what_was_broken_off_is_not_written_again(tokenizer, tmp_path, model, monkeypatch):
    whole = written(tokenizer, tmp_path / "whole", model)
    generate, calls = type(model).generate, []

    def counted(self, *args, **settings):
        calls.append(1)
        if len(calls) == 4:  # of the 2 batches of calibration and the 3 of training
            raise KeyboardInterrupt
        return generate(self, *args, **settings)

    monkeypatch.setattr(type(model), "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        written(tokenizer, tmp_path / "broken", model)
    assert not list((tmp_path / "broken").glob("training-*.npy"))
    calls += [1]  # past the one that breaks off
    reported = []
    data = data_of(tokenizer, tmp_path / "broken")
    data.write_with(model, lambda done, total: reported.append((done, total)))
    assert len(calls) == 5 + 2
    assert reported == [(1, 3), (2, 3), (3, 3)]
    assert (windows(data.calibration_dataloader()), windows(data.train_dataloader())) == whole
    assert not list((tmp_path / "broken").glob("*part*"))


def test_a_part_that_was_damaged_is_written_again(tokenizer, tmp_path, model):
    whole = written(tokenizer, tmp_path / "whole", model)
    name = next((tmp_path / "whole").glob("training-*.npy")).name
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / f"{name}.part0-of-1").write_bytes(b"\x93NUMPY")
    assert written(tokenizer, tmp_path / "other", model) == whole


def test_a_damaged_file_is_reported(tokenizer, tmp_path, model):
    written(tokenizer, tmp_path, model)
    file = next(tmp_path.glob("training-*.npy"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read"):
        written(tokenizer, tmp_path, model)
    np.save(file, np.zeros((2, 2), dtype=np.int32))
    with pytest.raises(DataError, match=r"does not hold 9 windows of 12 tokens\. Remove it"):
        written(tokenizer, tmp_path, model)


def test_a_folder_that_cannot_be_written_to(tokenizer, tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="text cannot be written to"):
        written(tokenizer, tmp_path / "file", model)
