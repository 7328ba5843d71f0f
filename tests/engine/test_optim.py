"""The learning rate schedule against transformers' and on any settings, and the optimiser's settings."""

import dataclasses
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from bivec.engine.errors import ConfigError
from bivec.engine.optim import OptimConfig, learning_rate_at, make_optimizer

schedules = st.builds(
    OptimConfig,
    learning_rate=st.floats(1e-8, 10.0),
    steps=st.integers(1, 60),
    horizon=st.none() | st.integers(1, 90),
    warmup_steps=st.integers(0, 40),
)
any_schedule = hypothesis_settings(max_examples=40, deadline=None, derandomize=True)


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


@any_schedule
@given(config=schedules)
def test_any_schedule_is_two_straight_lines(config):
    """In exact fractions: up from 0 over the warm-up, then down to 0 at the horizon; above the learning rate never."""
    end = config.steps if config.horizon is None else config.horizon
    for step in range(0, 100, 3):
        if step < config.warmup_steps:
            exact = Fraction(step, config.warmup_steps)
        else:
            exact = Fraction(end - step, end - config.warmup_steps) if step < end else Fraction(0)
        rate = learning_rate_at(step, config)
        assert rate == pytest.approx(config.learning_rate * float(exact), rel=1e-14, abs=0.0)
        assert 0.0 <= rate <= config.learning_rate


@any_schedule
@given(config=schedules)
def test_any_schedule_rises_then_falls(config):
    end = config.steps if config.horizon is None else config.horizon
    rates = [learning_rate_at(step, config) for step in range(100)]
    warm = rates[: config.warmup_steps]
    assert all(before < after for before, after in pairwise(warm)) and (not warm or warm[0] == 0.0)
    cooling = rates[config.warmup_steps : max(end, config.warmup_steps) + 1]
    assert all(before > after for before, after in pairwise(cooling)) and cooling[-1] == 0.0
    assert set(rates[max(end, config.warmup_steps) :]) == {0.0}
    if end > config.warmup_steps:  # the peak is reached, where the warm-up ends
        assert rates[config.warmup_steps] == config.learning_rate == max(rates)


@any_schedule
@given(config=schedules, factor=st.sampled_from([0.5, 2.0, 4.0]), step=st.integers(0, 100))
def test_any_schedule_scales_with_its_rate_and_stops_where_it_likes(config, factor, step):
    """Bit by bit: the shape is that of the horizon, whatever the rate and the step at which training stops."""
    scaled = dataclasses.replace(config, learning_rate=factor * config.learning_rate)
    assert learning_rate_at(step, scaled) == factor * learning_rate_at(step, config)
    horizon = config.steps if config.horizon is None else config.horizon
    shorter = dataclasses.replace(config, steps=1, horizon=horizon)
    assert learning_rate_at(step, shorter) == learning_rate_at(step, config)


def test_optimizer_settings():
    (group,) = make_optimizer([torch.nn.Parameter(torch.zeros(2))], OptimConfig(5e-5, 10)).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (5e-5, (0.9, 0.999), 1e-8, 0.0)


def test_optimizer_takes_every_setting():
    config = OptimConfig(1e-3, 10, weight_decay=0.25, betas=(0.5, 0.75), eps=1e-4)
    (group,) = make_optimizer([torch.nn.Parameter(torch.zeros(2))], config).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.5, 0.75), 1e-4, 0.25)
    assert group["fused"]


def test_settings_by_default():
    """Those of the original recipes (METHOD 3.5), for a recipe that says nothing; none can be changed later."""
    config = OptimConfig(1e-3, 10)
    assert (config.horizon, config.warmup_steps, config.max_grad_norm) == (None, 0, 1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 11


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"learning_rate": -1e-3},
        {"learning_rate": float("inf")},
        {"learning_rate": float("nan")},
        {"steps": 0},
        {"steps": 0, "horizon": 5},
        {"steps": -1, "horizon": 5},
        {"horizon": 0},
        {"horizon": -3},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": float("nan")},
        {"warmup_steps": -1},
    ],
    ids=str,
)
def test_bad_settings(wrong):
    with pytest.raises(ConfigError, match="must be positive") as error:
        OptimConfig(**{"learning_rate": 1e-3, "steps": 5, **wrong})
    assert str(next(iter(wrong.values()))) in str(error.value)


def test_the_smallest_settings():
    config = OptimConfig(learning_rate=1e-12, steps=1, horizon=1, max_grad_norm=1e-12)
    assert learning_rate_at(0, config) == 1e-12 and learning_rate_at(1, config) == 0.0
    assert OptimConfig(0.5, 1, max_grad_norm=float("inf")).warmup_steps == 0
    assert OptimConfig(0.5, 1, max_grad_norm=0.5).max_grad_norm == 0.5
