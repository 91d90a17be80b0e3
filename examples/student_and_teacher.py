"""A module that holds two networks, a student and its frozen teacher: only the student is pruned.

One sample shows which weights the output depends on; `forward` calls only the student. So the teacher is not changed,
whatever the names of its layers are, and the report lists it among the dense layers. Here the teacher is another,
larger network. To use the dense version of a model as its teacher, no second network is needed: see
`sparsefit.modules.RecoveryMixin`.

Prints the report's summary with the accuracy of the dense, the pruned and the recovered student; whether the teacher is
unchanged; and which layers were pruned. Takes about 10 seconds.
"""

import tempfile

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.data import DataLoader, TensorDataset

from sparsefit import RunReport, WandaPruning

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def network(width):
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


class Distilled(LightningModule):
    def __init__(self, teacher=None):
        super().__init__()
        self.student = network(64 if teacher is not None else 256)
        self.teacher = teacher

    def forward(self, images):
        return self.student(images)

    def training_step(self, batch, batch_idx):
        images, digits = batch
        logits = self(images)
        loss = cross_entropy(logits, digits)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            target = self.teacher(images).log_softmax(1)
        return loss + kl_div(logits.log_softmax(1), target, reduction="batchmean", log_target=True)

    def validation_step(self, batch, batch_idx):
        images, digits = batch
        self.log("val_accuracy", (self(images).argmax(1) == digits).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), lr=2e-3)


seed_everything(0)
images, digits = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images / 8 - 1, dtype=torch.float32), torch.tensor(digits))
train = DataLoader(TensorDataset(*data[:1400]), batch_size=64, shuffle=True)
val = DataLoader(TensorDataset(*data[1400:]), batch_size=512)
large = Distilled()
Trainer(max_epochs=10, **QUIET).fit(large, train, val)

module = Distilled(teacher=large.student.requires_grad_(False).eval())
Trainer(max_epochs=10, **QUIET).fit(module, train, val)
before = [weight.clone() for weight in module.teacher.parameters()]

pruning, report = WandaPruning(0.75), RunReport(tempfile.mkdtemp())
Trainer(max_epochs=5, callbacks=[pruning, report], **QUIET).fit(module, train, val)
same = all(torch.equal(old, new) for old, new in zip(before, module.teacher.parameters(), strict=True))
print("the teacher is unchanged:", same)
print("pruned:", ", ".join(pruning.masks))
for name, reason in pruning.summary["left_dense"].items():
    print(f"{name} stayed dense: {reason}")
