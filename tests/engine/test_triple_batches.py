"""Batches of one set each, in an order that follows from the sizes, the seed and the step alone."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bivec.engine.errors import DataError
from bivec.engine.packing import epoch_order
from bivec.engine.triple_batches import TripleBatches
from bivec.engine.triples import load_triples
from bivec.kernels import fold_seed

few = settings(max_examples=40, deadline=None)


@dataclass(frozen=True)
class Rows:
    """A set of numbered rows, of which only the name and the size matter here."""

    name: str
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> tuple[str, int]:
        return self.name, int(row)


def batches_of(sizes, batch_size, seed=1) -> TripleBatches:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return TripleBatches([Rows(f"set{i}", size) for i, size in enumerate(sizes)], batch_size, seed)


def epoch_of(batches: TripleBatches, epoch: int) -> list[tuple[int, tuple[int, ...]]]:
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    return [(which, tuple(rows.tolist())) for which, rows in map(batches.rows, steps)]


@few
@given(data=st.data(), sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5), seed=st.integers(0, 2**64 - 1))
def test_an_epoch_takes_whole_chunks_of_every_set(data, sizes, seed):
    batch_size = data.draw(st.integers(1, max(1, *sizes)))
    if max(sizes) < batch_size:
        with pytest.raises(DataError):
            batches_of(sizes, batch_size, seed)
        return
    batches = batches_of(sizes, batch_size, seed)
    assert batches.steps_per_epoch == sum(size // batch_size for size in sizes)
    for epoch in range(2):
        found = epoch_of(batches, epoch)
        for which, size in enumerate(sizes):
            chunks = [rows for position, rows in found if position == which]
            visited = [row for rows in chunks for row in rows]
            assert len(chunks) == size // batch_size and all(len(rows) == batch_size for rows in chunks)
            assert len(set(visited)) == len(visited) and set(visited) <= set(range(size))


@few
@given(
    data=st.data(),
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 12),
)
def test_equal_to_shuffling_by_hand_and_resumable_at_any_step(data, sizes, seed, first):
    """Rows of every set shuffled and cut, then the chunks of all shuffled; a fresh object begins anywhere."""
    batch_size = data.draw(st.integers(1, max(sizes)))
    expected = []
    for epoch in range(first + 3):
        orders = [epoch_order(size, fold_seed(seed, 1, which), epoch) for which, size in enumerate(sizes)]
        chunks = [
            (which, order[start : start + batch_size].tolist())
            for which, order in enumerate(orders)
            for start in range(0, len(order) - batch_size + 1, batch_size)
        ]
        expected += [chunks[place] for place in epoch_order(len(chunks), fold_seed(seed, 0), epoch)]
    resumed = batches_of(sizes, batch_size, seed)
    for step in range(first, first + 3):
        which, rows = resumed.rows(step)
        assert (which, rows.tolist()) == expected[step]


def test_any_step_can_be_had_at_once():
    sizes = [50, 7, 23, 8]
    uninterrupted = batches_of(sizes, 8)
    expected = [uninterrupted.rows(step) for step in range(3 * uninterrupted.steps_per_epoch)]
    for step in (0, 1, uninterrupted.steps_per_epoch - 1, uninterrupted.steps_per_epoch, 17, len(expected) - 1, 5):
        which, rows = batches_of(sizes, 8).rows(step)
        assert which == expected[step][0]
        np.testing.assert_array_equal(rows, expected[step][1])
    backwards = batches_of(sizes, 8)  # one object, steps in any order
    for step in range(len(expected) - 1, -1, -1):
        assert backwards.rows(step)[0] == expected[step][0]
        np.testing.assert_array_equal(backwards.rows(step)[1], expected[step][1])


def test_epochs_and_seeds_differ_in_rows_and_in_sets():
    runs = [epoch_of(batches_of([40, 40, 40], 4, seed), epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(which for which, _ in run) for run in runs}) == 4  # the order of the chunks
    assert len({tuple(sorted(run)) for run in runs}) == 4  # which rows are together
    sets = [[rows for which, rows in runs[0] if which == position] for position in range(3)]
    assert len({tuple(sorted(rows)) for rows in sets}) == 3  # sets of one size are not shuffled alike


def test_the_remainder_is_another_one_in_each_epoch():
    batches = batches_of([11], 4)
    left = [set(range(11)) - {row for _, rows in epoch_of(batches, epoch) for row in rows} for epoch in range(6)]
    assert all(len(rows) == 3 for rows in left) and len(set(map(frozenset, left))) > 1


def test_sets_are_mixed_and_weigh_by_their_size():
    order = [which for which, _ in epoch_of(batches_of([3000, 1000], 10), 0)]
    assert order.count(0) == 300 and order.count(1) == 100
    first_half = order[:200].count(1)
    assert 30 <= first_half <= 70  # 50 ± 4.6 sigma for a random order; 0 or 100 if the sets came one after the other


def test_the_order_is_the_same_on_every_machine():
    """A fixed answer: another one would break the resuming of runs across versions."""
    batches = batches_of([7, 5], 3, seed=42)
    expected = [(1, [2, 3, 4]), (0, [3, 5, 1]), (0, [2, 6, 4]), (0, [2, 5, 1])]
    assert [(which, rows.tolist()) for which, rows in map(batches.rows, range(4))] == expected
    assert batches.rows(0)[1].dtype == np.int64


def test_a_cached_order_cannot_be_spoilt():
    with pytest.raises(ValueError, match="read-only"):
        batches_of([9], 3).rows(0)[1][0] = 5


def test_a_set_smaller_than_a_batch():
    sets = [Rows("tiny", 3), Rows("big", 9), Rows("small", 2)]
    with pytest.warns(UserWarning, match=r"a batch of 4, .*: tiny \(3\), small \(2\)$") as caught:
        batches = TripleBatches(sets, 4, seed=0)
    assert len(caught) == 1
    assert batches.steps_per_epoch == 2
    assert all({name for name, _ in batches.triples(step)} == {"big"} for step in range(6))


def test_no_set_fills_a_batch():
    with pytest.raises(DataError, match=r"one batch of 10 triples: set0 \(3\), set1 \(9\);.* size of 9 at most"):
        batches_of([3, 9], 10)
    with pytest.raises(DataError, match=r"there is none; .*give more data$"):
        batches_of([], 10)


def test_bad_numbers():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        batches_of([3], 0)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        batches_of([3], 1).rows(-1)


def test_triples_of_files(tmp_path):
    """Every row comes from the set of the batch, ids that occur twice included."""
    for stem, count in (("a", 6), ("b", 9)):
        rows = [{"query": f"{stem}{i}", "positive": "p", "positive_id": i // 3} for i in range(count)]
        (tmp_path / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = load_triples(tmp_path)
    batches = TripleBatches(sets, 3, seed=5)
    for step in range(2 * batches.steps_per_epoch):
        which, rows = batches.rows(step)
        triples = batches.triples(step)
        assert [triple.query for triple in triples] == [f"{'ab'[which]}{row}" for row in rows]
        assert [triple.positive_id for triple in triples] == [str(row // 3) for row in rows]
    everything = TripleBatches(sets[:1], 6, seed=5).triples(0)
    assert sorted(triple.positive_id for triple in everything) == ["0", "0", "0", "1", "1", "1"]
