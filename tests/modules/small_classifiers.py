"""Small image classifiers and images for the tests of the modules."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader

from sparsefit.modules import ImageClassifierModule

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "patch_size": 2, "image_size": 16}
PATCHES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}
WINDOWS = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "image_size": 16, "patch_size": 2}
SETTINGS = {"convnext": STAGES, "convnextv2": STAGES, "deit": PATCHES, "vit": PATCHES, "swin": WINDOWS}


class Plain(nn.Module):
    """A classifier that is not a transformers model."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(8, classes)

    def forward(self, images):
        x = self.stem(images)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(dim=(2, 3)))


def images(count=24, classes=7, side=16, channels=3, seed=0):
    """Images that show their class by their brightness in one channel."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=random)
    pixels = torch.randn(count, channels, side, side, generator=random)
    pixels[:, 0] += labels[:, None, None] - classes / 2
    return pixels, labels


def loader(batch_size=6, **settings):
    pixels, labels = images(**settings)
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]
    return DataLoader(rows, batch_size=batch_size)


def module_of(kind, **settings):
    torch.manual_seed(0)
    if kind == "plain":
        return ImageClassifierModule(Plain(), **settings)
    return ImageClassifierModule(kind, SETTINGS[kind], **{"num_classes": 7} | settings)
