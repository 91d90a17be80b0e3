"""`calibration_step`: how a module passes an unusual batch to its model.

A recommender rates pairs of a user and an item. Its `forward` takes these two, but its batches also contain the rating.
The package cannot know how to call such a module with a batch, so the module defines `calibration_step`. Without it,
the fit ends with an error that says so, before any weight changes. Embeddings stay dense, because nothing is multiplied
by them. The output layer stays dense by default.

Prints the report's summary, with the module's own `val_mse` of the dense, the pruned and the recovered model. Takes
about 10 seconds.
"""

import tempfile

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from sparsefit import RunReport, WandaPruning

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Recommender(LightningModule):
    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(100, 16), nn.Embedding(100, 16)
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, user, item):
        return self.net(torch.cat([self.users(user), self.items(item)], 1)).squeeze(1)

    def training_step(self, batch, batch_idx):
        user, item, rating = batch
        return mse_loss(self(user, item), rating)

    def validation_step(self, batch, batch_idx):
        user, item, rating = batch
        self.log("val_mse", mse_loss(self(user, item), rating))

    def calibration_step(self, batch):
        user, item, _ = batch
        return self(user, item)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


seed_everything(0)
# A rating depends on three tastes of the user and how well the item meets them.
tastes, merits = torch.randn(100, 3), torch.randn(100, 3)
user, item = torch.randint(100, (6000,)), torch.randint(100, (6000,))
rating = (tastes[user] * merits[item]).sum(1).tanh() + 0.1 * torch.randn(6000)
train = DataLoader(TensorDataset(user[:5000], item[:5000], rating[:5000]), batch_size=64, shuffle=True)
val = DataLoader(TensorDataset(user[5000:], item[5000:], rating[5000:]), batch_size=1000)
module = Recommender()
Trainer(max_epochs=10, **QUIET).fit(module, train, val)

callbacks = [WandaPruning(0.75), RunReport(tempfile.mkdtemp())]
Trainer(max_epochs=3, callbacks=callbacks, **QUIET).fit(module, train, val)
