"""Weights with the same input share its statistics; if inputs become different, they get separate ones in that pass."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from recorded_inputs import weights_of
from reference import gram_of
from reference_inputs import collect as collect_apart
from reference_inputs import spread_weights
from torch import Tensor, nn

from sparsefit import PruningConfig, prune
from sparsefit.calibration.batches import MicroBatch
from sparsefit.errors import CalibrationError
from sparsefit.pruning.input_groups import Parts, input_groups
from sparsefit.pruning.statistics import KINDS
from sparsefit.pruning.statistics_collector import collect

WIDTH, SHORTEST = 6, 3


class Layers(nn.Module):
    """Three layers, called as it is said: with themselves, the input, and the number of the batch, from its length."""

    def __init__(self, call: Callable[[nn.Module, Tensor, int], None]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        self.call(self, x, x.shape[-2] - SHORTEST)
        return x


def same(m, x, number):
    m.a(x), m.b(x), m.c(x)


def same_twice(m, x, number):
    other = x.tanh()
    m.a(x), m.b(x), m.c(x), m.b(other), m.a(other), m.c(other)


def another_from_the_second_on(m, x, number):
    m.a(x), m.b(x.tanh() if number else x), m.c(x)


def another_in_between(m, x, number):
    m.a(x), m.b(x), m.c(x.tanh() if number == 2 else x)


def left_out_in_between(m, x, number):
    m.a(x), m.b(x)
    if number != 1:
        m.c(x)


def one_once_and_one_twice(m, x, number):
    m.a(x), m.b(x)
    if number == 1:
        m.a(x.tanh())


def each_its_own_order(m, x, number):
    for layer in ((m.a, m.b, m.c), (m.c, m.a, m.b), (m.b, m.c, m.a))[number % 3]:
        layer(x)


def one_after_the_other(m, x, number):
    """The same values, but never the same tensor."""
    m.a(x), m.b(x.clone()), m.c(x.clone())


def late(m, x, number):
    m.a(x), m.b(x)
    if number:
        m.c(x)


def apart_and_together(m, x, number):
    other = x.tanh()
    m.a(x), m.b(x), m.c(other) if number != 2 else m.c(x)


def in_turns(m, x, number):
    """What each of them sees is the same in the end, but not at any one time."""
    other = x.tanh()
    m.a(x), m.b(x)
    for layer, inputs in ((m.a, other), (m.a, x), (m.b, other), (m.b, x)) if number else ():
        layer(inputs)


CALLS = {
    same: [{"a", "b", "c"}],
    same_twice: [{"a", "b", "c"}],
    each_its_own_order: [{"a", "b", "c"}],
    one_after_the_other: [{"a"}, {"b"}, {"c"}],
    another_from_the_second_on: [{"a"}, {"b"}, {"c"}],  # c is not asked what it sees before b has parted from a
    another_in_between: [{"a", "b"}, {"c"}],
    left_out_in_between: [{"a", "b"}, {"c"}],
    one_once_and_one_twice: [{"a"}, {"b"}, {"c"}],
    late: [{"a", "b"}, {"c"}],
    apart_and_together: [{"a", "b"}, {"c"}],
    in_turns: [{"a"}, {"b"}, {"c"}],
}


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, SHORTEST + i, WIDTH, generator=generator) for i in range(count)]


def collected(model: nn.Module, data: list[Tensor], kinds=KINDS, **settings) -> tuple[Parts, int]:
    """The statistics of all its weights, and how often the model ran."""
    runs = []

    def run(number: int) -> None:
        runs.append(number)
        model(data[number])

    micro_batches = [MicroBatch(batch, (index,) * len(batch)) for index, batch in enumerate(data)]
    with torch.no_grad():
        return collect(weights_of(model), kinds, micro_batches, run, lambda note: None, **settings), len(runs)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_statistics_are_those_of_each_layer_by_itself_in_one_pass(call):
    model, data = spread_weights(Layers(call)), batches()
    apart = collect_apart(model, data)
    parts, runs = collected(model, data)
    assert runs == len(data)
    for name, found in parts.items():
        ((rows, statistics),) = found
        inputs = [tokens.double() for tokens in apart.get(name, [])]
        assert (rows, statistics.tokens) == (slice(0, WIDTH), sum(map(len, inputs)))
        if inputs:
            tokens = torch.cat(inputs)
            for kind, exact in (
                ("squared_norm", tokens.square().sum(0)),
                ("abs_sum", tokens.abs().sum(0)),
                ("gram", torch.from_numpy(gram_of(inputs))),
            ):
                torch.testing.assert_close(statistics[kind].double(), exact, rtol=1e-5, atol=1e-4)
            assert torch.equal(statistics["abs_max"].double(), tokens.abs().amax(0))


@pytest.mark.parametrize(("call", "expected"), CALLS.items(), ids=lambda call: getattr(call, "__name__", ""))
def test_weights_that_see_the_same_share_and_others_do_not(call, expected):
    model = spread_weights(Layers(call))
    parts, _ = collected(model, batches())
    groups = input_groups(weights_of(model), parts)
    assert [{weight.name.partition(".")[0] for weight in group.weights} for group in groups] == expected


@pytest.mark.parametrize("update", ["block", "none"])
@pytest.mark.parametrize("score", ["wanda", "wanda_linf", "sparsegpt"])
def test_masks_of_weights_that_part_are_those_of_each_alone(update, score):
    """The same model, whose layers get the same values in tensors of their own, shares nothing."""

    class Block(Layers):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            return x + self.a(x).tanh()

    class Net(nn.Module):
        def __init__(self, call: Callable) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(call), Block(call)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    def parting(m: nn.Module, x: Tensor, number: int) -> None:
        m.a(x), m.b(x), m.c(x.tanh() if len(x) == 1 else x)

    def apart(m: nn.Module, x: Tensor, number: int) -> None:
        m.a(x.clone()), m.b(x.clone()), m.c((x.tanh() if len(x) == 1 else x).clone())

    data = [batch[:size] for batch, size in zip(batches(), (2, 2, 1, 2), strict=True)]
    config = PruningConfig(score=score, granularity="output", update=update, micro_batch_size=2)
    digests = {prune(spread_weights(Net(call)), data, config).masks.digest() for call in (parting, apart)}
    assert len(digests) == 1


def in_place_before_the_last(m, x, number):
    x = x.clone()
    m.a(x), m.b(x)
    x.mul_(2)
    m.c(x)


def in_place_where_one_is_left_out(m, x, number):
    x = x.clone()
    m.a(x), m.b(x)
    if number != 1:
        m.c(x)
    x.mul_(2)


def in_place_from_the_second_on(m, x, number):
    x = x.clone()
    m.a(x), m.b(x)
    if number:
        x.mul_(2)
    m.c(x)


@pytest.mark.parametrize(
    "call",
    [in_place_before_the_last, in_place_where_one_is_left_out, in_place_from_the_second_on],
    ids=lambda call: call.__name__,
)
def test_what_is_changed_in_place_counts_as_it_was(call):
    model, data = spread_weights(Layers(call)), batches()
    apart = collect_apart(model, data)
    parts, _ = collected(model, data)
    for name, [(_, statistics)] in parts.items():
        torch.testing.assert_close(statistics["squared_norm"], torch.cat(apart[name]).square().sum(0), msg=name)


def test_blocks_that_run_again_as_an_input_changed_hand_on_each_output_once():
    """The change comes to light in the second batch, when the first has gone through the block already."""

    class Block(Layers):
        def forward(self, x: Tensor) -> Tensor:
            other = x.clone()
            output = x + self.a(other).tanh()
            if x.shape[1] != SHORTEST + 1:
                output = output + self.b(other)
            other.mul_(2)
            return output

    def net() -> nn.Module:
        return spread_weights(nn.Sequential(Block(same), Block(same)))

    whole = prune(net(), batches(), PruningConfig(update="none", micro_batch_size=2))
    by_block = prune(net(), batches(), PruningConfig(update="none", micro_batch_size=2, device="cpu"))
    assert any("1.a.weight was changed in place" in note for note in by_block.notes)
    assert by_block.masks.digest() == whole.masks.digest()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("batch", range(4))
def test_inputs_that_are_not_finite_name_layer_and_batch(batch, value):
    model, data = spread_weights(Layers(another_in_between)), batches()
    data[batch][1, 2, 3] = value
    with pytest.raises(CalibrationError, match=rf"[abc]\.weight are NaN or infinite in calibration batch {batch}\b"):
        collected(model, data)


def test_finite_inputs_whose_squares_overflow_are_reported():
    data = [torch.full((1, 2, WIDTH), 1.2e19) for _ in range(3)]
    with pytest.raises(CalibrationError, match="finite one by one, but their squares add up to more than float32"):
        collected(spread_weights(Layers(same)), data)


def test_a_pass_ends_once_every_weight_has_got_its_input():
    ends = []

    def noted(m: nn.Module, x: Tensor, number: int) -> None:
        m.a(x), m.b(x), m.c(x)
        ends.append(number)

    model = spread_weights(Layers(noted))
    whole, _ = collected(model, batches())
    assert len(ends) == 4
    once = {(f"{name}.weight", None): Fraction(1) for name in "abc"}
    parts, runs = collected(model, batches(), shares=once)
    assert (runs, len(ends)) == (4, 4)
    twice, _ = collected(model, batches(), shares=once | {("a.weight", None): None})
    assert len(ends) == 8
    in_part, _ = collected(model, batches(), shares=once | {("a.weight", None): Fraction(2)})
    assert len(ends) == 12
    for name in whole:
        for other in (parts, twice, in_part):
            assert torch.equal(other[name][0].statistics["gram"], whole[name][0].statistics["gram"])
