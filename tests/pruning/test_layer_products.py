"""What convolutions and recurrent layers multiply by their weights, against loops written out by hand."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.overrides import TorchFunctionMode

from sparsefit.pruning.layers import convolution, reason_left_dense, recurrent


class Watched(TorchFunctionMode):
    """Keeps what is seen while it is active, and how it was said."""

    def __init__(self, *parameters, change=None):
        super().__init__()
        self.parameters, self.change, self.seen = list(parameters), change, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        handler = (convolution.PRODUCTS | recurrent.PRODUCTS).get(function)
        if handler is None:
            return function(*args, **(kwargs or {}))
        return handler(function, args, kwargs or {}, self)

    def holds(self, tensor):
        return self.whole(tensor) is not None

    def whole(self, view):
        storage = view.untyped_storage().data_ptr()
        return next((own for own in self.parameters if own.untyped_storage().data_ptr() == storage), None)

    def __call__(self, weight, inputs, tokens=None, key=None):
        hash(key)
        whole = self.whole(weight)
        if whole is None:
            return
        first = weight.storage_offset() // weight.stride(0)
        rows = None if len(weight) == len(whole) else slice(first, first + len(weight))
        pieces = list(tokens()) if tokens else [inputs.detach().flatten(0, -2)]
        assert not any(piece.requires_grad for piece in pieces)
        self.seen.append((whole, inputs, rows, key, pieces))
        if self.change:
            self.change(whole)

    def tokens_of(self, weight):
        return [torch.cat(pieces) for seen, _, _, _, pieces in self.seen if seen is weight]


def watched(module, *args):
    """The output of a module, checked to be what it is unwatched, and what was seen."""
    expected = module(*args)
    with Watched(*(weight.parameter for kind in (convolution, recurrent) for weight in kind.matrices(module))) as mode:
        output = module(*args)
    for one, other in zip(tensors_in(output), tensors_in(expected), strict=True):
        assert torch.equal(one, other)
    return output, mode


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value if part is not None for tensor in tensors_in(part)]


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


def step_by_hand(layer, x, h, c, weights):
    """One step of a cell, (in,) -> (hidden,), and an LSTM's c."""
    w_ih, w_hh, b_ih, b_hh = weights
    given, before = w_ih @ x + b_ih, w_hh @ h + b_hh
    if isinstance(layer, nn.LSTM | nn.LSTMCell):
        i, f, g, o = (given + before).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if isinstance(layer, nn.GRU | nn.GRUCell):
        (r, z, n), (r_h, z_h, n_h) = given.chunk(3), before.chunk(3)
        n, z = (n + (r + r_h).sigmoid() * n_h).tanh(), (z + z_h).sigmoid()
        return (1 - z) * n + z * h, c
    return ((given + before).tanh() if layer.nonlinearity == "tanh" else (given + before).relu()), c


