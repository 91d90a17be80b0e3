from __future__ import annotations

import pytest
from lightning.pytorch import Callback
from ranks import ddp, on_ranks
from timed_runs import Clock, Timed, budget_of_seconds, expected_rates, make_trainer, stream

from sparsefit.callbacks.trainer_lookup import budget_of, ledger_of
from sparsefit.errors import BudgetError


class Record(Callback):
    def setup(self, trainer, pl_module, stage):
        if trainer.global_rank == 1:
            budget_of(trainer).keep(20.0)

    def on_fit_start(self, trainer, pl_module):
        # Only rank 1 asks for more than there is.
        try:
            budget_of(trainer).check_before(trainer, "calibration", seconds=1000.0 * trainer.global_rank)
            self.refused = False
        except BudgetError:
            self.refused = True

    def on_train_end(self, trainer, pl_module):
        self.record = {
            "steps": trainer.global_step,
            "rates": pl_module.rates,
            "hours": ledger_of(trainer).hours,
            "clock": pl_module.clock.now,
            "reason": budget_of(trainer).stop_reason,
            "refused": self.refused,
        }


def ranks_of_different_speed():
    clock, record = Clock(), Record()
    # Rank 1 needs 2 seconds for a step, rank 0 one; both are charged what the slower takes, twice (two devices).
    budget = budget_of_seconds(clock, 200, reserve=0.0)
    trainer = make_trainer(budget, record, **ddp(2), max_steps=500)
    trainer.fit(Timed(clock, step=1.0, slower_by_rank=1.0), stream())
    return record.record


def test_ranks_of_different_speed_stop_together_at_equal_rates():
    first, second = on_ranks(2, ranks_of_different_speed)
    assert first["steps"] == second["steps"] == 40  # (100 - 20 kept by rank 1) / 2
    assert (first["clock"], second["clock"]) == (40, 80)
    assert first["rates"] == second["rates"] == pytest.approx(expected_rates(40, 1 / 40))
    assert first["hours"] == pytest.approx(160 / 3600)
    assert second["hours"] == pytest.approx(160 / 3600)
    assert first["reason"] == second["reason"]
    assert first["refused"]
    assert second["refused"]


class Share(Callback):
    """Ranks that come to the stage at different moments, and keep and charge different times."""

    def on_fit_start(self, trainer, pl_module):
        budget, rank = budget_of(trainer), trainer.global_rank
        pl_module.clock.now += 10 + 30 * rank
        budget.keep(5.0 + 15.0 * rank)
        with ledger_of(trainer).stage("reconstruction"):
            self.reported = [budget.share_of(trainer, "reconstruction")]
            pl_module.clock.now += 2.0 + rank
            self.reported.append(budget.share_of(trainer, "reconstruction"))


def shares():
    clock, share = Clock(), Share()
    split = {"reconstruction": 0.25, "training": 0.75}
    budget = budget_of_seconds(clock, 200, reserve=0.0, split=split)
    make_trainer(budget, share, **ddp(2), max_steps=1).fit(Timed(clock), stream())
    return share.reported


def test_all_ranks_get_the_same_share():
    first, second = on_ranks(2, shares)
    # Two devices for 100 seconds; rank 1 has spent 40 and keeps 20: a quarter of 40, and 3 of that are gone then.
    assert first == second
    assert first == pytest.approx([10, 7])
