from __future__ import annotations

import pytest
import torch

from sparsefit.recovery.schedule import budget_factor, first_rate, keep_base_rates, set_rates


def test_factor_warms_up_and_falls_linearly_to_zero():
    steps = 40
    factors = [budget_factor(step, 5, step / steps) for step in range(steps + 1)]
    assert factors[:5] == pytest.approx([0.2, 0.4 * 39 / 40, 0.6 * 38 / 40, 0.8 * 37 / 40, 36 / 40])
    assert factors[5:] == pytest.approx([(steps - step) / steps for step in range(5, steps + 1)])
    assert factors[-1] == 0


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_no_warmup(warmup_steps):
    assert budget_factor(0, warmup_steps, 0.0) == 1.0


def test_rates_of_groups_that_come_early_and_late():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [weights[0]], "lr": 0.1}, {"params": [weights[1]], "lr": 0.2}])
    keep_base_rates([optimizer])
    set_rates([optimizer], 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.1])
    optimizer.add_param_group({"params": [weights[2]], "lr": 0.05})
    keep_base_rates([optimizer], 0.5)
    set_rates([optimizer], 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.1, 0.05])
    set_rates([optimizer], 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.05, 0.025])
    assert first_rate([optimizer]) == pytest.approx(0.025)


def test_base_rates_survive_the_optimizer_state():
    weight = torch.nn.Parameter(torch.zeros(1))
    saved = torch.optim.AdamW([weight], lr=0.3)
    keep_base_rates([saved])
    set_rates([saved], 0.01)
    fresh = torch.optim.AdamW([weight], lr=0.3)
    fresh.load_state_dict(saved.state_dict())
    keep_base_rates([fresh])
    set_rates([fresh], 0.5)
    assert first_rate([fresh]) == pytest.approx(0.15)


def test_a_rate_held_in_a_tensor_is_set_in_place():
    rate = torch.tensor(0.4)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=rate, capturable=True, foreach=False)
    keep_base_rates([optimizer])
    set_rates([optimizer], 0.5)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.2)


def test_no_rate_where_there_is_no_optimizer():
    assert first_rate([]) is None
