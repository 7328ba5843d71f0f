"""Masking for MNTP: which tokens, replaced by what, scored where, and from which draws (METHOD 14, tests 3 and 4)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bivec.engine.masking import MaskingConfig, mask_batch

VOCAB, MASK = 1000, 7
few = settings(max_examples=25, deadline=None)


def config(**changes) -> MaskingConfig:
    return MaskingConfig(**{"mask_token_id": MASK, "vocab_size": VOCAB, **changes})


def blocks(n: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random ids that are never the mask token, a special token in front of each row and anywhere with 10 %."""
    generator = np.random.default_rng(seed)
    special = generator.random((n, length)) < 0.1
    special[:, 0] = True
    return generator.integers(10, VOCAB, (n, length)), special


def assert_within_binomial_error(count: int, trials: int, probability: float) -> None:
    deviation = np.sqrt(trials * probability * (1 - probability))
    assert abs(count - trials * probability) <= 4 * deviation, (count, trials, probability)


@pytest.mark.parametrize("probability", [0.2, 0.8])
@pytest.mark.parametrize("style", ["bert", "all_mask"])
def test_statistics(style, probability):
    ids, special = blocks(200, 128)
    batch = mask_batch(ids, special, config(style=style, probability=probability), seed=1, sample_ids=range(200))
    after = batch.batch.input_ids.numpy()
    selected = batch.index.numpy() + 1  # position 0 is special here, so that every selected token is scored
    assert_within_binomial_error(len(selected), int((~special).sum()), probability)
    assert not special.reshape(-1)[selected].any()
    before = ids.reshape(-1)
    np.testing.assert_array_equal(batch.targets, before[selected])
    rest = np.delete(np.arange(before.size), selected)
    np.testing.assert_array_equal(after[rest], before[rest])
    masked = int((after[selected] == MASK).sum())
    kept = int((after[selected] == before[selected]).sum())
    if style == "all_mask":
        assert masked == len(selected)
    else:
        assert_within_binomial_error(masked, len(selected), 0.8 + 0.1 / VOCAB)
        assert_within_binomial_error(kept, len(selected), 0.1 + 0.1 / VOCAB)
        replaced = after[selected][(after[selected] != MASK) & (after[selected] != before[selected])]
        assert_within_binomial_error(int((replaced < VOCAB // 2).sum()), len(replaced), 0.5)
        assert replaced.min() >= 0 and replaced.max() < VOCAB


def test_selection_is_independent_over_positions_and_samples():
    ids, _ = blocks(300, 64)
    special = np.zeros_like(ids, dtype=bool)
    chosen = np.zeros(ids.size, dtype=bool)
    batch = mask_batch(ids, special, config(style="all_mask", probability=0.5), seed=3, sample_ids=range(300))
    chosen[batch.batch.input_ids.numpy() == MASK] = True
    chosen = chosen.reshape(300, 64)
    for pairs in (chosen[:, 1:] == chosen[:, :-1], chosen[1:] == chosen[:-1]):
        assert_within_binomial_error(int(pairs.sum()), pairs.size, 0.5)


def test_shift_by_hand():
    """Everything is selected: token i is scored from row i - 1 of its own sequence, and position 0 has no label."""
    sequences, special = [[11, 12, 13], [], [21], [31, 32, 33]], [[1, 0, 0], [], [0], [0, 0, 1]]
    batch = mask_batch(sequences, special, config(style="all_mask", probability=1.0), seed=0, sample_ids=[0, 1, 2, 3])
    assert batch.batch.input_ids.tolist() == [11, MASK, MASK, MASK, MASK, MASK, 33]  # 21 and 31 are hidden as well
    assert batch.batch.cu_seqlens.tolist() == [0, 3, 3, 4, 7]
    assert batch.batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert batch.index.tolist() == [0, 1, 4]
    assert batch.targets.tolist() == [12, 13, 32]


def test_loss_depends_on_the_row_before_alone():
    """METHOD 14, test 3: logits by hand; only the row in front of a hidden token has a gradient."""
    batch = mask_batch([[5, 6, 8]], [[1, 1, 0]], config(style="all_mask", probability=1.0), seed=0, sample_ids=[0])
    logits = torch.zeros(3, VOCAB, requires_grad=True)
    torch.nn.functional.cross_entropy(logits[batch.index], batch.targets).backward()
    assert logits.grad.abs().sum(1).nonzero().flatten().tolist() == [1]
    assert logits.grad[1].argmin() == 8


@few
@given(
    data=st.data(),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    seed=st.integers(0, 2**64 - 1),
    probability=st.floats(0.05, 1.0),
)
def test_draws_depend_on_seed_and_sample_alone(data, lengths, seed, probability):
    """In any micro-batch and any order a sample meets the same mask."""
    generator = np.random.default_rng(len(lengths))
    sequences = [generator.integers(10, VOCAB, length).tolist() for length in lengths]
    special = [[False] * length for length in lengths]
    samples = data.draw(st.lists(st.integers(0, 2**38), min_size=len(lengths), max_size=len(lengths), unique=True))
    order = data.draw(st.permutations(range(len(lengths))))
    settings_ = config(probability=probability)
    whole = mask_batch(sequences, special, settings_, seed=seed, sample_ids=samples)
    bounds = whole.batch.cu_seqlens.tolist()
    for i in order:
        alone = mask_batch([sequences[i]], [special[i]], settings_, seed=seed, sample_ids=[samples[i]])
        assert alone.batch.input_ids.tolist() == whole.batch.input_ids[bounds[i] : bounds[i + 1]].tolist()
        inside = (whole.index >= bounds[i]) & (whole.index < bounds[i + 1])
        assert (alone.index + bounds[i]).tolist() == whole.index[inside].tolist()
        assert alone.targets.tolist() == whole.targets[inside].tolist()


def masked_by_hand(ids, special, config, seed, sample):
    """What mask_batch does to one sequence, token by token: (tokens, positions with a loss)."""
    words = np.random.Philox(key=np.array([seed, sample], np.uint64), counter=[0, 0, 0, 2]).random_raw(3 * len(ids))
    words = [int(word) for word in words]
    share = {"bert": 80, "all_mask": 100}[config.style]
    tokens, scored = list(ids), []
    for i in range(len(ids)):
        choice, kind = ((word >> 11) / 2**53 for word in (words[i], words[len(ids) + i]))
        if special[i] or choice >= config.probability:
            continue
        if kind < share / 100:
            tokens[i] = config.mask_token_id
        elif kind < 0.8 + 0.1:
            tokens[i] = words[2 * len(ids) + i] % config.vocab_size
        if i > 0:
            scored.append(i)
    return tokens, scored


@few
@given(
    data=st.data(),
    lengths=st.lists(st.integers(0, 30), max_size=6),
    seed=st.integers(0, 2**64 - 1),
    style=st.sampled_from(["bert", "all_mask"]),
    probability=st.floats(0.01, 1.0),
)
def test_equal_to_masking_by_hand(data, lengths, seed, style, probability):
    sequences = [data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=n, max_size=n)) for n in lengths]
    special = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    samples = data.draw(st.lists(st.integers(0, 2**38), min_size=len(lengths), max_size=len(lengths)))
    settings_ = config(style=style, probability=probability)
    batch = mask_batch(sequences, special, settings_, seed=seed, sample_ids=samples)
    tokens, index, targets = [], [], []
    for ids, flags, sample in zip(sequences, special, samples, strict=True):
        after, scored = masked_by_hand(ids, flags, settings_, seed, sample)
        index += [len(tokens) + i - 1 for i in scored]
        targets += [ids[i] for i in scored]
        tokens += after
    assert batch.batch.input_ids.tolist() == tokens
    assert batch.index.tolist() == index and batch.targets.tolist() == targets
    assert batch.batch.sample_ids.tolist() == samples
    assert batch.batch.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()


@few
@given(
    data=st.data(),
    length=st.integers(1, 40),
    seed=st.integers(0, 2**64 - 1),
    probabilities=st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)).map(sorted),
)
def test_more_is_hidden_with_a_higher_probability_and_nothing_special(data, length, seed, probabilities):
    """The same tokens and more; a flag for one token changes nothing but that token; the style changes no choice."""
    ids = list(range(10, 10 + length))
    special = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    flagged = data.draw(st.integers(0, length - 1))

    def scored(probability, flags, style="bert"):
        batch = mask_batch([ids], [flags], config(probability=probability, style=style), seed=seed, sample_ids=[5])
        return set(batch.targets.tolist())

    few_, many = (scored(probability, special) for probability in probabilities)
    assert few_ <= many <= {token for token, flag in zip(ids[1:], special[1:], strict=True) if not flag}
    assert scored(probabilities[1], special, "all_mask") == many
    more_flags = [*special[:flagged], True, *special[flagged + 1 :]]
    assert scored(probabilities[1], more_flags) == many - {ids[flagged]}


