"""`prune` on convolutions of any shape, recurrent layers and weights that are used without their layer, against what
plain hooks, unfolding and recurrences by hand give."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from passes import attended, covered, spread_weights
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from unfolded import (
    asked_for,
    by_groups,
    check_mask,
    check_model,
    gathered,
    images,
    matrix_of,
    scores_of,
    side_by_side,
    unfolded,
    untouched,
)

from sparsefit import MaskSet, PruningConfig, prune
from sparsefit.errors import CalibrationError, ConfigError, MaskError
from sparsefit.pruning.blocks import find_block_lists
from sparsefit.pruning.least_squares import least_squares
from sparsefit.pruning.reconstruction import inverse_factor, prune_iteratively, update_sequentially
from sparsefit.pruning.refinement import swap
from sparsefit.pruning.selection import Granularity, select, select_n_of_m


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On tensors so small threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Networks


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


def sentences() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 20, (5, 7), generator=generator), torch.tensor([4, 7, 2, 7, 5])


def signals(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


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
LEFT_DENSE = {
    "vgg": {"classifier.weight": "output layer"},
    "mobile": {"2.weight": "depthwise convolution", "5.weight": "depthwise convolution", "9.weight": "output layer"},
    "line": {"4.weight": "output layer"},
    "cells": {"third.weight_ih": "output layer", "third.weight_hh": "output layer"},
    "resnext": {"0.weight": "outside the repeated blocks"},
    **{
        f"resnet {kind}": {
            "resnet.embedder.embedder.convolution.weight": "outside the repeated blocks",
            "classifier.1.weight": "output layer",
        }
        for kind in ("bottleneck", "basic")
    },
    **{kind: {"embed.weight": "embedding", "tag.weight": "output layer"} for kind in ("lstm", "gru", "rnn")},
    "projected lstm": {"embed.weight": "embedding", "tag.weight": "output layer"}
    | {
        f"recurrent.weight_hr_l{layer}{direction}": "projection of an LSTM"
        for layer in range(2)
        for direction in ("", "_reverse")
    },
}


def network(name: str) -> tuple[nn.Module, Any]:
    """A network in which all weights matter, and data for it."""
    make, data = NETWORKS[name]
    model = spread_weights(make())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return model, data()


SELECTIONS = {
    "per output": {"sparsity": 0.6},
    "per layer": {"granularity": "layer"},
    "per input": {"granularity": "input", "sparsity": 0.3},
    "magnitude": {"score": "magnitude", "granularity": "layer", "sparsity": 0.7},
    "magnitude per output": {"score": "magnitude", "granularity": "output"},
}


@pytest.mark.slow
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_masks_of_whole_networks(name, selection):
    model, data = network(name)
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig(update="none", **selection))
    assert result.update == "none"
    assert not result.notes
    assert covered(model, result)
    assert result.left_dense == LEFT_DENSE.get(name, {})
    sparsity, granularity = selection.get("sparsity", 0.5), selection.get("granularity", "output")
    weights, zeros = asked_for(sparsity, result, granularity)
    assert weights == sum(model.get_parameter(name).numel() for name in result.masks)
    assert zeros == sum(int((model.get_parameter(name) == 0).sum()) for name in result.masks)
    assert result.masks.sparsity == zeros / weights
    check_model(dense, model, result, lambda model: gathered(model, [data]), **{"granularity": "output"} | selection)


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
@pytest.mark.parametrize(("name", "exclude"), [("vgg", ("features.0",)), ("resnext", ()), ("resnet bottleneck", ())])
def test_patterns_run_along_the_channels_of_a_position(name, exclude, score):
    model, data = network(name)
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig(update="none", pattern="2:4", score=score, exclude=exclude))
    assert covered(model, result)
    assert result.masks.sparsity == 0.5
    for weight in result.masks:
        kept = (model.get_parameter(weight) != 0).flatten(2) if model.get_parameter(weight).ndim > 2 else None
        if kept is not None:  # (out, channels, positions)
            assert (kept.unflatten(1, (-1, 4)).sum(2) == 2).all()
    check_model(dense, model, result, lambda model: gathered(model, [data]), score=score, pattern="2:4")


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


@pytest.mark.parametrize("selection", [{}, {"granularity": "layer", "sparsity": 0.6}])
@pytest.mark.parametrize(("name", "blocks"), [("resnext", "1"), ("recurrent blocks", "")])
def test_blocks_see_what_the_pruned_ones_before_them_give(name, blocks, selection):
    model, data = network(name)
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig(**selection))
    assert result.update == "block"
    assert not result.notes
    stages = blocks_of(dense, [blocks]) if blocks else [[n for n in result.masks if n[0] == digit] for digit in "01"]
    assert all(stages)
    check_model(dense, model, result, lambda model: gathered(model, [data]), stages, **selection)


def test_stages_that_keep_their_shape_are_swept_and_the_others_come_after():
    model, data = network("resnet basic")
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig())
    assert result.update == "block"
    assert len(result.notes) == 1
    assert "shape of the hidden state" in result.notes[0]
    stages = blocks_of(dense, ["resnet.encoder.stages.0.layers"])
    stages.append([name for name in result.masks if ".stages.1." in name])
    check_model(dense, model, result, lambda model: gathered(model, [data]), stages)


@pytest.mark.parametrize("name", ["vgg", "mobile", "line", "resnet bottleneck", "lstm", "cells"])
def test_without_blocks_of_one_shape_it_takes_one_pass_and_says_so(name):
    model, data = network(name)
    other = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig())
    assert result.update == "none"
    assert len(result.notes) == 1
    assert "update='none'" in result.notes[0]
    assert result.masks.digest() == prune(other, [data], PruningConfig(update="none")).masks.digest()


# Convolutions of any shape, one by one

CONVOLUTIONS = {
    "plain": (nn.Conv2d, {"kernel_size": 3}),
    "strided": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 2)}),
    "dilated": (nn.Conv2d, {"kernel_size": (2, 3), "dilation": (3, 2), "padding": 2}),
    "same": (nn.Conv2d, {"kernel_size": (4, 3), "padding": "same"}),
    "patches": (nn.Conv2d, {"kernel_size": 4, "stride": 4}),
    "groups": (nn.Conv2d, {"kernel_size": 3, "groups": 2, "padding": 1}),
    "reflected": (nn.Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}),
    "one point": (nn.Conv2d, {"kernel_size": 1, "padding": 1, "stride": 2}),
    "one point in groups": (nn.Conv2d, {"kernel_size": 1, "groups": 2}),
    "line": (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2}),
    "line in groups": (nn.Conv1d, {"kernel_size": 4, "groups": 2}),
    "volume": (nn.Conv3d, {"kernel_size": (2, 1, 3), "stride": (1, 2, 1), "padding": (1, 0, 1)}),
    "volume in groups": (nn.Conv3d, {"kernel_size": 2, "groups": 2, "dilation": (1, 1, 2)}),
}


def convolution(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer, and inputs in whole numbers: no sum of their squares is rounded."""
    make, settings = CONVOLUTIONS[kind]
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[make]
    generator = torch.Generator().manual_seed(7)
    return spread_weights(nn.Sequential(make(8, 6, **settings))), torch.randint(
        -9, 10, (3, 8, *(9, 8, 5)[:dims]), generator=generator
    ).float()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("selection", [*SELECTIONS.values(), {"pattern": "2:4"}, {"pattern": "1:4"}])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_masks_of_one_convolution(kind, selection):
    model, data = convolution(kind)
    dense = copy.deepcopy(model)
    result = prune(model, [data[:1], data[1:]], PruningConfig(update="none", micro_batch_size=2, **selection))
    check_model(dense, model, result, lambda model: gathered(model, [data]), **{"granularity": "output"} | selection)


