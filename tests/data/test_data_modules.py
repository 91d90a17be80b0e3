from __future__ import annotations

import json
import sys
import warnings
from itertools import chain

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from sparsefit.data import C4DataModule, PythonDocsDataModule, TextDataModule, TextFilesDataModule, WikiTextDataModule
from sparsefit.data.python_docs import _corpus, documents
from sparsefit.errors import CalibrationError, ConfigError, DataError

SETTINGS = {"sequence_length": 16, "batch_size": 4, "calibration_samples": 10, "shuffle_buffer": 8}


def all_windows(loader):
    return [tuple(window) for batch in loader for window in batch["input_ids"].tolist()]


def words(tokenizer, windows):
    """The numbers of the documents that the windows show, from the complete words in them."""
    texts = [tokenizer.decode(window).replace("<end>", " ") for window in windows]
    return {word for text in texts for word in text.split()[1:-1]}


def test_batches_hold_input_ids_alone(tokenizer, corpus):
    data = C4DataModule(tokenizer, str(corpus), test_source=str(corpus), **SETTINGS)
    for loader in (data.train_dataloader(), data.calibration_dataloader(), data.test_dataloader()):
        for batch in loader:
            assert set(batch) == {"input_ids"}
            assert batch["input_ids"].dtype == torch.int64
            assert batch["input_ids"].shape[1] == 16


def test_test_windows_are_the_text_in_order(tokenizer, corpus):
    data = C4DataModule(tokenizer, test_source=f"{corpus}[50:]", **SETTINGS)
    rows = [json.loads(line)["text"] for line in corpus.read_text().splitlines()][50:]
    stream = [token for row in rows for token in [*tokenizer(row)["input_ids"], 256]]
    expected = [tuple(stream[start : start + 16]) for start in range(0, len(stream) - 15, 16)]
    assert all_windows(data.test_dataloader()) == expected
    limited = C4DataModule(tokenizer, test_source=f"{corpus}[50:]", test_windows=3, **SETTINGS)
    assert all_windows(limited.test_dataloader()) == expected[:3]


def test_the_test_text_is_read_once_for_all_evaluations_of_a_run(tokenizer, corpus, tmp_path):
    copy = tmp_path / "test.jsonl"
    copy.write_text(corpus.read_text())
    data = C4DataModule(tokenizer, test_source=str(copy), **SETTINGS)
    first = all_windows(data.test_dataloader())
    copy.unlink()
    assert all_windows(data.test_dataloader()) == first


@pytest.mark.parametrize("method", ["crop", "pack"])
def test_calibration_draws_exactly_the_samples_and_repeats_with_its_seed(tokenizer, corpus, method):
    def drawn(seed, batch_size=3):
        data = C4DataModule(
            tokenizer, str(corpus), calibration=method, seed=seed, calibration_batch_size=batch_size, **SETTINGS
        )
        return all_windows(data.calibration_dataloader())

    assert len(drawn(1)) == 10
    assert drawn(1) == drawn(1) == drawn(1, batch_size=7)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("method", ["crop", "pack"])
def test_what_calibrates_is_never_trained_on(tokenizer, corpus, method, workers):
    data = C4DataModule(tokenizer, f"{corpus}[:50]", calibration=method, num_workers=workers, **SETTINGS)
    calibrated = words(tokenizer, all_windows(data.calibration_dataloader()))
    trained = words(tokenizer, all_windows(data.train_dataloader()))
    assert calibrated
    assert not calibrated & trained
    assert len(calibrated | trained) >= 48  # nothing else is left out
    assert max(calibrated | trained) < "050"


