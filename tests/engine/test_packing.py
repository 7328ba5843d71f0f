"""Order and batches as pure functions: every sample once, budgets kept."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bivec.engine.packing import epoch_order, indices_for_step, token_budget_batches

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**64 - 1)


@few
@given(n=st.integers(0, 200), seed=seeds, epoch=st.integers(0, 10**6))
def test_an_epoch_visits_every_sample_once(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    epoch_order.cache_clear()
    np.testing.assert_array_equal(order, epoch_order(n, seed, epoch))


def test_orders_differ_between_seeds_and_epochs():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_is_the_same_on_every_machine():
    """A fixed answer: another one would break the resuming of runs across versions."""
    assert epoch_order(8, 42, 0).tolist() == [0, 2, 6, 3, 5, 4, 7, 1]


def test_first_places_are_uniform():
    n, epochs = 10, 3000
    counts = np.bincount([epoch_order(n, 1, epoch)[0] for epoch in range(epochs)], minlength=n)
    assert np.abs(counts - epochs / n).max() < 5 * np.sqrt(epochs / n)


@few
@given(data=st.data(), n=st.integers(1, 60), seed=seeds)
def test_steps_walk_through_the_epochs(data, n, seed):
    batch_size = data.draw(st.integers(1, n))
    per_epoch = n // batch_size
    for epoch in range(2):
        steps = [indices_for_step(n, batch_size, seed, epoch * per_epoch + i) for i in range(per_epoch)]
        seen = np.concatenate(steps)
        assert all(len(step) == batch_size for step in steps)
        np.testing.assert_array_equal(seen, epoch_order(n, seed, epoch)[: per_epoch * batch_size])


def test_a_cached_order_cannot_be_spoilt():
    with pytest.raises(ValueError, match="read-only"):
        indices_for_step(10, 5, 0, 0)[0] = 3


def test_bad_steps():
    with pytest.raises(ValueError, match="31 samples do not fill one batch of 32"):
        indices_for_step(31, 32, 0, 0)
    with pytest.raises(ValueError, match="got 0 and 1"):
        indices_for_step(31, 0, 0, 1)
    with pytest.raises(ValueError, match="5 and -1"):
        indices_for_step(31, 5, 0, -1)
    for arguments in ((-1, 0, 0), (5, -1, 0), (5, 0, -1)):
        with pytest.raises(ValueError, match="got {}, {} and {}".format(*arguments)):
            epoch_order(*arguments)


@few
@given(
    lengths=st.lists(st.integers(0, 50), max_size=60),
    budget=st.integers(1, 120),
    max_sequences=st.none() | st.integers(1, 5),
)
def test_budgets_are_kept(lengths, budget, max_sequences):
    batches = token_budget_batches(lengths, budget, max_sequences)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    taken = [lengths[index] for batch in batches for index in batch]
    assert taken == sorted(lengths, reverse=True)
    for batch in batches:
        total = sum(lengths[index] for index in batch)
        assert total <= budget or len(batch) == 1
        assert max_sequences is None or len(batch) <= max_sequences
    for batch, following in pairwise(batches):  # no batch is closed before it is full
        full = sum(lengths[index] for index in batch) + lengths[following[0]] > budget
        assert full or len(batch) == max_sequences


def batches_by_hand(lengths, budget, max_sequences):
    """The rule of token_budget_batches as a reader would carry it out."""
    left = sorted(range(len(lengths)), key=lambda index: -lengths[index])  # stable
    batches = []
    while left:
        batch = [left.pop(0)]
        while left and sum(lengths[i] for i in [*batch, left[0]]) <= budget and len(batch) != max_sequences:
            batch.append(left.pop(0))
        batches.append(batch)
    return batches


@few
@given(
    lengths=st.lists(st.integers(0, 50), max_size=40),
    budget=st.integers(1, 120),
    max_sequences=st.none() | st.integers(1, 5),
    data=st.data(),
)
def test_batches_are_those_of_the_rule_in_any_order_of_the_input(lengths, budget, max_sequences, data):
    batches = token_budget_batches(lengths, budget, max_sequences)
    assert batches == batches_by_hand(lengths, budget, max_sequences)
    assert all(type(index) is int for batch in batches for index in batch)
    assert batches == token_budget_batches(np.array(lengths, np.int32), budget, max_sequences)
    order = data.draw(st.permutations(range(len(lengths))))
    mixed = [lengths[i] for i in order]
    taken = [[mixed[i] for i in batch] for batch in token_budget_batches(mixed, budget, max_sequences)]
    assert taken == [[lengths[i] for i in batch] for batch in batches]


@few
@given(data=st.data(), n=st.integers(2, 60), seed=seeds)
def test_a_smaller_batch_takes_the_same_order(data, n, seed):
    """Two steps of half the size are one of the whole, up to what an epoch drops at its end."""
    half = data.draw(st.integers(1, n // 2))
    for step in range(n // (2 * half)):
        whole = indices_for_step(n, 2 * half, seed, step)
        parts = [indices_for_step(n, half, seed, 2 * step + part) for part in (0, 1)]
        np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_bad_budgets():
    with pytest.raises(ValueError, match="at least 1, got 0 and None"):
        token_budget_batches([1], 0)
    with pytest.raises(ValueError, match="at least 1, got 5 and 0"):
        token_budget_batches([1], 5, 0)
