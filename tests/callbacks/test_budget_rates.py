from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from timed_runs import (
    BASE_RATE,
    Clock,
    Timed,
    budget_of_seconds,
    expected_rates,
    finite,
    make_trainer,
    seconds_spent,
    stream,
)


def test_the_rate_warms_up_and_falls_to_zero_with_the_budget():
    clock = Clock()
    budget = budget_of_seconds(clock, 100, reserve=0.1)
    module = Timed(clock, fit_start=50)
    make_trainer(budget).fit(module, stream())
    assert module.rates == pytest.approx(expected_rates(40, 1 / 40))
    assert module.rates[0] > 0
    assert module.rates[-1] == pytest.approx(BASE_RATE / 40)


@pytest.mark.parametrize("limits", [{"max_steps": 20}, {"max_epochs": 2}, {"max_steps": 20, "max_epochs": 3}])
def test_steps_or_epochs_that_end_first_take_the_rate_to_zero(limits):
    clock = Clock()
    budget = budget_of_seconds(clock, 1000)
    module = Timed(clock)
    make_trainer(budget, **limits).fit(module, finite(10))
    assert module.rates == pytest.approx(expected_rates(20, 1 / 20))
    assert budget.stop_reason is None


def test_the_budget_may_end_before_the_steps():
    clock = Clock()
    budget = budget_of_seconds(clock, 40, reserve=0.0)
    module = Timed(clock)
    make_trainer(budget, max_steps=1000).fit(module, stream())
    assert module.rates == pytest.approx(expected_rates(40, 1 / 40))


def test_accumulated_batches_share_a_step():
    clock = Clock()
    budget = budget_of_seconds(clock, 90, reserve=0.0)
    module = Timed(clock)
    make_trainer(budget, accumulate_grad_batches=4).fit(module, stream())
    # 22 steps of 4 batches are 88; a 23rd does not fit, so none of its batches is run.
    assert module.batches == 88
    assert module.rates == pytest.approx(expected_rates(22, 4 / 90))


def test_a_step_whose_batches_suddenly_take_longer_is_the_last_one():
    clock = Clock()
    budget = budget_of_seconds(clock, 90, reserve=0.0)

    class Slows(Timed):
        def training_step(self, batch, batch_idx):
            self.step = 1.0 if batch_idx < 84 else 3.0
            return super().training_step(batch, batch_idx)

    module = Slows(clock)
    make_trainer(budget, accumulate_grad_batches=4).fit(module, stream())
    assert (module.batches, len(module.rates)) == (88, 22)
    assert seconds_spent(budget) == pytest.approx(84 + 4 * 3)


def test_manual_optimization_is_driven_too():
    class Manual(Timed):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            for _ in range(2):
                optimizer.step()
                self.rates.append(optimizer.param_groups[0]["lr"])

        def on_before_optimizer_step(self, optimizer):
            pass

    clock = Clock()
    budget = budget_of_seconds(clock, 30, reserve=0.0)
    module = Manual(clock)
    # 35 batches would be 70 steps: their number is the module's affair, so that the budget alone sets the line.
    make_trainer(budget, max_epochs=5).fit(module, finite(7))
    expected = [BASE_RATE * (1 - batch / 30) * min((2 * batch + 1) / 5, 1) for batch in range(30)]
    assert module.rates[::2] == pytest.approx(expected)
    assert module.rates[1::2] == pytest.approx(expected)


def test_a_scheduler_of_the_modules_own_is_left_alone():
    class Scheduled(Timed):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1000)]

    clock = Clock()
    module = Scheduled(clock)
    with pytest.warns(UserWarning, match="own scheduler"):
        make_trainer(budget_of_seconds(clock, 20, reserve=0.0)).fit(module, stream())
    assert module.rates == [BASE_RATE] * 20


def test_the_rate_can_be_left_alone():
    clock = Clock()
    module = Timed(clock)
    make_trainer(budget_of_seconds(clock, 20, reserve=0.0, drive_learning_rate=False)).fit(module, stream())
    assert module.rates == [BASE_RATE] * 20


def test_a_parameter_group_that_appears_later_decays_with_the_others():
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.late)

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 2:
                self.unfreeze_and_add_param_group(pl_module.late, optimizer, initial_denom_lr=10)

    class TwoGroups(Timed):
        def __init__(self, clock):
            super().__init__(clock)
            self.late = torch.nn.Linear(2, 1)
            self.late_rates = []

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.late(batch).sum()

        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            self.late_rates += [group["lr"] for group in optimizer.param_groups[1:]]

        def configure_optimizers(self):
            return torch.optim.SGD(self.layer.parameters(), lr=BASE_RATE)

    clock = Clock()
    module = TwoGroups(clock)
    make_trainer(Unfreeze(), budget_of_seconds(clock, 50, reserve=0.0)).fit(module, finite(10))
    assert module.rates == pytest.approx(expected_rates(50, 1 / 50))
    assert module.late_rates == pytest.approx([rate / 10 for rate in expected_rates(50, 1 / 50)[20:]])