def test_patterns_need_channels_and_not_positions_that_divide():
    model, data = spread_weights(nn.Sequential(nn.Conv2d(6, 4, 2))), images(2, 8, 6)
    with pytest.raises(ConfigError, match=r"'2:4' needs widths that 4 divides.*0\.weight \(6 inputs\)"):
        prune(model, [data], PruningConfig(pattern="2:4"))
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig(pattern="3:6", update="none"))
    check_model(dense, model, result, lambda model: gathered(model, [data]), pattern="3:6")


@pytest.mark.parametrize("make", [lambda: nn.LazyConv2d(4, 3), lambda: nn.LazyLinear(4)])
def test_layers_without_a_shape_are_told(make):
    model, data = nn.Sequential(make(), nn.ReLU()), images(2, 8, 4)
    with pytest.raises(ConfigError, match=r"0\.weight has no shape yet: run the model on one batch first"):
        prune(model, [data])
    model(data)
    prune(model, [data]).masks.verify(model)


def test_layers_of_one_input_and_geometry_and_their_group():
    """Branches over one image: what they share must not mix up what they do not."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            settings = [(3, 1, 1), (3, 1, 1), (3, 2, 1), (1, 0, 1), (3, 1, 2)]
            self.branches = nn.ModuleList(
                nn.Conv2d(8, 4, kernel, padding=padding, groups=groups) for kernel, padding, groups in settings
            )

        def forward(self, x: Tensor) -> list[Tensor]:
            return [branch(x) for branch in self.branches]

    data = images(3, 6, 8)
    for config in ({}, {"reconstruction": "sequential"}):
        model = spread_weights(Branches())
        dense = copy.deepcopy(model)
        result = prune(model, [data], PruningConfig(update="none", **config))
        inputs = gathered(dense, [data])
        for name, mask in result.masks.items():
            check_mask(mask, dense.get_parameter(name), scores_of(matrix_of(dense, name), inputs[name]))


# Transformers models


def whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))
    }
    limits = {"vocab_size": 61, "num_mel_bins": 8, "d_model": 16, "max_source_positions": 16}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, **limits, **special, max_target_positions=16)
    model = spread_weights(transformers.WhisperForConditionalGeneration(config))
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(3, 61, (3, 6), generator=generator)
    return model, {"input_features": signals(3, 8, 32), "decoder_input_ids": ids}


def wav2vec2() -> tuple[nn.Module, dict[str, Tensor]]:
    convolutions = {"conv_dim": (8, 8, 8), "conv_stride": (4, 2, 2), "conv_kernel": (6, 3, 2)}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.Wav2Vec2Config(**convolutions, **positions, **sizes, vocab_size=20)
    return spread_weights(transformers.Wav2Vec2ForCTC(config)), {"input_values": signals(3, 400)}


def mamba() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"vocab_size": 61, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}
    model = spread_weights(transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)))
    return model, {"input_ids": torch.randint(3, 61, (3, 12), generator=torch.Generator().manual_seed(6))}


def gathered_from_mamba(model: nn.Module, batches: list[Any]) -> dict:
    """dt_proj multiplies the first outputs of x_proj, and is never called."""
    steps: dict[str, list[list[Tensor]]] = {}

    def keep(name: str, rank: int, layer: nn.Module, args: tuple, output: Tensor) -> None:
        steps.setdefault(name, [[]])[0].append(output[..., :rank].flatten(0, -2).clone())

    handles = [
        module.x_proj.register_forward_hook(partial(keep, f"{name}.dt_proj.weight", module.time_step_rank))
        for name, module in model.named_modules()
        if hasattr(module, "dt_proj")
    ]
    inputs = gathered(model, batches)
    for handle in handles:
        handle.remove()
    return inputs | steps


@pytest.mark.parametrize("selection", [{}, {"granularity": "layer", "sparsity": 0.6}, {"pattern": "2:4"}])
@pytest.mark.parametrize("update", ["none", "block"])
def test_whisper(update, selection):
    model, data = whisper()
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig(update=update, **selection))
    assert result.update == update
    assert not result.notes
    assert covered(model, result)
    for name in ("conv1", "conv2"):
        assert result.left_dense[f"model.encoder.{name}.weight"] == "outside the repeated blocks"
    stages = blocks_of(dense, ["model.encoder.layers", "model.decoder.layers"]) if update == "block" else None
    check_model(dense, model, result, lambda model: gathered(model, [data]), stages, **selection)


@pytest.mark.parametrize(("widths", "lists"), [((8, 8), 1), ((8, 16), 2)])
def test_lists_in_a_list_are_stages_where_their_blocks_differ_in_width(widths, lists):
    stages = nn.Sequential(*(nn.Sequential(Residual(width), Residual(width)) for width in widths))
    assert [len(blocks) for blocks in find_block_lists(stages)] == [2] * lists
    assert find_block_lists(stages)[0][0] is (stages[0] if lists == 1 else stages[0][0])


def test_the_convolutions_before_the_blocks_of_whisper_come_after_them():
    model, data = whisper()
    dense = copy.deepcopy(model)
    targets = ("conv1", "conv2", "fc1", "fc2")
    result = prune(model, [data], PruningConfig(targets=targets))
    stages = [
        [name for name in names if ".fc" in name]
        for names in blocks_of(dense, ["model.encoder.layers", "model.decoder.layers"])
    ]
    stages.append([f"model.encoder.conv{number}.weight" for number in (1, 2)])
    check_model(dense, model, result, lambda model: gathered(model, [data]), stages)


@pytest.mark.parametrize("selection", [{}, {"granularity": "layer", "sparsity": 0.6}])
@pytest.mark.parametrize("update", ["none", "block"])
def test_wav2vec2(update, selection):
    model, data = wav2vec2()
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig(update=update, **selection))
    assert result.update == update
    assert covered(model, result)
    of_positions = {name: reason for name, reason in result.left_dense.items() if "pos_conv_embed" in name}
    assert len(of_positions) == 2  # magnitude and direction of one kernel
    assert all("Parametrization" in reason for reason in of_positions.values())
    extractor = [name for name in result.left_dense if "feature_extractor" in name]
    assert [result.left_dense[name] for name in extractor] == ["outside the repeated blocks"] * 3
    assert not result.notes
    stages = blocks_of(dense, ["wav2vec2.encoder.layers"]) if update == "block" else None
    check_model(dense, model, result, lambda model: gathered(model, [data]), stages, **selection)


def test_the_feature_extractor_of_wav2vec2_if_it_is_asked_for():
    model, data = wav2vec2()
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig(targets=("conv", "intermediate_dense")))
    blocks = [[f"wav2vec2.encoder.layers.{number}.feed_forward.intermediate_dense.weight"] for number in range(2)]
    extractor = [f"wav2vec2.feature_extractor.conv_layers.{number}.conv.weight" for number in range(3)]
    check_model(dense, model, result, lambda model: gathered(model, [data]), [*blocks, extractor])


def branches() -> nn.Module:
    """Each convolution has its normalisation and activation, some stand two in a row."""

    def layer(before: int, after: int, kernel: int) -> nn.Module:
        convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
        return nn.Sequential(convolution, nn.GroupNorm(1, after), nn.ReLU())

    class Branches(nn.Module):
        def __init__(self, before: int) -> None:
            super().__init__()
            self.one, self.two = layer(before, 8, 1), nn.Sequential(layer(before, 4, 1), layer(4, 8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.one(x), self.two(x)], dim=1)

    head = OrderedDict(pool=Pool(), head=nn.Linear(16, 5))
    return nn.Sequential(OrderedDict(stem=layer(3, 8, 3), first=Branches(8), second=Branches(16), **head))


def test_layers_in_a_row_are_no_repeated_blocks():
    model, data = spread_weights(branches()), images()
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig(update="none"))
    assert result.left_dense == {"head.weight": "output layer"}
    check_model(dense, model, result, lambda model: gathered(model, [data]))


@pytest.mark.parametrize("selection", [{}, {"granularity": "layer"}, {"pattern": "2:4"}])
@pytest.mark.parametrize("update", ["none", "block"])
def test_mamba(update, selection):
    model, data = mamba()
    dense = copy.deepcopy(model)
    result = prune(model, [data], PruningConfig(update=update, **selection))
    assert not result.notes
    assert covered(model, result)
    layers = ("in_proj", "x_proj", "dt_proj", "out_proj")
    stages = [[f"backbone.layers.{number}.mixer.{name}.weight" for name in layers] for number in range(2)]
    if update == "none":
        stages = [[*stages[0], *stages[1]]]
    check_model(dense, model, result, lambda model: gathered_from_mamba(model, [data]), stages, **selection)


# Weights that are used without their layer


class Functional(nn.Module):
    """A layer whose weight goes into a function, called with (batch, 8) or (batch, tokens, 8)."""

    def __init__(self, layer: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.layer.weight)


class Casting(nn.Linear):
    """Computes with a copy of its weight in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


