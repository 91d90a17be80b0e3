"""Small networks of convolutions and recurrent layers, their data, and selections of their weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from reference_inputs import spread_weights
from reference_products import images
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: with such small tensors, several threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Convolutions


class Residual(nn.Module):
    """A block of convolutions that keeps the shape of its input."""

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.conv2 = nn.Conv2d(width, width, (1, 3), padding=(0, 2), dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x).relu()).tanh()


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def vgg() -> nn.Module:
    features = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 5, stride=2, padding=1), nn.ReLU()),
    )
    connected = nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Dropout())
    return nn.Sequential(OrderedDict(features=features, connected=connected, classifier=nn.Linear(16, 5)))


def mobile() -> nn.Module:
    """Depthwise separable convolutions, one of them grouped."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU6()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1), nn.ReLU6()),
        *(nn.Conv2d(16, 32, 3, padding=1, groups=16), nn.Conv2d(32, 16, 1, groups=4), nn.ReLU6(), Pool()),
        nn.Linear(16, 5),
    )


def resnext() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.Sequential(*(Residual(16, 4) for _ in range(3))), Pool())


def line() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(3, 8, 5, stride=2), nn.ReLU(), nn.Conv1d(8, 8, 4, padding="same", dilation=2, groups=2)),
        *(nn.Tanh(), nn.Conv1d(8, 4, 3, padding=1, padding_mode="circular")),
    )


def resnet(layer_type: str) -> nn.Module:
    sizes = {"bottleneck": [16, 32], "basic": [8, 16]}[layer_type]
    settings = {"embedding_size": 8, "hidden_sizes": sizes, "depths": [2, 3], "num_labels": 5}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**settings, layer_type=layer_type))


# Recurrent layers


class Tagger(nn.Module):
    """An embedding, recurrent layers over packed sequences, and a tag for each token."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.recurrent = kind(6, 8, batch_first=True, **settings)
        width = settings.get("proj_size", 8)
        self.tag = nn.Linear(width * (2 if settings.get("bidirectional") else 1), 8)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)
        return self.tag(hidden[hidden.any(dim=-1)])


class Recurrent(nn.Module):
    """A block around a recurrent layer, time first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(width, width, num_layers=2), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        start = x[:, :1].expand(-1, 2, -1).transpose(0, 1).contiguous()
        return x + self.out(self.gru(x.transpose(0, 1), start)[0].transpose(0, 1))


class Decoder(nn.Module):
    """Cells, called step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.LSTMCell(4, 8), nn.GRUCell(8, 8), nn.RNNCell(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, c, second, third = (x.new_ones(len(x), width) for width in (8, 8, 8, 4))
        for step in x.unbind(1):
            h, c = self.first(step, (h, c))
            second = self.second(h, second)
            third = self.third(second, third)
        return third


# Data


def sentences() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 20, (5, 7), generator=generator), torch.tensor([4, 7, 2, 7, 5])


def signals(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def as_batches(data: Any, size: int) -> list[Any]:
    if isinstance(data, tuple):
        return list(zip(*(tensor.split(size) for tensor in data), strict=True))
    return list(data.split(size))


# All of them

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "vgg": (vgg, images),
    "mobile": (mobile, images),
    "resnext": (resnext, images),
    "line": (line, lambda: signals(3, 3, 24)),
    "resnet bottleneck": (partial(resnet, "bottleneck"), partial(images, 4, 32)),
    "resnet basic": (partial(resnet, "basic"), partial(images, 4, 32)),
    "lstm": (partial(Tagger, nn.LSTM, num_layers=2, bidirectional=True), sentences),
    "projected lstm": (partial(Tagger, nn.LSTM, num_layers=2, proj_size=4, bidirectional=True), sentences),
    "gru": (partial(Tagger, nn.GRU, num_layers=2), sentences),
    "rnn": (partial(Tagger, nn.RNN, bidirectional=True, nonlinearity="relu", bias=False), sentences),
    "recurrent blocks": (lambda: nn.Sequential(Recurrent(8), Recurrent(8)), lambda: signals(3, 6, 8)),
    "cells": (Decoder, lambda: signals(3, 5, 4)),
}


def network(name: str) -> tuple[nn.Module, Any]:
    """A network with weights that all matter, and its data."""
    make, data = NETWORKS[name]
    model = spread_weights(make())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return model, data()


def blocks_of(model: nn.Module, lists: list[str]) -> list[list[str]]:
    """The names of the convolutions', recurrent and linear weights of each block."""
    return [
        [
            name
            for name, parameter in model.named_parameters()
            if name.startswith(f"{blocks}.{number}.") and parameter.ndim > 1
        ]
        for blocks in lists
        for number in range(len(model.get_submodule(blocks)))
    ]


SELECTIONS = {
    "per output": {"sparsity": 0.6},
    "per layer": {"granularity": "layer"},
    "per input": {"granularity": "input", "sparsity": 0.3},
    "magnitude": {"score": "magnitude", "granularity": "layer", "sparsity": 0.7},
    "magnitude per output": {"score": "magnitude", "granularity": "output"},
}
