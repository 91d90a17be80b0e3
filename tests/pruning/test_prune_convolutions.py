"""`prune` on convolutions of any shape and memory layout, against what unfolding their inputs gives."""

from __future__ import annotations

import copy

import pytest
import torch
from conv_recurrent_networks import SELECTIONS, blocks_of, network, one_thread  # noqa: F401
from reference_inputs import spread_weights
from reference_products import check_mask, check_model, gathered, images, matrix_of, scores_of
from torch import Tensor, nn

from sparsefit import PruningConfig, prune
from sparsefit.errors import ConfigError, MaskError

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
def test_layers_without_a_shape_are_reported(make):
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


def test_masks_of_another_kernel_do_not_fit():
    model, data = convolution("plain")
    masks = prune(model, [data]).masks
    with pytest.raises(MaskError, match=r"0\.weight is \(6, 8, 2, 3\)"):
        masks.apply(nn.Sequential(nn.Conv2d(8, 6, (2, 3))))


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