def run_by_hand(layer, sequences, hx):
    """What each weight multiplies, by name: for each sequence, (steps, in)."""
    directions = ["", "_reverse"] if layer.bidirectional else [""]
    h_0, c_0 = hx if isinstance(hx, tuple) else (hx, hx)
    seen, inputs = {}, sequences
    for k in range(layer.num_layers):
        outputs = [[] for _ in sequences]
        for d, direction in enumerate(directions):
            suffix = f"_l{k}{direction}"
            zero = torch.zeros(1, dtype=torch.float64)
            weights = [getattr(layer, name + suffix, zero) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            project = getattr(layer, f"weight_hr{suffix}", None)
            before = [torch.empty_like(sequence[:, :1]).expand(-1, h_0.shape[-1]).clone() for sequence in sequences]
            for number, sequence in enumerate(inputs):
                place = k * len(directions) + d
                h, c = h_0[place, number], c_0[place, number]
                given = [None] * len(sequence)
                steps = range(len(sequence))
                for t in reversed(steps) if direction else steps:
                    before[number][t] = h
                    h, c = step_by_hand(layer, sequence[t], h, c, weights)
                    h = h if project is None else project @ h
                    given[t] = h
                outputs[number].append(torch.stack(given))
            seen[f"weight_ih{suffix}"], seen[f"weight_hh{suffix}"] = inputs, before
        inputs = [torch.cat(both, dim=-1) for both in outputs]
    return seen, inputs


def first_states(layer, sequences):
    places = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(places, sequences, layer.proj_size or layer.hidden_size, dtype=torch.float64)
    c = torch.randn(places, sequences, layer.hidden_size, dtype=torch.float64)
    return (h, c) if isinstance(layer, nn.LSTM) else h


def zeros_like(hx):
    return tuple(map(torch.zeros_like, hx)) if isinstance(hx, tuple) else torch.zeros_like(hx)


KINDS = {
    "lstm": (nn.LSTM, {}),
    "projected lstm": (nn.LSTM, {"proj_size": 2}),
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}
SHAPES = {
    "one layer": {},
    "layers": {"num_layers": 3},
    "both ways": {"bidirectional": True, "batch_first": True},
    "layers both ways": {"num_layers": 2, "bidirectional": True},
    "no bias": {"num_layers": 2, "bias": False, "batch_first": True, "bidirectional": True},
}


@pytest.fixture(params=itertools.product(KINDS, SHAPES), ids=", ".join)
def layer(request):
    torch.manual_seed(0)
    kind, shape = request.param
    made, settings = KINDS[kind]
    return made(3, 4, **settings, **SHAPES[shape], dtype=torch.float64).requires_grad_(False)


@pytest.mark.parametrize("given", [True, False])
def test_recurrent(layer, given):
    inputs = torch.randn(3, 5, 3, dtype=torch.float64)  # sequence by sequence
    hx = first_states(layer, 3)
    args = (inputs if layer.batch_first else inputs.transpose(0, 1).contiguous(), *((hx,) if given else ()))
    (output, _), mode = watched(layer, *args)
    expected, last = run_by_hand(layer, list(inputs), hx if given else zeros_like(hx))
    torch.testing.assert_close(output if layer.batch_first else output.transpose(0, 1), torch.stack(last))
    assert_seen(layer, mode, {name: torch.cat(sequences) for name, sequences in expected.items()})
    assert all(seen is args[0] for _, seen, *_ in mode.seen)


def assert_seen(layer, mode, expected):
    assert len(mode.seen) == len(expected) == len(recurrent.matrices(layer))
    for name, rows in expected.items():
        (tokens,) = mode.tokens_of(getattr(layer, name))
        torch.testing.assert_close(tokens, rows)


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_packed(layer, given, is_sorted):
    sequences = [
        torch.randn(length, 3, dtype=torch.float64) for length in ((5, 3, 3, 1) if is_sorted else (3, 1, 5, 3))
    ]
    packed = pack_sequence(sequences, enforce_sorted=is_sorted)
    hx = first_states(layer, 4)
    (output, _), mode = watched(layer, packed, *((hx,) if given else ()))
    expected, last = run_by_hand(layer, sequences, hx if given else zeros_like(hx))
    torch.testing.assert_close(output.data, pack_sequence(last, enforce_sorted=is_sorted).data)
    # The rows of what is packed come step by step: as many as there are real steps.
    flat = {name: pack_sequence(rows, enforce_sorted=is_sorted).data for name, rows in expected.items()}
    assert_seen(layer, mode, flat)


def test_unbatched(layer):
    inputs = torch.randn(5, 3, dtype=torch.float64)
    _, mode = watched(layer, inputs)
    expected, _ = run_by_hand(layer, [inputs], zeros_like(first_states(layer, 1)))
    assert_seen(layer, mode, {name: rows for name, (rows,) in expected.items()})


def test_padding_is_what_packing_leaves_out():
    layer = nn.GRU(3, 4, bidirectional=True, batch_first=True)
    sequences = [torch.randn(5, 3), torch.randn(2, 3)]
    _, mode = watched(layer, pack_sequence(sequences))
    _, padded = watched(layer, pad_sequence(sequences, batch_first=True))
    assert [len(tokens) for *_, (tokens,) in mode.seen] == [7] * 4
    assert [len(tokens) for *_, (tokens,) in padded.seen] == [10] * 4


def test_directions_share_their_inputs_and_nothing_else():
    layer = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    inputs = torch.randn(5, 2, 3)
    with Watched(*layer.parameters()) as mode:
        layer(inputs)
        layer(inputs)
    keys = [(key, id(seen)) for _, seen, _, key, _ in mode.seen]
    once = keys[:8]
    assert once[0] == once[1]
    assert once[4] == once[5]
    assert len(set(once)) == 6
    assert set(once) & set(keys[8:]) == {once[0]}  # what is computed with other weights or states is not the same


def test_weights_that_are_pruned_when_seen_are_used_as_pruned():
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4, num_layers=2, bidirectional=True, dtype=torch.float64).requires_grad_(False)
    inputs = torch.randn(2, 5, 3, dtype=torch.float64)

    def drop(weight):
        weight.view(torch.int64)[:, ::2] = 0

    with Watched(*layer.parameters(), change=drop) as mode:
        output, _ = layer(inputs.transpose(0, 1))
    assert torch.equal(output, layer(inputs.transpose(0, 1))[0])
    expected, _ = run_by_hand(layer, list(inputs), zeros_like(first_states(layer, 2)))
    (tokens,) = mode.tokens_of(layer.weight_ih_l1_reverse)
    torch.testing.assert_close(tokens, torch.cat(expected["weight_ih_l1_reverse"]))


def test_nothing_is_computed_for_weights_that_nobody_watches():
    layer = nn.LSTM(3, 4, num_layers=2)
    calls = []

    class See:
        def holds(self, tensor):
            return False

        def __call__(self, weight, inputs, **how):
            calls.append(weight)

    def lstm(*args):
        assert args[4] == 2
        return torch.lstm(*args)

    states = (torch.zeros(2, 1, 4), torch.zeros(2, 1, 4))
    args = (torch.randn(5, 1, 3), states, layer._flat_weights, True, 2, 0.0, False, False, False)
    recurrent.PRODUCTS[torch.lstm](lstm, args, {}, See())
    assert len(calls) == 4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [(nn.LSTMCell, {}), (nn.GRUCell, {}), (nn.RNNCell, {}), (nn.RNNCell, {"nonlinearity": "relu"})],
)
def test_cells(kind, settings, bias):
    cell = kind(3, 4, bias=bias, **settings, dtype=torch.float64).requires_grad_(False)
    inputs, h, c = (torch.randn(2, width, dtype=torch.float64) for width in (3, 4, 4))
    output, mode = watched(cell, inputs, (h, c) if kind is nn.LSTMCell else h)
    zero = torch.zeros(1, dtype=torch.float64)
    weights = [cell.weight_ih, cell.weight_hh, *((cell.bias_ih, cell.bias_hh) if bias else (zero, zero))]
    by_hand = [step_by_hand(cell, *row, weights)[0] for row in zip(inputs, h, c, strict=True)]
    torch.testing.assert_close(tensors_in(output)[0], torch.stack(by_hand))
    assert torch.equal(*mode.tokens_of(cell.weight_ih), inputs)
    assert torch.equal(*mode.tokens_of(cell.weight_hh), h)
    _, mode = watched(cell, inputs[0])
    assert torch.equal(*mode.tokens_of(cell.weight_ih), inputs[:1])
    assert not torch.cat(mode.tokens_of(cell.weight_hh)).any()


def test_training_leaves_dropout_to_the_function():
    layer = nn.GRU(3, 4, num_layers=2, dropout=0.5)
    inputs = torch.randn(5, 2, 3)
    torch.manual_seed(1)
    expected, _ = layer(inputs)
    torch.manual_seed(1)
    with Watched(*layer.parameters()) as mode:
        output, _ = layer(inputs)
    assert torch.equal(output, expected)
    assert output.requires_grad
    assert len(mode.seen) == 4


def test_which_recurrent_weights_are_matrices():
    names = [weight.name for weight in recurrent.matrices(nn.LSTM(3, 4, proj_size=2, bidirectional=True))]
    assert names == ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"]
    assert [weight.name for weight in recurrent.matrices(nn.GRUCell(3, 4))] == ["weight_ih", "weight_hh"]
    assert not recurrent.matrices(nn.Linear(3, 4))
    normed = nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    assert [weight.name for weight in recurrent.matrices(normed)] == ["weight_ih_l0"]
    assert reason_left_dense(nn.LSTM(3, 4, proj_size=2)) == "projection of an LSTM"
    assert reason_left_dense(nn.LSTM(3, 4)) != "projection of an LSTM"
