"""PackedBatch: packing loses nothing, and every token keeps its sequence, position and key."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bivec.models import PackedBatch
from bivec.models.batch import POSITION_BITS

lists_of_ids = st.lists(st.lists(st.integers(0, 2**31), max_size=12), max_size=8)


@given(sequences=lists_of_ids, data=st.data())
@settings(max_examples=100, deadline=None)
def test_packing_is_reversible(sequences, data):
    ids = st.lists(st.integers(0, 2**38), min_size=len(sequences), max_size=len(sequences), unique=True)
    sample_ids = data.draw(st.none() | ids)
    batch = PackedBatch.from_sequences(sequences, sample_ids)
    total = sum(map(len, sequences))
    assert batch.num_tokens == total and batch.num_sequences == len(sequences)
    assert batch.max_seqlen == max(map(len, sequences), default=0)
    assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == total
    for tensor in (batch.input_ids, batch.position_ids, batch.sample_ids, batch.token_ids()):
        assert tensor.dtype == torch.int64 and tensor.dim() == 1
    keys = batch.token_ids().tolist()
    assert len(set(keys)) == len(keys)
    for b, sequence in enumerate(sequences):
        rows = slice(int(batch.cu_seqlens[b]), int(batch.cu_seqlens[b + 1]))
        assert batch.input_ids[rows].tolist() == sequence
        assert batch.position_ids[rows].tolist() == list(range(len(sequence)))
        sample = b if sample_ids is None else sample_ids[b]
        assert batch.sample_ids[b] == sample
        assert keys[rows] == [sample << POSITION_BITS | position for position in range(len(sequence))]


@given(sequences=lists_of_ids.filter(len), data=st.data())
@settings(max_examples=50, deadline=None)
def test_token_ids_do_not_depend_on_the_company(sequences, data):
    chosen = data.draw(st.lists(st.sampled_from(range(len(sequences))), unique=True))
    whole = PackedBatch.from_sequences(sequences)
    part = PackedBatch.from_sequences([sequences[i] for i in chosen], sample_ids=chosen)
    keys = whole.token_ids().split([len(sequence) for sequence in sequences])
    assert part.token_ids().tolist() == [key for i in chosen for key in keys[i].tolist()]


def test_to_moves_every_tensor():
    batch = PackedBatch.from_sequences([[1, 2], [3]], sample_ids=[7, 8])
    moved = batch.to("meta")
    for field in dataclasses.fields(PackedBatch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert after.device.type == "meta" and after.shape == before.shape and after.dtype == before.dtype
    assert moved.max_seqlen == 2
    assert PackedBatch.from_sequences([[1]], device="meta").input_ids.device.type == "meta"
    same = batch.to("cpu")
    assert torch.equal(same.input_ids, batch.input_ids) and torch.equal(same.sample_ids, batch.sample_ids)


def test_keys_are_the_same_in_every_version():
    """Fixed answers: others would give a resumed run other dropout. Sequences of up to 2^24 tokens share no key."""
    batch = PackedBatch.from_sequences([[5, 6], [], [7]], sample_ids=[0, 1, 3])
    assert batch.token_ids().tolist() == [0, 1, 3 * 2**24]


def test_it_is_frozen():
    batch = PackedBatch.from_sequences([[1]])
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.max_seqlen = 5


def test_sample_ids_of_another_length():
    with pytest.raises(ValueError, match="sample_ids has 1 entries for 2 sequences"):
        PackedBatch.from_sequences([[1], [2]], sample_ids=[0])
    with pytest.raises(ValueError, match="sample_ids has 3 entries for 2 sequences"):
        PackedBatch.from_sequences([[1], [2]], sample_ids=[0, 1, 2])
    assert PackedBatch.from_sequences([[1]] * 300, sample_ids=range(300)).num_sequences == 300


def test_check_takes_what_the_model_can_run():
    batch = PackedBatch.from_sequences([[4, 9, 5], [6]])
    batch.check(positions=3, vocabulary=10)
    with pytest.raises(ValueError, match="a sequence of 3 tokens exceeds the model's 2 positions"):
        batch.check(positions=2, vocabulary=10)
    with pytest.raises(ValueError, match="token ids 4 … 9 are not all inside the model's vocabulary of 9"):
        batch.check(positions=3, vocabulary=9)
    with pytest.raises(ValueError, match="token ids 4 … 9 "):
        batch.check(positions=3, vocabulary=4)
    PackedBatch.from_sequences([[0, 9]]).check(positions=2, vocabulary=10)
    with pytest.raises(ValueError, match="token ids -1 … 0 "):
        PackedBatch.from_sequences([[0, -1]]).check(positions=3, vocabulary=10)
    batch.to("meta").check(positions=3, vocabulary=2)  # elsewhere than on a CPU the ids are not read
    PackedBatch.from_sequences([]).check(positions=1, vocabulary=1)
