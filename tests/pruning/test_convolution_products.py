"""What convolutions multiply by their weights, against loops written out by hand."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from layer_products import Watched, watched
from torch import nn

from sparsefit.pruning.layers import convolution, reason_left_dense


def patches_by_hand(inputs, kernel, stride, dilation):
    """(outputs, channels * positions) of an input, (samples, channels, sizes...), that is padded already."""
    sizes = [
        (size - step * (k - 1) - 1) // jump + 1
        for size, k, jump, step in zip(inputs.shape[2:], kernel, stride, dilation, strict=True)
    ]
    rows = []
    for sample in inputs:
        for output in itertools.product(*map(range, sizes)):
            row = []
            for channel in sample:
                for position in itertools.product(*map(range, kernel)):
                    at = (o * s + p * d for o, s, p, d in zip(output, stride, position, dilation, strict=True))
                    row.append(channel[tuple(at)])
            rows.append(torch.stack(row))
    return torch.stack(rows)


CONVOLUTIONS = {
    "plain": (2, {"kernel_size": 3}),
    "strided": (2, {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 2)}),
    "dilated": (2, {"kernel_size": (2, 3), "dilation": (3, 2), "padding": 2}),
    "same": (2, {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)}),
    "valid": (2, {"kernel_size": 2, "padding": "valid"}),
    "patches": (2, {"kernel_size": 4, "stride": 4}),
    "groups": (2, {"kernel_size": 3, "groups": 2, "padding": 1, "stride": 2}),
    "line": (1, {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2}),
    "line in groups": (1, {"kernel_size": 4, "padding": "same", "groups": 2}),
    "volume": (3, {"kernel_size": (2, 1, 3), "stride": (1, 2, 1), "padding": (1, 0, 1)}),
    "one point": (2, {"kernel_size": 1}),
    "one point in groups": (3, {"kernel_size": 1, "groups": 2, "stride": 2}),
    "one point, strided": (1, {"kernel_size": 1, "stride": 3}),
    **{
        f"{mode} {dims}d": (dims, {"kernel_size": 3, "padding": 1, "stride": 2, "padding_mode": mode})
        for mode in ("reflect", "replicate", "circular")
        for dims in (1, 2, 3)
    },
    "circular same": (2, {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"}),
    "circular, one point": (2, {"kernel_size": 1, "padding": 1, "stride": 2, "padding_mode": "circular"}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("dims", "settings"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_patches(dims, settings, batched):
    torch.manual_seed(0)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 6, **settings, dtype=torch.float64)
    inputs = torch.randn(*((2,) if batched else ()), 4, *(9, 8, 5)[:dims], dtype=torch.float64)
    output, mode = watched(layer, inputs)

    how = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs if batched else inputs[None], layer._reversed_padding_repeated_twice, how)
    assert len(mode.seen) == layer.groups
    assert len({key for *_, key, _ in mode.seen}) == layer.groups
    for group, tokens in enumerate(mode.tokens_of(layer.weight)):
        channels = 4 // layer.groups
        own = padded[:, group * channels : (group + 1) * channels]
        assert torch.equal(tokens, patches_by_hand(own, layer.kernel_size, layer.stride, layer.dilation))
    assert_product(layer, mode, output if batched else output[None])


def assert_product(layer, mode, output):
    """The rows that were seen times the matrix are what the layer computes."""
    flat = output.movedim(1, -1).flatten(0, -2) - (0 if layer.bias is None else layer.bias)
    matrix = layer.weight.detach().flatten(1)
    for _, _, rows, _, pieces in mode.seen:
        rows = rows or slice(None)
        torch.testing.assert_close(torch.cat(pieces) @ matrix[rows].T, flat[:, rows].detach())
    assert sum(len(matrix[rows or slice(None)]) for _, _, rows, _, _ in mode.seen) == len(matrix)


@pytest.mark.parametrize(("padding", "stride"), [(0, 1), (1, 1), (1, 2), (3, 2), ((1, 0), (3, 2)), ("same", 1)])
def test_one_point_is_the_input_in_one_piece_without_the_padding(padding, stride):
    layer = nn.Conv2d(4, 6, 1, padding=padding, stride=stride)
    inputs = torch.randn(3, 4, 7, 8)
    _, mode = watched(layer, inputs)
    ((_, seen, rows, _, (tokens,)),) = mode.seen
    assert seen is inputs
    assert rows is None
    pads = (0, 0) if padding == "same" else (padding, padding) if isinstance(padding, int) else padding
    steps = (stride, stride) if isinstance(stride, int) else stride
    kept = [[i for i in range(n) if (i + p) % s == 0] for n, p, s in zip((7, 8), pads, steps, strict=True)]
    expected = [inputs[n, :, i, j] for n in range(3) for i in kept[0] for j in kept[1]]
    assert torch.equal(tokens, torch.stack(expected))
    # All that the padding adds to the product is zero.
    full = patches_by_hand(F.pad(inputs, (pads[1], pads[1], pads[0], pads[0])), (1, 1), steps, (1, 1))
    assert torch.equal(full[full.any(dim=1)], tokens)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: F.conv2d(x, w),
        lambda x, w: F.conv2d(x, w, stride=(2, 1), padding=[1, 0]),
        lambda x, w: F.conv2d(input=x, weight=w, dilation=[2]),
        lambda x, w: torch.conv2d(x, w, None, 1, "same"),
        lambda x, w: torch.conv2d(x[0], w, padding="valid"),
    ],
)
def test_functional_calls(call):
    layer = nn.Conv2d(3, 5, 3, bias=False)
    inputs = torch.randn(2, 3, 9, 8)
    with Watched(layer.weight) as mode:
        output = call(inputs, layer.weight)
    assert torch.equal(output, call(inputs, layer.weight))
    assert_product(layer, mode, output if output.ndim == 4 else output[None])


def test_patches_like_unfold_in_bounded_pieces(monkeypatch):
    inputs = torch.randn(5, 3, 12, 10)
    expected = F.unfold(inputs, (3, 3), padding=1, stride=(1, 2), dilation=(2, 1)).mT.flatten(0, 1)
    layer = nn.Conv2d(3, 4, 3, padding=1, stride=(1, 2), dilation=(2, 1))
    row, sample = 5 * 27, 10 * 5 * 27
    for limit, pieces in [(10**9, 1), (2 * sample, 3), (2 * sample - 1, 5), (3 * row, 20), (row, 50), (1, 50)]:
        monkeypatch.setattr(convolution, "PIECE", limit)
        ((*_, found),) = watched(layer, inputs)[1].seen
        assert len(found) == pieces
        assert all(piece.numel() <= max(limit, row) for piece in found)
        assert torch.equal(torch.cat(found), expected)


def test_no_unfolded_copy_of_the_whole_input():
    layer = nn.Conv2d(8, 4, 7, padding=3)
    inputs = torch.randn(8, 8, 96, 96)
    sizes = []
    with Watched(layer.weight) as mode, torch.no_grad():
        mode.change = lambda weight: sizes.extend(piece.numel() for piece in mode.seen[-1][-1])
        layer(inputs)
    assert sum(sizes) == inputs.numel() * 49
    assert max(sizes) <= convolution.PIECE


def test_convolutions_of_one_geometry_share_their_inputs():
    inputs = torch.randn(2, 4, 6, 6)
    layers = [nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 5, 3, padding="same"), nn.Conv2d(4, 5, 3, padding=2)]
    with Watched(*(layer.weight for layer in layers)) as mode:
        for layer in layers:
            layer(inputs)
    first, second, third = [(id(tensor), key) for _, tensor, _, key, _ in mode.seen]
    assert first == second != third
    assert {id(tensor) for _, tensor, *_ in mode.seen} == {id(inputs)}


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), "depthwise convolution"),
        (nn.Conv1d(4, 8, 3, groups=4), "depthwise convolution"),
        (nn.Conv2d(4, 4, 3, groups=2), None),
        (nn.Conv2d(1, 4, 3), None),
        (nn.ConvTranspose2d(4, 4, 3), None),
        (nn.LazyConv2d(4, 3), None),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), None),
        (nn.Linear(4, 4), None),
    ],
)
def test_which_convolutions_are_matrices(module, reason):
    assert convolution.is_depthwise(module) == (reason is not None)
    assert reason is None or reason_left_dense(module) == reason
    expected = ["weight"] if type(module) is nn.Conv2d and module.groups != 4 else []
    found = convolution.matrices(module)
    assert [weight.name for weight in found] == expected
    assert all(weight.parameter is module.weight for weight in found)


def test_depthwise_convolutions_are_not_seen():
    _, mode = watched(nn.Conv2d(4, 4, 3, groups=4), torch.randn(1, 4, 5, 5))
    assert not mode.seen


@pytest.mark.parametrize("positions", [(), (1, 1), (3,), (2, 3), (2, 1, 2)])
def test_channels_side_by_side(positions):
    weight = torch.randn(5, 4, *positions)
    order = convolution.channels_side_by_side(weight)
    if math.prod(positions) == 1:
        assert order is None
    else:
        expected = weight.movedim(1, -1).flatten(1)  # (out, positions, channels)
        assert torch.equal(weight.flatten(1)[:, order], expected)
