"""Small models, data and trainers for the tests of the callbacks."""

from __future__ import annotations

import warnings

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(blocks))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Classifier(LightningModule):
    """A classifier without pruning code, which records its training inputs."""

    def __init__(self, optimizer=None, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = Net()
        self.optimizer = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=0.05))
        self.seen: list[torch.Tensor] = []

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(x.clone())
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class LanguageModel(LightningModule):
    """A module with a transformers model, bare or wrapped."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Data(LightningDataModule):
    """Training data, and calibration data where `calibration` (the seed of its rows) is given."""

    def __init__(self, calibration: int | None = None) -> None:
        super().__init__()
        if calibration is not None:
            self.calibration_dataloader = lambda: labelled(8, seed=calibration)

    def train_dataloader(self):
        return labelled(16)


class RankedData(Data):
    """Each rank calibrates on its own half."""

    def __init__(self) -> None:
        super().__init__()

    def calibration_dataloader(self):
        batches = list(labelled(32, seed=4))
        return batches[self.trainer.global_rank :: self.trainer.world_size]


def trainable(parameters):
    return [parameter for parameter in parameters if parameter.requires_grad]


def momentum(parameters):
    return torch.optim.SGD(trainable(parameters), lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True)


def labelled(samples: int = 16, seed: int = 0, **settings) -> DataLoader:
    random = torch.Generator().manual_seed(seed)
    # Inputs of uneven size, so that Wanda and magnitude differ.
    x = torch.randn(samples, 6, generator=random) * torch.arange(1.0, 7.0)
    y = torch.randint(3, (samples,), generator=random)
    return DataLoader(TensorDataset(x, y), **({"batch_size": 4} | settings))


def text(samples: int = 8, length: int = 10, batch_size: int = 2, seed: int = 0) -> DataLoader:
    ids = torch.randint(3, 61, (samples, length), generator=torch.Generator().manual_seed(seed))
    return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=batch_size)


def trainer_with(*callbacks, **settings) -> Trainer:
    return Trainer(callbacks=list(callbacks), **(QUIET | settings))


def fit(module, data, *callbacks, ckpt_path=None, **settings) -> Trainer:
    trainer = trainer_with(*callbacks, **({"max_epochs": 2} | settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer
