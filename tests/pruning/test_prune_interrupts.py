"""An error or an interrupt at any time leaves the dense model unchanged, bit for bit."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from model_snapshots import OwnError, at_the_end, same, sequences, state, weights
from torch import nn

from sparsefit import PruningConfig, prune
from sparsefit.pruning.layers.base import PrunableWeight
from sparsefit.pruning.layers.quantized import QuantizedWeight
from sparsefit.pruning.undo import Removed, Undo

TARGETS = ("q_proj", "o_proj", "down_proj")
SMALL = {"num_hidden_layers": 2}  # with six weights of these names


@pytest.mark.parametrize("reconstruction", [None, "sequential"])
@pytest.mark.parametrize("update", ["block", "none"])
def test_an_interrupt_at_any_step_leaves_the_model_dense(tiny_model, update, reconstruction):
    config = PruningConfig(update=update, micro_batch_size=1, reconstruction=reconstruction)
    steps: list[tuple[int, int]] = []
    prune(tiny_model("llama", **SMALL), sequences(2), config, progress=lambda *step: steps.append(step))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert [step for step in steps if step[0] >= step[1]] == [steps[-1]]
    model = tiny_model("llama", **SMALL)
    dense, before = weights(model), state(model)
    for at in range(len(steps)):
        calls = itertools.count()

        def interrupt(done, total, calls=calls, at=at):
            if next(calls) == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prune(model, sequences(2), config, progress=interrupt)
        assert same(weights(model), dense), f"step {at}"
        assert state(model) == before
    result = prune(model, sequences(2), config)
    result.masks.verify(model)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 8]),
        # A pass of all three blocks, and with gradients three times that.
        ({"allocation": "owl"}, [3, 4, 5, 6, 7, 8, 9, 11]),
        ({"allocation": "fisher"}, [3, 12, 13, 14, 15, 16, 17, 18, 20]),
        ({"allocation": "fisher", "update": "none"}, [1, 4, 5]),
    ],
)
def test_progress_counts_the_blocks_of_a_pass_of_the_whole_model(tiny_model, settings, steps):
    seen = []
    prune(tiny_model("llama"), sequences(2), PruningConfig(**settings), progress=lambda *step: seen.append(step))
    assert seen == [(done, steps[-1]) for done in steps]


@pytest.mark.parametrize("reconstruction", [None, "sequential", "iterative", "least_squares"])
@pytest.mark.parametrize("update", ["block", "none"])
def test_all_weights_are_pruned_at_the_last_step_and_not_before(tiny_model, update, reconstruction):
    model = tiny_model("llama")
    dense, changed = weights(model), []

    def look(done: int, total: int) -> None:
        now = weights(model)
        changed.append((done == total, {name for name in now if not torch.equal(now[name], dense[name])}))

    result = prune(model, sequences(2), PruningConfig(update=update, reconstruction=reconstruction), progress=look)
    assert [names == set(result.masks) for _, names in changed] == [is_last for is_last, _ in changed]
    assert changed[-1][0]
    result.masks.verify(model)


# While weights are written and put back


class Interrupts:
    """Interrupts a run before or after a call of a patched function.

    Attributes:
        moments: The numbers of the moments (two for each call) at which it interrupts.
        armed: Whether moments are counted.
        count: Moments so far.
        came: Interrupts so far.
    """

    def __init__(self, moments: range = range(0), armed: bool = True) -> None:
        self.moments, self.armed, self.count, self.came = moments, armed, 0, 0

    def press(self) -> None:
        if not self.armed:
            return
        self.count += 1
        if self.count - 1 in self.moments:
            self.came += 1
            raise KeyboardInterrupt

    def around(self, patched: pytest.MonkeyPatch, functions: list[tuple[type, str]]) -> None:
        for owner, name in functions:
            patched.setattr(owner, name, self._around(getattr(owner, name)))

    def _around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.press()
            result = original(*args, **kwargs)
            self.press()
            return result

        return call


WRITES = [(Undo, "keep"), (PrunableWeight, "apply_mask")]
RESTORES = [(Removed, "put_back"), (PrunableWeight, "set_values"), (PrunableWeight, "changed")]


@pytest.mark.slow
@pytest.mark.parametrize("reconstruction", [None, "sequential"])
@pytest.mark.parametrize("presses", [1, 5])
@pytest.mark.parametrize("update", ["block", "none"])
def test_interrupts_while_weights_are_written_leave_the_model_dense(
    tiny_model, monkeypatch, update, presses, reconstruction
):
    config = PruningConfig(update=update, reconstruction=reconstruction, targets=TARGETS, micro_batch_size=1)
    with monkeypatch.context() as patched:
        counting = Interrupts()
        counting.around(patched, WRITES + RESTORES)
        prune(tiny_model("llama", **SMALL), sequences(1), config)
    assert counting.count >= 6 * 2 * 3  # by three functions, one in the other
    model = tiny_model("llama", **SMALL)
    dense, before = weights(model), state(model)
    for at in range(counting.count):
        with monkeypatch.context() as patched:
            Interrupts(range(at, at + presses)).around(patched, WRITES + RESTORES)
            with pytest.raises(KeyboardInterrupt):
                prune(model, sequences(1), config)
        assert same(weights(model), dense), f"moment {at}"
        assert state(model) == before
    prune(model, sequences(1), config).masks.verify(model)


@pytest.mark.parametrize("reconstruction", [None, "sequential"])
def test_a_weight_of_which_half_is_written_is_put_back(tiny_model, monkeypatch, reconstruction):
    name = "set_values" if reconstruction else "apply_mask"
    original, calls = getattr(PrunableWeight, name), itertools.count()

    def half(weight: PrunableWeight, given: torch.Tensor) -> None:
        if next(calls) != 3:
            original(weight, given)
            return
        given[::2] = True if given.dtype == torch.bool else weight.matrix()[::2]
        original(weight, given)
        raise KeyboardInterrupt

    model = tiny_model("llama")
    dense = weights(model)
    monkeypatch.setattr(PrunableWeight, name, half)
    with pytest.raises(KeyboardInterrupt):
        prune(model, sequences(1), PruningConfig(reconstruction=reconstruction))
    assert same(weights(model), dense)


@pytest.mark.slow
@pytest.mark.parametrize("reconstruction", [None, "sequential"])
@pytest.mark.parametrize("presses", [1, 3])
@pytest.mark.parametrize("update", ["block", "none"])
def test_interrupts_while_weights_are_put_back_are_held_until_all_are(
    tiny_model, monkeypatch, update, presses, reconstruction
):
    config = PruningConfig(update=update, reconstruction=reconstruction, targets=TARGETS, micro_batch_size=1)
    model = tiny_model("llama", **SMALL)
    dense, before = weights(model), state(model)
    for at in itertools.count():
        held = Interrupts(range(at, at + presses), armed=False)

        def begin(done: int, total: int, held: Interrupts = held) -> None:
            held.armed = done == total
            at_the_end(done, total)

        with monkeypatch.context() as patched:
            held.around(patched, RESTORES)
            with pytest.raises((OwnError, KeyboardInterrupt)):
                prune(model, sequences(1), config, progress=begin)
        assert same(weights(model), dense), f"moment {at}"
        assert state(model) == before
        if held.came < presses:
            break
    assert at >= 6 * 2


def test_a_key_that_is_held_down_while_weights_are_put_back(tiny_model, monkeypatch):
    """Real signals, one after the other."""
    model, put_back, calls = tiny_model("llama"), Removed.put_back, itertools.count()

    def pressed(*args: Any) -> None:
        put_back(*args)
        if next(calls) < 30:
            signal.raise_signal(signal.SIGINT)

    dense = weights(model)
    monkeypatch.setattr(Removed, "put_back", pressed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    try:
        with pytest.raises((OwnError, KeyboardInterrupt)):
            prune(model, sequences(1), progress=at_the_end)
    finally:
        signal.signal(signal.SIGINT, before)
    assert next(calls) > 30
    assert same(weights(model), dense)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("presses", [0, 1, 3])
@pytest.mark.parametrize("reconstruction", [None, "sequential"])
def test_quantized_layers_are_put_back_code_by_code(monkeypatch, reconstruction, presses):
    quantized_layers = pytest.importorskip("quantized_layers")
    kinds = quantized_layers.KINDS
    model = nn.Sequential(*(quantized_layers.make_layer(kind, (64, 64), seed=i) for i, kind in enumerate(kinds))).eval()
    data = [torch.randn(40, 64)]
    before, calls = [quantized_layers.held_bits(layer) for layer in model], itertools.count()

    def pressed(put_back: Callable[[], None]) -> None:
        if next(calls) in range(2, 2 + presses):
            raise KeyboardInterrupt
        put_back()

    snapshot = QuantizedWeight.snapshot
    monkeypatch.setattr(QuantizedWeight, "snapshot", lambda weight: partial(pressed, snapshot(weight)))
    with pytest.raises((OwnError, KeyboardInterrupt)):
        prune(model, data, PruningConfig(reconstruction=reconstruction, targets="*"), progress=at_the_end)
    assert [quantized_layers.held_bits(layer) for layer in model] == before
    assert next(calls) >= len(kinds) + presses
