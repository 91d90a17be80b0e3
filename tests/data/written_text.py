"""A data module whose text a model writes itself, and its windows."""

from __future__ import annotations

from sparsefit.data import SelfGeneratedDataModule

SETTINGS = {"sequence_length": 12, "train_tokens": 100, "calibration_samples": 5, "writing_batch_size": 3}
END = 256


def data_of(tokenizer, folder, **settings):
    return SelfGeneratedDataModule(tokenizer, folder=str(folder), **(SETTINGS | {"batch_size": 2} | settings))


def written(tokenizer, folder, model, **settings):
    data = data_of(tokenizer, folder, **settings)
    data.write_with(model)
    return windows(data.calibration_dataloader()), windows(data.train_dataloader())


def windows(loader):
    return [tuple(window) for batch in loader for window in batch["input_ids"].tolist()]
