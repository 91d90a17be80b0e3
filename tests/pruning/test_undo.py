"""What an interrupted pruning puts back, for every kind of layer, and where it is kept until then."""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from image_models import image_model, images
from model_snapshots import OwnError, at_the_end, same, sequences, weights
from moe import FAMILIES, SIZES
from torch import nn

from sparsefit import PruningConfig, collect_statistics, prune, prune_from_statistics

TARGETS = ("q_proj", "o_proj", "down_proj")
SMALL = {"num_hidden_layers": 2}  # with six weights of these names


def recurrent() -> nn.Module:
    torch.manual_seed(0)
    return nn.LSTM(8, 12, num_layers=2, batch_first=True, bidirectional=True).eval()


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(8, 8, 3), nn.Conv2d(8, 12, 2, groups=4), nn.Conv1d(12, 4, 3), nn.Linear(4, 3))
    return nn.Sequential(*layers[:2], nn.Flatten(2), layers[2], nn.AdaptiveAvgPool1d(1), nn.Flatten(), layers[3]).eval()


def gpt_oss() -> nn.Module:
    import transformers

    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**(SIZES | FAMILIES["GptOss"]))).eval()


def attention() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2).eval()


IDS = torch.arange(3, 51).view(4, 12)
MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "recurrent": (recurrent, torch.randn(2, 5, 8)),
    "convolutions": (convolutions, torch.randn(2, 8, 7, 7)),
    "experts stored (in, out)": (gpt_oss, {"input_ids": IDS}),
    "attention": (attention, torch.randn(2, 5, 8)),
    "convnext": (lambda: image_model("ConvNext"), images()),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reconstruction", "dtype"), [(None, torch.float32), ("sequential", torch.float32), (None, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("kind", [*MODELS, "gpt2", "mixtral"])
def test_weights_of_every_kind_are_put_back_bit_for_bit(tiny_model, kind, reconstruction, dtype):
    make, batch = MODELS.get(kind) or (lambda: tiny_model(kind), {"input_ids": IDS})
    model = make().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # signs of zero are bits, too
            parameter.flatten()[::7] = -0.0
            parameter.flatten()[1::7] = 0.0
    batch = batch if isinstance(batch, dict) else batch.to(dtype)
    before = {name: value.view(torch.uint8).clone() for name, value in model.state_dict().items() if value.ndim}
    with pytest.raises(OwnError):
        prune(model, [batch], PruningConfig(reconstruction=reconstruction), progress=at_the_end)
    for name, bits in before.items():
        assert torch.equal(model.state_dict()[name].view(torch.uint8), bits), name


@pytest.mark.parametrize("reconstruction", [None, "sequential"])
def test_prunings_from_shared_statistics_are_undone_too(tiny_model, reconstruction):
    model, config = tiny_model("llama"), PruningConfig(update="none", reconstruction=reconstruction)
    statistics, dense = collect_statistics(model, sequences(2), [config]), weights(model)
    with pytest.raises(OwnError):
        prune_from_statistics(model, statistics, config, progress=at_the_end)
    assert same(weights(model), dense)


class Files:
    """Stands in for tempfile.TemporaryFile: files that take so many bytes, each its own."""

    def __init__(self, room: float) -> None:
        self.room, self.made, self.original = room, [], tempfile.TemporaryFile

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        file = self.original(*args, **kwargs)
        self.made.append(file)
        write, files = file.write, self

        class Limited:
            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, data: Any) -> int:
                data = memoryview(data).cast("B")
                if file.tell() + len(data) > files.room:
                    write(data[: int(files.room) - file.tell()])  # what a full disk still takes
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(data)

        return Limited()


@pytest.mark.slow
@pytest.mark.parametrize("reconstruction", [None, "sequential"])
@pytest.mark.parametrize("room", [float("inf"), 5000, 1])
def test_dense_weights_lie_in_a_temporary_file_and_where_that_is_full_in_memory(
    tiny_model, monkeypatch, room, reconstruction
):
    model, files = tiny_model("llama"), Files(room)
    dense = weights(model)
    monkeypatch.setattr(tempfile, "TemporaryFile", files)
    with pytest.raises(OwnError):
        prune(model, sequences(1), PruningConfig(reconstruction=reconstruction), progress=at_the_end)
    assert same(weights(model), dense)
    assert files.made
    result = prune(model, sequences(1), PruningConfig(reconstruction=reconstruction))
    if room == float("inf"):
        size = files.made[-1].seek(0, os.SEEK_END)
        pruned = sum(zeros for _, zeros in result.masks.counts().values())
        every = sum(count for count, _ in result.masks.counts().values())
        assert size == 4 * (every if reconstruction else pruned)


@pytest.mark.parametrize("reconstruction", [None, "sequential"])
def test_dense_weights_lie_in_memory_where_there_is_no_place_for_files(tiny_model, monkeypatch, reconstruction):
    def refuse(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("No usable temporary directory found")

    model = tiny_model("llama")
    dense, config = weights(model), PruningConfig(reconstruction=reconstruction)
    expected = prune(tiny_model("llama"), sequences(1), config).masks.digest()
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OwnError):
        prune(model, sequences(1), config, progress=at_the_end)
    assert same(weights(model), dense)
    assert prune(model, sequences(1), config).masks.digest() == expected


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process can grow beyond 20,000 bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("reconstruction", [None, "sequential"])
def test_a_disk_that_is_full_in_truth(tiny_model, reconstruction):
    model, config = tiny_model("llama"), PruningConfig(reconstruction=reconstruction)
    dense = weights(model)
    with pytest.raises(OwnError):
        prune(model, sequences(1), config, progress=at_the_end)
    assert same(weights(model), dense)
    prune(model, sequences(1), config).masks.verify(model)
