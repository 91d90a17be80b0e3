"""Tiny image classifiers of transformers, for images of 32 x 32."""

from __future__ import annotations

import torch
import transformers
from reference_inputs import spread_weights
from torch import nn

WINDOWED = {"image_size": 32, "num_labels": 5}
TRANSFORMER = WINDOWED | {
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
CONVOLUTIONAL = {"hidden_sizes": [8, 12, 16, 24], "depths": [2, 1, 2, 1], "patch_size": 2, "num_labels": 5}
MODELS = {
    "ConvNext": CONVOLUTIONAL,
    "ConvNextV2": CONVOLUTIONAL,
    "DeiT": TRANSFORMER,
    "ViT": TRANSFORMER,
    "Swin": WINDOWED | {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
}
BLOCKS = {  # as the code of each model has them
    "ConvNext": [f"convnext.encoder.stages.{stage}.layers" for stage in range(4)],
    "ConvNextV2": [f"convnextv2.encoder.stages.{stage}.layers" for stage in range(4)],
    "DeiT": ["deit.layers"],
    "ViT": ["vit.layers"],
    "Swin": ["swin.encoder.layers.0.blocks", "swin.encoder.layers.1.blocks"],
}


def image_model(family: str) -> nn.Module:
    """A classifier with random weights that all matter."""
    config = getattr(transformers, f"{family}Config")(**MODELS[family])
    return spread_weights(getattr(transformers, f"{family}ForImageClassification")(config))


def images(count: int = 6, size: int = 32) -> torch.Tensor:
    """Noise: (count, 3, size, size)."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))
