from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from timed_runs import BASE_RATE, Clock, Timed, budget_of_seconds, make_trainer, seconds_spent, stream

from sparsefit.callbacks.trainer_lookup import budget_of


class KillAfter(Callback):
    def __init__(self, steps: int, path: Path):
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)
            pl_module.clock.now += 500  # lost with the process
            raise RuntimeError("killed")


def interrupted(tmp_path: Path, steps: int = 30, seconds: float = 100) -> Path:
    clock = Clock()
    path = tmp_path / "interrupted.ckpt"
    trainer = make_trainer(budget_of_seconds(clock, seconds, reserve=0.1), KillAfter(steps, path))
    with pytest.raises(RuntimeError, match="killed"):
        trainer.fit(Timed(clock, fit_start=10), stream())
    assert not budget_of(trainer).ledger.running
    return path


def test_a_resumed_run_continues_counting(tmp_path):
    path = interrupted(tmp_path)
    clock = Clock(77.0)
    budget = budget_of_seconds(clock, 100, reserve=0.1)
    module = Timed(clock, fit_start=20)
    make_trainer(budget).fit(module, stream(), ckpt_path=path, weights_only=True)
    # 10 + 30 before, 20 for starting again, and 30 of the 90 are left.
    assert module.batches == 30
    assert seconds_spent(budget) == pytest.approx(90)
    assert budget.ledger.seconds == pytest.approx({"setup": 30, "training": 60})
    # The line to zero starts where training first did, after 10 seconds.
    assert module.rates == pytest.approx([BASE_RATE * (90 - now) / 80 for now in range(60, 90)])


def test_a_resume_with_a_larger_budget_extends_the_run(tmp_path):
    path = interrupted(tmp_path)
    clock = Clock()
    budget = budget_of_seconds(clock, 200, reserve=0.1)
    module = Timed(clock)
    make_trainer(budget).fit(module, stream(), ckpt_path=path)
    assert module.batches == 180 - 40
    assert module.rates[0] == pytest.approx(BASE_RATE * (180 - 40) / 170)


def test_time_kept_in_the_first_process_is_kept_in_the_next(tmp_path):
    clock = Clock()
    budget = budget_of_seconds(clock, 100)
    budget.keep(25.0, "evaluation")
    budget.keep(9.0, "export")
    with pytest.raises(RuntimeError, match="killed"):
        make_trainer(budget, KillAfter(30, tmp_path / "interrupted.ckpt")).fit(Timed(clock), stream())
    clock = Clock()
    budget = budget_of_seconds(clock, 100)
    budget.keep(5.0, "export")
    module = Timed(clock)
    make_trainer(budget).fit(module, stream(), ckpt_path=tmp_path / "interrupted.ckpt")
    assert module.batches == 100 - 30 - 25 - 5


def test_a_state_restored_after_setup_counts_too(tmp_path, monkeypatch):
    path = interrupted(tmp_path)
    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.1)
    module = Timed(clock, fit_start=20)
    trainer = make_trainer(budget)
    monkeypatch.setattr(type(trainer.strategy), "restore_checkpoint_after_setup", True)
    trainer.fit(module, stream(), ckpt_path=path)
    assert module.batches == 30
    assert module.rates[0] == pytest.approx(BASE_RATE * 30 / 80)


def test_base_rates_survive_a_strategy_that_restores_only_the_settings_it_finds(tmp_path, monkeypatch):
    def restore(strategy, checkpoint):
        for group, saved in zip(
            strategy.optimizers[0].param_groups, checkpoint["optimizer_states"][0]["param_groups"], strict=True
        ):
            group.update({key: saved[key] for key in group if key != "params"})

    path = interrupted(tmp_path)
    clock = Clock()
    module = Timed(clock, fit_start=20)
    trainer = make_trainer(budget_of_seconds(clock, 100, reserve=0.1))
    monkeypatch.setattr(type(trainer.strategy), "load_optimizer_state_dict", restore)
    trainer.fit(module, stream(), ckpt_path=path)
    assert module.rates[0] == pytest.approx(BASE_RATE * 30 / 80)


@pytest.mark.parametrize("budget_seconds", [40, 44, 45.0])
def test_a_resume_with_nothing_left_takes_no_step(tmp_path, budget_seconds):
    path = interrupted(tmp_path)
    saved = path.read_bytes()
    clock = Clock()
    budget = budget_of_seconds(clock, budget_seconds, reserve=0.1)
    module = Timed(clock)
    before = module.state_dict()
    trainer = make_trainer(budget, ModelCheckpoint(tmp_path, save_last=False), enable_checkpointing=True)
    with pytest.warns(UserWarning, match="no training step is taken"):
        trainer.fit(module, stream(), ckpt_path=path)
    assert module.batches == 0
    assert trainer.global_step == 30
    assert budget.stop_reason is not None
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == saved
    assert before.keys() == module.state_dict().keys()


def test_the_same_callback_resumed_in_the_same_process(tmp_path):
    clock = Clock()
    path = tmp_path / "interrupted.ckpt"
    budget = budget_of_seconds(clock, 100, reserve=0.1)
    module = Timed(clock, fit_start=10)
    with pytest.raises(RuntimeError, match="killed"):
        make_trainer(budget, KillAfter(30, path)).fit(module, stream())
    make_trainer(budget).fit(module, stream(), ckpt_path=path)
    assert seconds_spent(budget) == pytest.approx(90)
    assert module.batches == 30 + 90 - 10 - 30 - 10
