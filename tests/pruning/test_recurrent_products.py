"""What recurrent layers and cells multiply by their weights, against loops written out by hand."""

import itertools

import pytest
import torch
from layer_products import Watched, tensors_in, watched
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_sequence

from sparsefit.pruning.layers import reason_left_dense, recurrent


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