BY_TOKENS = {
    "linear": lambda x, w: F.linear(x, w),
    "linear by name": lambda x, w: F.linear(input=x, weight=w, bias=None),
    "times t()": lambda x, w: x @ w.t(),
    "times T": lambda x, w: x @ w.T,
    "matmul": lambda x, w: torch.matmul(x, w.transpose(0, 1)),
    "method": lambda x, w: x.matmul(w.mT),
    "weight first": lambda x, w: w @ x.mT,
    "mm": lambda x, w: torch.mm(x.flatten(0, 1), w.t()),
    "mm, weight first": lambda x, w: torch.mm(w, x.flatten(0, 1).t()),
    "addmm": lambda x, w: torch.addmm(x.new_ones(len(w)), x.flatten(0, 1), w.t()),
    "linalg": lambda x, w: torch.linalg.matmul(x, w.mT),
    "batch of one": lambda x, w: x @ w.t()[None],
    "batch of one, weight first": lambda x, w: w[None] @ x.mT,
    "bmm": lambda x, w: torch.bmm(x, w.t().expand(len(x), -1, -1)),
    "vectors": lambda x, w: [torch.mv(w, token) for token in x.flatten(0, 1)],
    "vectors, method": lambda x, w: [w.mv(token) for token in x.flatten(0, 1)],
    "vectors, weight first": lambda x, w: [w @ token for token in x.flatten(0, 1)],
    "vectors times t()": lambda x, w: [token @ w.t() for token in x.flatten(0, 1)],
    "addmm, method": lambda x, w: x.new_ones(len(w)).expand(x[..., 0].numel(), -1).addmm(x.flatten(0, 1), w.t()),
    "rows apart": lambda x, w: torch.cat([F.linear(x, w[:2]), x @ w[2:].t()], dim=-1),
}


