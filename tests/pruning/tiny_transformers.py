"""Tiny random models of many architectures of transformers, and their inputs."""

from __future__ import annotations

import torch
from architecture_settings import IMAGE_TOKEN, VOCABULARY
from architectures import ARCHITECTURES
from tiny_models import spread
from torch import Tensor, nn


def model_of(name: str) -> nn.Module:
    """The model, with random weights that all matter."""
    import transformers

    architecture = ARCHITECTURES[name]
    prefix = architecture.family
    text = {"Gemma3": "Gemma3Text", "Llama4": "Llama4Text"}.get(prefix, prefix)
    config = getattr(transformers, f"{text}Config")(**architecture.settings)
    torch.manual_seed(0)
    return spread(getattr(transformers, prefix + architecture.head)(config))


def samples_of(name: str, count: int = 5) -> list[dict[str, Tensor]]:
    """Batches of one sample each."""
    generator = torch.Generator().manual_seed(1)
    make = SAMPLES[ARCHITECTURES[name].data]
    return [make(12 - 3 * (number % 2), generator) for number in range(count)]


def _ids(length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY - 1, (1, length), generator=generator)


def _images(generator: torch.Generator, size: int = 32) -> Tensor:
    return torch.randn(1, 3, size, size, generator=generator)


def _image_tokens(length: int, generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.cat([torch.full((1, 16), IMAGE_TOKEN), _ids(length, generator)], dim=1)
    return {"input_ids": ids, "pixel_values": _images(generator)}


SAMPLES = {
    "text": lambda length, g: {"input_ids": _ids(length, g)},
    "text to text": lambda length, g: {"input_ids": _ids(length, g), "decoder_input_ids": _ids(length - 2, g)},
    "sound": lambda length, g: {"input_values": torch.randn(1, 40 * length, generator=g)},
    "spectrogram": lambda length, g: {
        "input_features": torch.randn(1, 8, 32, generator=g),
        "decoder_input_ids": _ids(length, g),
    },
    "mel": lambda length, g: {"input_values": torch.randn(1, 32, 16, generator=g)},
    "images": lambda length, g: {"pixel_values": _images(g)},
    "text and images": lambda length, g: {"input_ids": _ids(length, g), "pixel_values": _images(g)},
    "image tokens": _image_tokens,
    "image grids": lambda length, g: {
        "input_ids": torch.cat([torch.full((1, 4), IMAGE_TOKEN), _ids(length, g)], dim=1),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=g),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": torch.tensor([[1] * 4 + [0] * length]),
    },
}