def test_a_calibration_file_that_is_part_of_the_training_text(tokenizer, corpus):
    data = C4DataModule(tokenizer, [str(corpus)], f"{corpus}[30:]", **SETTINGS)
    calibrated = words(tokenizer, all_windows(data.calibration_dataloader()))
    assert min(calibrated) >= "030"
    assert not calibrated & words(tokenizer, all_windows(data.train_dataloader()))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_and_workers_share_the_text_out(tokenizer, corpus, world_size, workers, monkeypatch):
    def epoch(rank, world_size):
        data = C4DataModule(tokenizer, str(corpus), calibration_source=f"{corpus}[:1]", num_workers=workers, **SETTINGS)
        monkeypatch.setattr(data, "rank_and_world_size", lambda: (rank, world_size))
        monkeypatch.setattr(data, "_calibration_documents", frozenset)
        return [[tuple(window) for window in batch["input_ids"].tolist()] for batch in data.train_dataloader()]

    hands = [epoch(rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in hands}) == 1  # equally many batches: no rank waits for ever
    shared = sorted(window for hand in hands for batch in hand for window in batch)
    alone = sorted(window for batch in epoch(0, 1) for window in batch)
    dropped = len(alone) - len(shared)
    assert 0 <= dropped < world_size * max(workers, 1)
    rest = list(alone)
    for window in shared:
        rest.remove(window)  # raises where a window was seen more often than it is there
    assert len(rest) == dropped