@pytest.mark.parametrize("function", BY_TOKENS.values(), ids=BY_TOKENS)
@pytest.mark.parametrize("selection", [{}, {"granularity": "layer"}, {"pattern": "2:4"}])
def test_the_weight_of_a_linear_layer_in_a_function(function, selection):
    model = spread_weights(Functional(nn.Linear(8, 6), function))
    dense, data = copy.deepcopy(model), signals(4, 5, 8)
    result = prune(model, [data], PruningConfig(update="none", **selection))
    assert not result.notes
    expected = {"layer.weight": [[data.flatten(0, 1)]]}
    check_model(dense, model, result, lambda model: expected, **selection)


def test_rows_of_a_weight_with_inputs_of_their_own():
    """A packed matrix, of which each half multiplies something else."""

    def halves(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x[:, ::2], w[:3]) + x[:, 1::2].exp() @ w[3:].t()

    model = spread_weights(Functional(nn.Linear(8, 6), halves))
    dense, data = copy.deepcopy(model), signals(3, 6, 8)
    result = prune(model, [data], PruningConfig(update="none"))
    inputs = [[data[:, ::2].flatten(0, 1)], [data[:, 1::2].exp().flatten(0, 1)]]
    check_model(dense, model, result, lambda model: {"layer.weight": inputs})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_a_layer_that_casts_its_weight_is_seen_by_its_call(dtype):
    model = spread_weights(nn.Sequential(Casting(8, 6), nn.Tanh(), Casting(6, 4)))
    dense, data = copy.deepcopy(model), signals(4, 5, 8).to(dtype)
    result = prune(model, [data], PruningConfig(update="none"))
    assert not result.notes
    hidden = model[1](dense[0](data)).detach()
    expected = {"0.weight": [[data.flatten(0, 1)]], "2.weight": [[hidden.flatten(0, 1)]]}
    check_model(dense, model, result, lambda model: expected)


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}])
def test_the_weight_of_a_convolution_in_a_function(settings):
    layer = nn.Conv2d(4, 6, 3, **settings)
    model = spread_weights(Functional(layer, lambda x, w: F.conv2d(x, w, **settings)))
    dense, data = copy.deepcopy(model), images(3, 8, 4)
    result = prune(model, [data], PruningConfig(update="none"))
    assert not result.notes
    check_model(dense, model, result, lambda model: {"layer.weight": [[unfolded(layer, data)[0]]]})