def test_other_seeds_and_samples_meet_other_masks():
    ids, special = blocks(1, 64)
    seen = {
        tuple(mask_batch(ids, special, config(), seed=seed, sample_ids=[sample]).batch.input_ids.tolist())
        for seed in range(4)
        for sample in range(4)
    }
    assert len(seen) == 16


def test_masks_are_the_same_on_every_machine():
    batch = mask_batch([[10] * 16], [[False] * 16], config(probability=0.5), seed=42, sample_ids=[3])
    assert batch.batch.input_ids.tolist() == [7, 10, 7, 10, 10, 10, 7, 10, 7, 7, 7, 10, 7, 7, 10, 7]


def test_inputs_stay_as_they_are():
    ids, special = blocks(4, 16)
    copy = ids.copy()
    mask_batch(ids, special, config(probability=1.0), seed=0, sample_ids=range(4))
    np.testing.assert_array_equal(ids, copy)


def test_nothing_to_hide():
    batch = mask_batch([[1, 2], []], [[1, 1], []], config(), seed=0, sample_ids=[0, 1]).to("cpu")
    assert batch.index.shape == batch.targets.shape == (0,)
    assert batch.index.dtype == batch.targets.dtype == torch.int64
    assert mask_batch([], [], config(), seed=0, sample_ids=[]).batch.num_tokens == 0


