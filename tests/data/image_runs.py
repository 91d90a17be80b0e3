"""Settings of `ImageDataModule`, the contents of its batches, and training on them, for tests."""

from __future__ import annotations

import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

PLAIN = {"image_size": 8, "mean": [0.0] * 3, "std": [1.0] * 3}  # leaves images as they are
SETTINGS = PLAIN | {"batch_size": 4, "calibration_samples": 5}


# Batches


def seen(loader):
    """The numbers of the pictures in each batch."""
    return [numbers(batch) for batch in loader]


def numbers(batch):
    return (batch["pixel_values"][:, 0, 0, 0] * 255).round().int().tolist()


def joined(batches):
    return [number for batch in batches for number in batch]


def all_pixels(loader):
    return torch.cat([batch["pixel_values"] for batch in loader])


# Trainings

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch["pixel_values"].mean().view(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return batch["labels"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-9)


class Seen(Callback):
    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.train.append(batch["pixel_values"].clone())

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.val.append(batch["pixel_values"].clone())


def fit(data, folder, checkpoint=None, every=2, **limits):
    callback = Seen()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    trainer = Trainer(callbacks=[callback, saver], **QUIET | limits)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*more than 1 thread|.*Checkpoint directory|.*`training_step`")
        warnings.filterwarnings("error", message=".*dataloader is not resumable")
        trainer.fit(Model(), data, ckpt_path=checkpoint, weights_only=True)
    return callback


def order(callback):
    return [(batch[:, 0, 0, 0] * 255).round().int().tolist() for batch in callback.train]