FLAT = {
    "times patches": (nn.Conv2d(4, 6, 3), lambda x, w: w.flatten(1) @ F.unfold(x, 3)),
    "linear": (nn.Conv2d(4, 6, 1), lambda x, w: F.linear(x.flatten(2).mT, w[:, :, 0, 0])),
    "linear, another view": (nn.Conv2d(4, 6, 1), lambda x, w: x.flatten(2).mT @ w.squeeze().t()),
    "convolution in space": (nn.Conv1d(4, 6, 3), lambda x, w: F.conv2d(x, w[..., None])),
    "convolution of a matrix": (nn.Linear(4, 6), lambda x, w: F.conv2d(x, w[:, :, None, None])),
}


@pytest.mark.parametrize(("layer", "function"), FLAT.values(), ids=FLAT)
def test_a_view_of_another_shape_in_a_function(layer, function):
    model = spread_weights(Functional(copy.deepcopy(layer), function))
    dense, data = copy.deepcopy(model), images(3, 8, 4)
    result = prune(model, [data], PruningConfig(update="none"))
    assert not result.notes
    kernel = {nn.Conv1d: (3, 1), nn.Linear: (1, 1)}.get(type(layer)) or layer.kernel_size
    patches = F.unfold(data, kernel).mT.flatten(0, 1)
    check_model(dense, model, result, lambda model: {"layer.weight": [[patches]]})


