from __future__ import annotations

import math

import pytest
from lightning.pytorch import Callback
from timed_runs import BASE_RATE, Clock, Timed, budget_of_seconds, finite, make_trainer, seconds_spent, stream

from sparsefit.callbacks.trainer_lookup import budget_of, ledger_of
from sparsefit.errors import ConfigError

SPLIT = {"reconstruction": 0.2, "training": 0.8}


class Reconstruct(Callback):
    """Takes steps of a second until its share is used up, or `most` of them."""

    def __init__(self, clock: Clock, most: float = math.inf):
        self.clock, self.most, self.steps, self.reported = clock, most, 0, []

    def on_fit_start(self, trainer, pl_module):
        with ledger_of(trainer).stage("reconstruction"):
            self.reported.append(budget_of(trainer).share_of(trainer, "reconstruction"))
            deadline = self.clock() + (math.inf if self.reported[0] is None else self.reported[0])
            while self.steps < self.most and self.clock() + 1 <= deadline + 1e-6:
                self.clock.now += 1
                self.steps += 1
            self.reported.append(budget_of(trainer).share_of(trainer, "reconstruction"))


@pytest.mark.parametrize(
    ("pruning", "kept", "share", "steps"),
    [
        (0.0, 0.0, 18.0, 72),  # a fifth of the 90 that remain without the reserve
        (40.0, 0.0, 10.0, 40),
        (40.0, 20.0, 8.0, 32),
    ],
)
def test_a_stage_gets_its_share_of_what_is_left_and_training_the_rest(pruning, kept, share, steps):
    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.1, split=SPLIT)
    budget.keep(kept)

    class Prune(Callback):
        def on_fit_start(self, trainer, pl_module):
            clock.now += pruning

    module, reconstruct = Timed(clock), Reconstruct(clock)
    make_trainer(Prune(), budget, reconstruct).fit(module, stream())
    assert reconstruct.reported == [pytest.approx(share), pytest.approx(0, abs=1e-9)]
    assert (reconstruct.steps, module.batches) == (share, steps)
    assert budget.ledger.seconds["reconstruction"] == pytest.approx(share)
    assert budget.ledger.seconds["training"] == pytest.approx(steps)
    assert seconds_spent(budget) == pytest.approx(100 - max(10, kept))


def test_what_a_stage_leaves_of_its_share_goes_to_training():
    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.0, split={"reconstruction": 0.5, "training": 0.5})
    module, reconstruct = Timed(clock), Reconstruct(clock, most=10)
    make_trainer(budget, reconstruct).fit(module, stream())
    assert reconstruct.reported == pytest.approx([50, 40])
    assert (reconstruct.steps, module.batches) == (10, 90)


def test_training_has_everything_where_no_other_stage_runs():
    clock = Clock()
    module = Timed(clock)
    make_trainer(budget_of_seconds(clock, 100, reserve=0.0, split=SPLIT)).fit(module, stream())
    assert module.batches == 100


def test_the_rate_falls_from_where_training_starts():
    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.0, split=SPLIT, warmup_steps=0)
    module = Timed(clock)
    make_trainer(budget, Reconstruct(clock)).fit(module, stream())
    assert module.rates == pytest.approx([BASE_RATE * (1 - step / 80) for step in range(80)])


def test_without_a_split_a_stage_may_take_all_that_is_left():
    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.0)
    module, reconstruct = Timed(clock), Reconstruct(clock, most=30)
    make_trainer(budget, reconstruct).fit(module, stream())
    assert reconstruct.reported == [100.0, 70.0]
    assert module.batches == 70


@pytest.mark.parametrize("fit_start", [95, 200])
def test_a_budget_spent_before_the_stage_gives_it_nothing_and_says_so(fit_start):
    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.05, split=SPLIT)

    class Prune(Callback):
        def on_fit_start(self, trainer, pl_module):
            clock.now += fit_start

    module, reconstruct = Timed(clock), Reconstruct(clock)
    with pytest.warns(UserWarning, match=r"cannot pay for reconstruction.*Raise gpu_hours"):
        make_trainer(Prune(), budget, reconstruct).fit(module, stream())
    assert reconstruct.reported == [0.0, 0.0]
    assert module.batches == 0


def test_a_stage_that_took_too_long_leaves_training_less():
    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.0, split=SPLIT)

    class Slow(Callback):
        def on_fit_start(self, trainer, pl_module):
            with ledger_of(trainer).stage("reconstruction"):
                self.left = [budget.share_of(trainer, "reconstruction")]
                clock.now += 30
                self.left += [budget.share_of(trainer, stage) for stage in ("reconstruction", "training")]

    slow, module = Slow(), Timed(clock)
    make_trainer(budget, slow).fit(module, stream())
    assert slow.left == pytest.approx([20, 0, 70])
    assert module.batches == 70


def test_an_unknown_stage_has_no_share():
    class Ask(Callback):
        def on_fit_start(self, trainer, pl_module):
            budget_of(trainer).share_of(trainer, "distillation")

    clock = Clock()
    with pytest.raises(ConfigError, match=r"'distillation'.*'reconstruction' and 'training'"):
        make_trainer(budget_of_seconds(clock, 100, split=SPLIT), Ask()).fit(Timed(clock), finite(2))