def test_to_moves_every_tensor():
    batch = mask_batch([[10, 11, 12]], [[False] * 3], config(probability=1.0), seed=0, sample_ids=[4])
    moved = batch.to("meta")
    for before, after in ((batch.index, moved.index), (batch.targets, moved.targets)):
        assert after.device.type == "meta" and (after.shape, after.dtype) == (before.shape, before.dtype)
    assert moved.batch.input_ids.device.type == "meta" and moved.batch.num_tokens == 3
    same = batch.to("cpu")
    assert same.index.tolist() == [0, 1] and same.targets.tolist() == [11, 12]
    assert same.batch.input_ids.tolist() == batch.batch.input_ids.tolist() and same.batch.sample_ids.tolist() == [4]


def test_bad_inputs():
    with pytest.raises(ValueError, match="2 sequences of 3 tokens, 2 masks of 4 and 2 sample ids"):
        mask_batch([[1], [2, 3]], [[0, 0], [0, 0]], config(), seed=0, sample_ids=[0, 1])
    with pytest.raises(ValueError, match="must not be negative"):
        mask_batch([[1]], [[0]], config(), seed=0, sample_ids=[-1])
    with pytest.raises(ValueError, match=r"got seed -1 and sample ids \[3\]"):
        mask_batch([[1]], [[0]], config(), seed=-1, sample_ids=[3])
    with pytest.raises(ValueError, match=r"2 sequences of 2 tokens, 2 masks of 2 and 1 sample ids"):
        mask_batch([[1], [2]], [[0], [0]], config(), seed=0, sample_ids=[0])
    wrong = [{"probability": value} for value in (0.0, -0.5, 1.1, float("nan"))]
    wrong += [{"style": "roberta"}, {"mask_token_id": VOCAB}, {"mask_token_id": VOCAB + 1}, {"mask_token_id": -1}]
    for changes in wrong:
        with pytest.raises(ValueError, match=str(next(iter(changes.values())))):
            config(**changes)


def test_settings_by_default_and_their_limits():
    """The share is the paper's (METHOD 3.5); the first and the last token of the vocabulary can be the mask."""
    plain = MaskingConfig(mask_token_id=0, vocab_size=VOCAB)
    assert (plain.probability, plain.style) == (0.2, "bert")
    assert config(mask_token_id=VOCAB - 1, probability=1.0).probability == 1.0
    assert MaskingConfig(0, 1).vocab_size == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain.probability = 0.5
