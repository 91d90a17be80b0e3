"""A custom training loop: one more callback prunes and fine-tunes a small ResNet on scikit-learn's digits.

The LightningModule contains no pruning code. It is trained twice by the same code: first without callbacks, which gives
the dense model, then with `WandaPruning`. The callback removes 60% of the weights at the start of the fit and keeps
them at zero while the others are trained. Convolutions are pruned as matrices. `fc`, the output layer, stays dense by
default.

Prints which part of the network stayed dense, and the report's summary with the accuracy (the module's own
`val_accuracy`) of the dense, the pruned and the recovered model. Takes about 10 seconds.
"""

import tempfile

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from sparsefit import RunReport, WandaPruning

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        inner = self.norm1(self.conv1(x)).relu()
        return (x + self.norm2(self.conv2(inner))).relu()


class ResNet(LightningModule):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.layer1 = nn.Sequential(Block(16), Block(16))
        self.down = nn.Conv2d(16, 32, 2, stride=2)
        self.layer2 = nn.Sequential(Block(32), Block(32))
        self.fc = nn.Linear(32, 10)

    def forward(self, images):
        features = self.layer2(self.down(self.layer1(self.stem(images))))
        return self.fc(features.mean((2, 3)))

    def training_step(self, batch, batch_idx):
        images, digits = batch
        return cross_entropy(self(images), digits)

    def validation_step(self, batch, batch_idx):
        images, digits = batch
        self.log("val_accuracy", (self(images).argmax(1) == digits).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


seed_everything(0)
images, digits = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(digits))
train = DataLoader(TensorDataset(*data[:1400]), batch_size=64, shuffle=True)
val = DataLoader(TensorDataset(*data[1400:]), batch_size=512)
module = ResNet()
Trainer(max_epochs=4, **QUIET).fit(module, train, val)

# The paper prunes image classifiers like this: per layer, with statistics of the dense network.
pruning = WandaPruning(0.6, granularity="layer", update="none")
Trainer(max_epochs=2, callbacks=[pruning, RunReport(tempfile.mkdtemp())], **QUIET).fit(module, train, val)
for name, reason in pruning.summary["left_dense"].items():
    print(f"{name} stayed dense: {reason}")
