"""Errors on the way leave networks of convolutions and recurrent layers dense, and NaN inputs are named."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from conv_recurrent_networks import as_batches, network, one_thread  # noqa: F401
from reference_products import untouched
from torch import Tensor

from sparsefit import MaskSet, PruningConfig, prune
from sparsefit.errors import CalibrationError


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