class Attention(nn.Module):
    """Holds nn.MultiheadAttention and calls the function itself."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.MultiheadAttention(8, 2)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        held, turned = self.held, [tensor.transpose(0, 1) for tensor in (query, memory)]
        projections = held.in_proj_weight, held.in_proj_bias, None, None, False, 0.0
        out = held.out_proj.weight, held.out_proj.bias
        return F.multi_head_attention_forward(turned[0], turned[1], turned[1], 8, 2, *projections, *out, False)[0]


def test_the_weights_of_attention_in_a_function():
    model = spread_weights(Attention())
    dense, data = copy.deepcopy(model), (signals(3, 5, 8), signals(3, 7, 8).exp())
    result = prune(model, [data], PruningConfig(update="none"))
    assert not result.notes
    query, memory = data
    held = copy.deepcopy(dense.held)
    given = [[tensor.flatten(0, 1)] for tensor in (query, memory, memory)]
    attention = attended(held, query, memory, memory)
    expected = {"held.in_proj_weight": given, "held.out_proj.weight": [[attention.flatten(0, 1).detach()]]}
    check_model(dense, model, result, lambda model: expected)


def test_a_product_that_cannot_be_seen_is_told():
    model = spread_weights(Functional(nn.Linear(8, 6), lambda x, w: (x[..., None, :] * w).sum(-1)))
    dense = copy.deepcopy(model)
    result = prune(model, [signals(4, 5, 8)], PruningConfig(update="none"))
    assert len(result.notes) == 1
    assert result.notes[0].startswith("layer.weight saw no calibration token")
    check_model(dense, model, result, lambda model: {}, score="magnitude")


# Methods that take Gram matrices


def one_layer(kind: str) -> tuple[nn.Module, Any]:
    make = {
        "convolution": lambda: (nn.Conv2d(8, 6, 3, padding=1), signals(5, 8, 6, 6)),
        "groups": lambda: (nn.Conv2d(16, 8, (2, 3), groups=2, stride=(1, 2)), signals(6, 16, 7, 7)),
        "line": lambda: (nn.Conv1d(20, 6, 7, stride=2), signals(6, 20, 64)),  # 140 columns: two blocks of SparseGPT
        "one point": lambda: (nn.Conv2d(8, 6, 1), signals(5, 8, 4, 4)),
        "lstm": lambda: (nn.LSTM(8, 8, num_layers=2, bidirectional=True), signals(12, 5, 8)),
        "gru": lambda: (nn.GRU(8, 12, batch_first=True), signals(5, 12, 8)),
    }
    layer, data = make[kind]()
    return spread_weights(nn.Sequential(layer)), data


METHODS = {
    "sequential": {"reconstruction": "sequential"},
    "least_squares": {"reconstruction": "least_squares"},
    "iterative": {"reconstruction": "iterative", "score": "sparsegpt"},
    "iterative per output": {"reconstruction": "iterative", "score": "wanda", "granularity": "output"},
    "swaps": {"swaps": 3},
    "swaps, sequential": {"swaps": 2, "reconstruction": "sequential"},
}


def method_by_hand(dense: Tensor, tokens: Tensor, order: np.ndarray, config: PruningConfig) -> tuple[Tensor, Tensor]:
    """The mask and the new values of the rows that multiply some (tokens, in), by the pure functions."""
    dense, tokens = dense[:, order], tokens[:, order].float()
    gram, structure, granularity = tokens.t() @ tokens, config.structure, Granularity.parse(config.granularity)
    factor = inverse_factor(gram, config.damping)

    def choose(weights: Tensor, columns: slice, diagonal: Tensor) -> Tensor:
        if config.score == "sparsegpt":
            scores = (weights / diagonal) ** 2
        else:
            scores = weights.abs() * gram.diagonal()[columns].sqrt()
        if structure:
            return select_n_of_m(scores, structure.n, structure.m)
        return select(scores, granularity, config.exact_sparsity)

    if config.reconstruction == "iterative":
        mask, values = prune_iteratively(dense, factor, choose, group=structure.m if structure else None)
    else:
        mask = choose(dense, slice(None), factor.upper.diagonal())
        if config.swaps:
            mask = swap(dense, mask, gram, config.swaps, (structure.n, structure.m) if structure else None)
        values = dense.masked_fill(~mask, 0)
        if config.reconstruction == "sequential":
            values = update_sequentially(dense, mask, factor)
        elif config.reconstruction == "least_squares":
            values, _ = least_squares(dense, mask, gram, config.damping)
    back = np.argsort(order)
    return mask[:, back], values[:, back]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("kind", ["convolution", "groups", "line", "one point", "lstm", "gru"])
def test_methods_with_gram_matrices(kind, method, pattern):
    model, data = one_layer(kind)
    dense, config = copy.deepcopy(model), PruningConfig(update="none", pattern=pattern, **method)
    result = prune(model, [data], config, forward=lambda batch: model(data))
    inputs = gathered(dense, [data])
    assert sorted(result.masks) == sorted(name for name, p in dense.named_parameters() if p.ndim > 1)
    for name, mask in result.masks.items():
        parameter, matrix = dense.get_parameter(name), matrix_of(dense, name)
        order = side_by_side(parameter) if pattern and parameter.ndim > 2 else np.arange(matrix.shape[1])
        error = norm = 0.0
        for rows, tokens in by_groups(matrix, inputs[name]):
            kept, values = method_by_hand(matrix[rows], tokens, order, config)
            assert torch.equal(mask[rows], kept)
            torch.testing.assert_close(matrix_of(model, name)[rows], values, rtol=1e-3, atol=1e-4)
            assert not matrix_of(model, name)[rows][~kept].any()
            outputs = tokens.double() @ matrix[rows].double().t()
            changed = tokens.double() @ matrix_of(model, name)[rows].double().t()
            error, norm = error + (changed - outputs).square().sum(), norm + outputs.square().sum()
        assert result.layer_errors[name] == pytest.approx(float(error / norm), rel=1e-3)
    result.masks.verify(model)


@pytest.mark.parametrize("method", [METHODS["sequential"], METHODS["iterative"]])
@pytest.mark.parametrize(("name", "exclude"), [("vgg", "features.0"), ("resnext", ""), ("lstm", "tag")])
def test_updates_mend_what_masks_alone_break(name, exclude, method):
    """In the layers that see the data as it is, and so the same inputs whatever the method."""
    errors = {}
    for label, settings in (("mask", {"swaps": 0, "score": "sparsegpt"}), ("update", method)):
        model, data = network(name)
        config = PruningConfig(update="none", exclude=(exclude,) if exclude else (), **settings)
        result = prune(model, [data], config)
        result.masks.verify(model)
        dense, _ = network(name)
        for weight, groups in gathered(dense, [data]).items():
            if weight in result.masks:
                matrix = matrix_of(dense, weight) - matrix_of(model, weight)
                parts = [(tokens @ matrix[rows].t()).square().sum() for rows, tokens in by_groups(matrix, groups)]
                errors[label] = errors.get(label, 0) + float(sum(parts))
    assert errors["update"] < errors["mask"]


# How weights are laid out, and how data is cut


@pytest.mark.parametrize("settings", [{}, {"granularity": "layer"}, {"pattern": "2:4"}, {"update": "block"}])
def test_channels_last(settings):
    model, data = network("resnext")
    model = model.to(memory_format=torch.channels_last)
    strides = {name: parameter.stride() for name, parameter in model.named_parameters()}
    assert not model[1][0].conv1.weight.is_contiguous()
    dense = copy.deepcopy(model)
    data = data.to(memory_format=torch.channels_last)
    result = prune(model, [data], PruningConfig(**{"update": "none"} | settings))
    result.masks.verify(model)
    assert {name: parameter.stride() for name, parameter in model.named_parameters()} == strides
    stages = blocks_of(dense, ["1"]) if result.update == "block" else None
    selection = {key: value for key, value in settings.items() if key != "update"}
    check_model(dense, model, result, lambda model: gathered(model, [data]), stages, **selection)


@pytest.mark.parametrize("method", METHODS)
def test_channels_last_with_new_values(method):
    config = PruningConfig(update="none", **METHODS[method])
    plain, data = one_layer("convolution")
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    masks, others = (prune(model, [data], config).masks for model in (plain, last))
    assert masks.digest() == others.digest()
    assert not last[0].weight.is_contiguous()
    torch.testing.assert_close(last[0].weight, plain[0].weight, rtol=1e-4, atol=1e-5)


def as_batches(data: Any, size: int) -> list[Any]:
    if isinstance(data, tuple):
        return list(zip(*(tensor.split(size) for tensor in data), strict=True))
    return list(data.split(size))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vgg", "mobile", "resnext", "line", "resnet basic", "lstm", "gru", "recurrent blocks"]
)
def test_however_the_samples_go_through_the_masks_are_the_same(name):
    digests, exact = set(), set()
    for size in (1, 2, 3, 8):
        for cut in (1, 2, 8):
            model, data = network(name)
            masks = prune(model, as_batches(data, cut), PruningConfig(micro_batch_size=size)).masks
            digests.add(masks.digest())
    for cut in (1, 3, 8):
        model, data = network(name)
        config = PruningConfig(micro_batch_size=2, reconstruction="sequential")
        prune(model, as_batches(data, cut), config)
        exact.add(tuple(float(parameter.detach().double().sum()) for parameter in model.parameters()))
    assert len(digests) == len(exact) == 1


# Masks


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["resnext", "mobile", "lstm", "line", "cells"])
def test_masks_fit_the_model_and_are_kept(name, last, tmp_path):
    model, data = network(name)
    if last and name in ("resnext", "mobile"):
        model = model.to(memory_format=torch.channels_last)
    dense = copy.deepcopy(model)
    masks = prune(model, [data], PruningConfig(update="none", sparsity=0.6)).masks
    masks.save(tmp_path / "masks.safetensors")
    loaded = MaskSet.load(tmp_path / "masks.safetensors")
    assert list(loaded) == list(masks)
    assert loaded.digest() == MaskSet.from_state_dict(masks.state_dict()).digest() == masks.digest()
    for weight in masks:
        stored = dense.get_parameter(weight)
        whole = loaded.for_parameter(weight, stored)
        assert whole.shape == stored.shape
        assert torch.equal(whole.flatten(1), masks[weight])
        assert torch.equal(stored.masked_fill(~whole, 0), model.get_parameter(weight))
    loaded.verify(model)
    loaded.verify(model.state_dict())
    with pytest.raises(MaskError, match="pruned weights are not zero"):
        loaded.verify(dense)
    applied = copy.deepcopy(dense)
    loaded.apply(applied)
    untouched(model, applied)
    matrices = dict(loaded.matrices_in(model))
    assert all(torch.equal(matrices[weight], matrix_of(model, weight)) for weight in masks)
    weight = next(iter(masks))
    place = tuple((~loaded.for_parameter(weight, model.get_parameter(weight))).nonzero()[-1])
    model.get_parameter(weight).data[place] = 1
    with pytest.raises(MaskError, match=rf"in 1 of {len(masks)} matrices: {weight} \(1\)"):
        loaded.verify(model)


def test_masks_of_another_kernel_do_not_fit():
    model, data = convolution("plain")
    masks = prune(model, [data]).masks
    with pytest.raises(MaskError, match=r"0\.weight is \(6, 8, 2, 3\)"):
        masks.apply(nn.Sequential(nn.Conv2d(8, 6, (2, 3))))


# Errors


class OwnError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("error", [OwnError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "settings", [{}, {"reconstruction": "sequential"}, {"update": "none", "sparsity": 0.8}], ids=str
)
@pytest.mark.parametrize("name", ["resnext", "resnext, channels last", "recurrent blocks", "line", "cells"])
def test_what_ends_it_on_the_way_leaves_the_model_dense(name, settings, error):
    model, data = network(name.split(",")[0])
    if "last" in name:
        model = model.to(memory_format=torch.channels_last)
    dense = copy.deepcopy(model)
    strides = [parameter.stride() for parameter in model.parameters()]
    for at in itertools.count(1):

        def progress(done: int, total: int, at: int = at) -> None:
            if done == at:
                raise error

        try:
            prune(model, [data], PruningConfig(micro_batch_size=2, **settings), progress=progress)
        except error:
            untouched(dense, model)
            assert [parameter.stride() for parameter in model.parameters()] == strides
        else:
            break
    assert at > 1


@pytest.mark.parametrize("name", ["resnext", "lstm", "recurrent blocks"])
def test_what_cannot_be_written_leaves_the_model_dense(name, monkeypatch):
    """The last weight fails, after all others were pruned."""
    model, data = network(name)
    dense, total = copy.deepcopy(model), len(prune(copy.deepcopy(model), [data]).masks)
    calls, add = itertools.count(1), MaskSet.add

    def fail(self: MaskSet, *args: Any) -> Tensor:
        if next(calls) == total:
            raise OwnError
        return add(self, *args)

    monkeypatch.setattr(MaskSet, "add", fail)
    with pytest.raises(OwnError):
        prune(model, [data])
    untouched(dense, model)


@pytest.mark.parametrize("settings", [{}, {"reconstruction": "sequential"}])
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("vgg", "features.0.weight"),
        ("line", "0.weight"),
        ("resnext", "1.0.conv1.weight"),
        ("cells", "first.weight_ih"),
        ("recurrent blocks", "0.gru.weight_ih_l0"),
    ],
)
def test_the_layer_and_the_batch_of_nan_inputs_are_named(name, layer, settings):
    model, data = network(name)
    dense, data = copy.deepcopy(model), data.clone()
    data[2].flatten()[0] = torch.nan
    with pytest.raises(CalibrationError, match=rf"inputs of {layer} are NaN or infinite in calibration batch 2\b"):
        prune(model, data.split(1), PruningConfig(micro_batch_size=3, **settings))
    untouched(dense, model)


def test_packed_sequences_do_not_show_which_batch_nan_comes_from():
    """Their steps come one after the other, those of all sequences together: all batches are named, not a wrong one."""
    model, (ids, lengths) = network("lstm")
    model.embed.weight.data[int(ids[3, 0])] = torch.nan
    dense = copy.deepcopy(model)
    with pytest.raises(
        CalibrationError, match=r"recurrent\.weight_ih_l0.* in calibration batch 0 or 1 or 2 or 3 or 4\b"
    ):
        prune(model, as_batches((ids, lengths), 1), PruningConfig(update="none"))
    for (_, value), (_, own) in zip(dense.state_dict().items(), model.state_dict().items(), strict=True):
        torch.testing.assert_close(own, value, rtol=0, atol=0, equal_nan=True)
