"""The learning rate schedule against transformers', and the optimiser's settings."""

import pytest
import torch

from bivec.engine.errors import ConfigError
from bivec.engine.optim import OptimConfig, learning_rate_at, make_optimizer


@pytest.mark.parametrize(("warmup", "horizon"), [(0, 50), (7, 50), (10, 10)])
def test_equal_to_transformers(warmup, horizon):
    from transformers import get_linear_schedule_with_warmup

    config = OptimConfig(learning_rate=3e-4, steps=60, horizon=horizon, warmup_steps=warmup)
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], config)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, horizon)
    for step in range(config.steps):
        assert learning_rate_at(step, config) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-20)
        optimizer.step()
        schedule.step()


def test_values_of_the_original_recipes():
    mntp = OptimConfig(learning_rate=5e-5, steps=1000, horizon=22236)
    assert learning_rate_at(0, mntp) == 5e-5
    assert learning_rate_at(1000, mntp) == pytest.approx(4.775e-5, rel=1e-4)  # METHOD 3.5: 4.78e-5 at the stop
    simcse = OptimConfig(learning_rate=3e-5, steps=1000, horizon=23439)
    assert learning_rate_at(1000, simcse) == pytest.approx(2.872e-5, rel=1e-4)  # METHOD 4.5
    supervised = OptimConfig(learning_rate=2e-4, steps=1000, horizon=8787, warmup_steps=300)
    assert learning_rate_at(150, supervised) == pytest.approx(1e-4)
    assert learning_rate_at(1000, supervised) == pytest.approx(1.835e-4, rel=1e-3)  # METHOD 5.7


def test_without_a_horizon_the_decay_ends_at_the_stop():
    config = OptimConfig(learning_rate=1.0, steps=10)
    assert [learning_rate_at(step, config) for step in (0, 5, 9, 10, 11)] == pytest.approx([1.0, 0.5, 0.1, 0.0, 0.0])


def test_optimizer_settings():
    (group,) = make_optimizer([torch.nn.Parameter(torch.zeros(2))], OptimConfig(5e-5, 10)).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (5e-5, (0.9, 0.999), 1e-8, 0.0)


@pytest.mark.parametrize(
    "wrong", [{"learning_rate": 0.0}, {"steps": 0}, {"max_grad_norm": 0.0}, {"warmup_steps": -1}], ids=str
)
def test_bad_settings(wrong):
    with pytest.raises(ConfigError, match="must be positive"):
        OptimConfig(**{"learning_rate": 1e-3, "steps": 5, **wrong})
