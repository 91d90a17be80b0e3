"""Pruning an already sparse model: three ways to treat its zeros (`existing_zeros`).

torch's `global_unstructured` has pruned the network to 70% before, so some of its rows have far more zeros than others.
It is now pruned to 75% of each row. Rows with more zeros than requested would regain weights; by default, a note says
so. `existing_zeros="keep"` prunes further without that. `"adopt"` only fixes the existing zeros, for fine-tuning.

Prints for each choice the sparsity, how many of the existing zeros training may change, and the notes. Then prints the
accuracy of the dense, the sparse and the fine-tuned model (with `"adopt"`), and checks the zeros. Takes about 10
seconds.
"""

import copy

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

from sparsefit import PruningConfig, WandaPruning, prune

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, digits = batch
        return cross_entropy(self(images), digits)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def accuracy(module):
    return (module.eval()(images[1400:]).argmax(1) == digits[1400:]).float().mean()


seed_everything(0)
images, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = images.float() / 8 - 1
train = DataLoader(TensorDataset(images[:1400], digits[:1400]), batch_size=64, shuffle=True)
module = Classifier()
Trainer(max_epochs=10, **QUIET).fit(module, train)
dense = accuracy(module)

layers = [(module.net[0], "weight"), (module.net[2], "weight")]
torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=0.7)
for layer, name in layers:
    torch_prune.remove(layer, name)
zeros = {"net.0.weight": module.net[0].weight == 0, "net.2.weight": module.net[2].weight == 0}

for choice in (None, "keep", "adopt"):
    other = copy.deepcopy(module)
    result = prune(other, [images[:128]], PruningConfig(0.75, existing_zeros=choice))
    free = sum(int((result.masks[name] & was).sum()) for name, was in zeros.items())
    print(f"existing_zeros={choice!r}: {result.masks.sparsity:.2%} zeros, {free} existing ones may be trained again")
    print(*(f"  note: {note}" for note in result.notes), sep="\n")

# Fine-tuning with the existing zeros: this needs no calibration and no scores.
sparse = accuracy(module)
Trainer(max_epochs=3, callbacks=[WandaPruning(existing_zeros="adopt")], **QUIET).fit(module, train)
print(f"accuracy: dense {dense:.2%}, sparse {sparse:.2%}, fine-tuned {accuracy(module):.2%}")
held = all(bool((module.get_parameter(name)[was] == 0).all()) for name, was in zeros.items())
print("all existing zeros are still zero:", held)
