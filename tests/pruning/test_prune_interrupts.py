"""An interrupt at any moment leaves a model dense or whole pruned."""

from __future__ import annotations

import functools
import itertools

import pytest
from states import same, sequences, state, weights

from sparsefit import PruningConfig, prune
from sparsefit.pruning.changes import Changes

TARGETS = ("q_proj", "o_proj", "down_proj")


@pytest.mark.parametrize("reconstruction", [None, "sequential"])
@pytest.mark.parametrize("update", ["block", "none"])
def test_an_interrupt_at_any_step_leaves_the_model_dense(tiny_model, update, reconstruction):
    config = PruningConfig(update=update, micro_batch_size=1, reconstruction=reconstruction)
    steps: list[tuple[int, int]] = []
    prune(tiny_model("llama"), sequences(2), config, progress=lambda *step: steps.append(step))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert [step for step in steps if step[0] >= step[1]] == [steps[-1]]
    model = tiny_model("llama")
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


@pytest.mark.parametrize("reconstruction", [None, "sequential"])
@pytest.mark.parametrize("presses", [1, 3])
@pytest.mark.parametrize("update", ["block", "layer"])
def test_interrupts_while_weights_are_written_leave_the_model_dense_or_whole_pruned(
    tiny_model, monkeypatch, update, presses, reconstruction
):
    """At every write: those for a while, and those at the end."""
    config = PruningConfig(update=update, reconstruction=reconstruction, targets=TARGETS, micro_batch_size=1)
    settings = {"num_hidden_layers": 2}
    pruned, total = tiny_model("llama", **settings), itertools.count()
    writes = {name: getattr(Changes, name) for name in ("make", "_changed")}
    with monkeypatch.context() as patched:
        for name, original in writes.items():
            patched.setattr(Changes, name, lambda *args, original=original: (next(total), original(*args))[1])
        prune(pruned, sequences(1), config)
    dense, outcomes = weights(tiny_model("llama", **settings)), set()
    for at in range(next(total)):
        model, calls = tiny_model("llama", **settings), itertools.count()

        def interrupted(*args, original, calls=calls, at=at):
            number = next(calls)
            if number % 2:  # after the write, too
                original(*args)
            if at <= number < at + presses:
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patched:
            for name, original in writes.items():
                patched.setattr(Changes, name, functools.partialmethod(interrupted, original=original))
            with pytest.raises(KeyboardInterrupt):
                prune(model, sequences(1), config)
        is_dense, is_pruned = same(weights(model), dense), same(weights(model), weights(pruned))
        assert is_dense or is_pruned, f"write {at}"
        outcomes.add("pruned" if is_pruned else "dense")
    assert outcomes == {"dense", "pruned"}


@pytest.mark.parametrize("reconstruction", [None, "sequential"])
@pytest.mark.parametrize("update", ["block", "layer"])
def test_interrupts_while_weights_are_put_back_are_held_until_all_are(tiny_model, monkeypatch, update, reconstruction):
    config = PruningConfig(update=update, reconstruction=reconstruction, targets=TARGETS, micro_batch_size=1)
    settings = {"num_hidden_layers": 2}
    dense, at = weights(tiny_model("llama", **settings)), 0
    originals = {name: getattr(Changes, name) for name in ("_undo", "_change_on_call")}
    while True:
        model, calls = tiny_model("llama", **settings), itertools.count()

        def interrupted(back, calls=calls, at=at):
            if next(calls) == at:
                raise KeyboardInterrupt
            back()

        def undo(changes, weight, original, interrupted=interrupted):
            back = original(changes, weight)
            if isinstance(back, list):
                return [functools.partial(interrupted, one) for one in back]
            return functools.partial(interrupted, back)

        with monkeypatch.context() as patched:
            for name, original in originals.items():
                patched.setattr(Changes, name, functools.partialmethod(undo, original=original))
            try:
                prune(model, sequences(1), config)
                break
            except KeyboardInterrupt:
                assert same(weights(model), dense), f"put back {at}"
                assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        at += 1
    assert at >= 6


@pytest.mark.parametrize("reconstruction", [None, "sequential", "iterative", "least_squares"])
@pytest.mark.parametrize("update", ["block", "layer", "none"])
def test_weights_change_at_the_end_and_all_at_once(tiny_model, update, reconstruction):
    """In between they are changed while outputs are computed; at every step of progress that others see they may be."""
    model = tiny_model("llama")
    dense, seen = weights(model), []

    def look(done: int, total: int) -> None:
        if done == total:
            seen.append(same(weights(model), dense))

    result = prune(model, sequences(2), PruningConfig(update=update, reconstruction=reconstruction), progress=look)
    assert seen == [True]
    result.masks.verify(model)
    assert all((tensor != dense[name]).any() for name, tensor in weights(model).items() if name in result.masks)
