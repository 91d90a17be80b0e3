"""`prune` on whole networks of convolutions and recurrent layers: their masks, against what plain hooks, unfolding and
recurrences by hand give."""

from __future__ import annotations

import copy

import pytest
import torch
from conv_recurrent_networks import NETWORKS, SELECTIONS, as_batches, network, one_thread  # noqa: F401
from reference_inputs import covered
from reference_products import asked_for, check_model, gathered, matrix_of, untouched

from sparsefit import MaskSet, PruningConfig, prune
from sparsefit.errors import MaskError

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