def test_every_worker_reads_its_own_files(tokenizer, tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(name * 64)
    data = TextFilesDataModule(tokenizer, str(tmp_path), num_workers=3, **SETTINGS | {"calibration_samples": 5})
    seen = sorted(chr(window[1] + 33) for window in all_windows(data.train_dataloader()))
    assert len(seen) == 16
    assert len(set(seen)) == 4


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch["input_ids"].float().mean().view(1, 1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-9)


class Seen(Callback):
    def __init__(self):
        self.windows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.windows.append([tuple(window) for window in batch["input_ids"].tolist()])


def fit(tokenizer, corpus, folder, checkpoint=None, workers=0, **limits):
    seen = Seen()
    data = C4DataModule(tokenizer, str(corpus), num_workers=workers, **SETTINGS)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[seen, saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **limits,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Model(), data, ckpt_path=checkpoint, weights_only=True)
    return seen.windows


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_epochs_differ_and_a_resumed_run_continues_where_it_stopped(tokenizer, corpus, tmp_path, workers):
    whole = fit(tokenizer, corpus, tmp_path, workers=workers, max_epochs=2)
    first, second = whole[: len(whole) // 2], whole[len(whole) // 2 :]
    assert words(tokenizer, chain(*first)) == words(tokenizer, chain(*second))  # another order of the same text
    assert first != second
    for step in (5, 5 * (len(whole) // 5)):  # in the first epoch, and in the second
        resumed = fit(tokenizer, corpus, tmp_path / "more", tmp_path / f"step={step}.ckpt", workers, max_epochs=2)
        assert resumed == whole[step:]


def test_a_run_resumed_at_the_end_of_an_epoch_starts_the_next(tokenizer, corpus, tmp_path):
    data = C4DataModule(tokenizer, str(corpus), **SETTINGS)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    seen = Seen()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    Trainer(max_epochs=2, callbacks=[seen, saver], **settings).fit(Model(), data)
    again = Seen()
    data = C4DataModule(tokenizer, str(corpus), **SETTINGS)
    Trainer(max_epochs=2, callbacks=[again], default_root_dir=tmp_path / "again", **settings).fit(
        Model(), data, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True
    )
    assert again.windows == seen.windows[len(seen.windows) // 2 :]
    # A fit from the start with the same datamodule reads all of it again.
    anew = Seen()
    Trainer(max_epochs=1, callbacks=[anew], default_root_dir=tmp_path / "anew", **settings).fit(Model(), data)
    assert anew.windows == seen.windows[: len(seen.windows) // 2]


def test_it_tests_on_another_text_than_it_trains_on(tokenizer, corpus, tmp_path):
    wiki = tmp_path / "wiki.test.raw"
    wiki.write_text(" \n = Title = \n \n" + " Some text of an article . \n" * 5)
    data = C4DataModule(tokenizer, str(corpus), test_source=f"wikitext:{wiki}", evaluation_length=20, **SETTINGS)
    rows = ["", " = Title = \n", "", *[" Some text of an article . \n"] * 5]
    ids = tokenizer("\n\n".join(rows))["input_ids"]
    expected = [tuple(ids[start : start + 20]) for start in range(0, len(ids) - 19, 20)]
    assert all_windows(data.test_dataloader()) == expected
    same = WikiTextDataModule(tokenizer, str(wiki), str(wiki), str(wiki), evaluation_length=20, **SETTINGS)
    assert all_windows(same.test_dataloader()) == all_windows(same.val_dataloader()) == expected


def test_training_and_testing_on_the_same_documents_is_reported(tokenizer, corpus):
    data = C4DataModule(tokenizer, f"{corpus}[:50]", test_source=f"{corpus}[49:]", **SETTINGS)
    with pytest.warns(UserWarning, match="train_source and test_source share documents"):
        data.setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        C4DataModule(tokenizer, f"{corpus}[:50]", test_source=f"{corpus}[50:]", **SETTINGS).setup("fit")


def test_too_little_text_is_reported(tokenizer, corpus):
    long = SETTINGS | {"sequence_length": 100}
    with pytest.raises(CalibrationError, match=r"\d+ of 60 documents have more than sequence_length=100 tokens"):
        C4DataModule(tokenizer, str(corpus), **long | {"calibration_samples": 50}).calibration_dataloader()
    with pytest.raises(CalibrationError, match=r"gives \d+ windows of 100 tokens, but 5000 samples are wanted"):
        C4DataModule(
            tokenizer, str(corpus), calibration="pack", **long | {"calibration_samples": 5000}
        ).calibration_dataloader()
    with pytest.raises(DataError, match="fewer than the 9000 tokens of one window"):
        C4DataModule(tokenizer, test_source=str(corpus), evaluation_length=9000, **SETTINGS).test_dataloader()


def test_text_that_cannot_calibrate_can_still_be_trained_on(tokenizer, corpus):
    data = C4DataModule(tokenizer, str(corpus), **SETTINGS | {"calibration_samples": 1000})
    assert len(words(tokenizer, all_windows(data.train_dataloader()))) == 60


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 0}, "sequence_length is 0"),
        ({"calibration_length": -1}, "calibration_length is -1"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"calibration": "crops"}, 'use "crop" or "pack"'),
    ],
)
def test_settings_that_cannot_work(tokenizer, settings, message):
    with pytest.raises(ConfigError, match=message):
        TextDataModule(tokenizer, "text.txt", **settings)


def test_a_missing_source_is_named(tokenizer):
    with pytest.raises(ConfigError, match="TextDataModule has no test_source"):
        TextDataModule(tokenizer, "text.txt").test_dataloader()
    assert TextDataModule(tokenizer, "text.txt").val_dataloader() == []


def test_unset_lengths_follow_the_sequence_length(tokenizer, corpus):
    data = C4DataModule(tokenizer, str(corpus), calibration_length=24, **SETTINGS)
    assert len(all_windows(data.calibration_dataloader())[0]) == 24
    assert len(all_windows(data.train_dataloader())[0]) == 16


def test_c4_calibrates_on_its_first_shard_where_it_trains_on_the_others(tokenizer):
    assert C4DataModule(tokenizer).hparams.calibration_source == "c4:calibration"
    assert C4DataModule(tokenizer, "mine.jsonl").hparams.calibration_source is None


@pytest.mark.slow
def test_the_parts_of_pythons_documentation_differ(tokenizer):
    data = PythonDocsDataModule(tokenizer, calibration_samples=4, test_windows=4)
    assert len(all_windows(data.calibration_dataloader())) == 4
    assert {len(window) for window in all_windows(data.test_dataloader())} == {256}
    assert not set(all_windows(data.calibration_dataloader())) & set(all_windows(data.test_dataloader()))


@pytest.mark.slow
def test_pythons_documentation_does_not_depend_on_what_a_library_has_replaced(monkeypatch):
    before = documents("train")
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)  # as Lightning does where it starts other processes
    _corpus.cache_clear()
    assert documents("train") == before


def test_c4_documents_of_the_real_sample(shared_data):
    from sparsefit.modules.loading import load_tokenizer

    file = f"{shared_data}/c4_sample/c4_train_1000.jsonl"
    tokenizer = load_tokenizer(str(shared_data / "tinystories656K"))
    data = C4DataModule(
        tokenizer, f"{file}[:900]", sequence_length=512, calibration_length=2048, calibration_samples=64
    )
    windows = all_windows(data.calibration_dataloader())
    assert len(windows) == 64
    assert {len(window) for window in windows} == {2048}
    with pytest.raises(CalibrationError, match=r"\d+ of 900 documents have more than sequence_length=2048"):
        C4DataModule(tokenizer, f"{file}[:900]", sequence_length=2048).calibration_dataloader()
