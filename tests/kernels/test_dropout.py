"""The counter-based dropout: the documented recipe bit for bit, and the statistics a mask needs."""

import math

import pytest
import torch

from bivec.kernels import dropout
from bivec.kernels.dropout import check_dropout, fold_seed, linear_keep_mask, linear_keep_words

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MASK64 = 2**64 - 1


def mix64(x: int) -> int:
    x &= MASK64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK64
    return x ^ x >> 31


def absorb(h: int, d: int) -> int:
    return mix64(h + (d + 1) * 0x9E3779B97F4A7C15)


def kept(row_key: int, column: int, p: float) -> bool:
    """The recipe of the module docstring in Python integers, written apart from the implementation."""

    def int32(x: int) -> int:
        return (x + 2**31) % 2**32 - 2**31

    x = int32(row_key + column * 0x9E3779B1)
    x = int32(int32(x ^ x >> 16) * 0x7FEB352D)
    x = int32(int32(x ^ x >> 15) * 0x846CA68B)
    return x >= min(round(p * 2**32), 2**32 - 1) - 2**31


def arange(end: int) -> torch.Tensor:
    return torch.arange(end, device=DEVICE)


def attention_keep_mask(*arguments, **options) -> torch.Tensor:
    return dropout.attention_keep_mask(*arguments, **options, device=DEVICE)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of two masks in standard errors."""
    a, b = a.double().flatten(), b.double().flatten()
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / (a.std() * b.std())) * math.sqrt(a.numel())


@pytest.mark.parametrize("seed", [0, 3, 2**62 + 11, -7])
def test_attention_mask_follows_the_recipe(seed):
    mask = attention_keep_mask(seed, 5, heads=2, length=7, dropout_p=0.4)
    state = absorb(mix64(seed), 5)
    for head in range(2):
        for row in range(7):
            key = absorb(state, head << 32 | row)
            assert mask[head, row].tolist() == [kept(key, column, 0.4) for column in range(7)]


@pytest.mark.parametrize("seed", [0, 9, 2**63 + 1])
def test_linear_mask_follows_the_recipe(seed):
    token_ids = torch.tensor([0, 1, 5 << 24 | 3, 2**62], device=DEVICE)
    mask = linear_keep_mask(seed, token_ids, 11, 0.3)
    for row, token in enumerate(token_ids.tolist()):
        key = absorb(mix64(seed), token)
        assert mask[row].tolist() == [kept(key, column, 0.3) for column in range(11)]


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63 - 1, 2**64 + 5, -1])
@pytest.mark.parametrize("data", [(), (0,), (1, 2), (2, 1), (-3, 2**40)])
def test_fold_seed_int_and_tensor_agree(seed, data):
    as_int = fold_seed(seed, *data)
    signed = (seed + 2**63) % 2**64 - 2**63
    as_tensor = fold_seed(torch.tensor([signed], device=DEVICE), *data)
    assert 0 <= as_int < 2**63
    assert as_tensor.dtype == torch.int64 and as_tensor.shape == (1,)
    assert int(as_tensor) == as_int


def test_fold_seed_separates_parts_and_leaves_its_argument():
    seeds = [fold_seed(s, *d) for s in range(20) for d in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]]
    assert len(set(seeds)) == len(seeds)
    seed = torch.tensor([4], device=DEVICE)
    fold_seed(seed, 1)
    assert seed.tolist() == [4]


def test_seed_tensor_and_int_draw_the_same_bits():
    token_ids, scalar = arange(9), torch.tensor(77, device=DEVICE)
    assert torch.equal(linear_keep_mask(77, token_ids, 33, 0.5), linear_keep_mask(scalar, token_ids, 33, 0.5))
    a = attention_keep_mask(77, 3, 2, 9, 0.5)
    assert torch.equal(a, attention_keep_mask(scalar.reshape(1), 3, 2, 9, 0.5))


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 2**63, 2**64 + 5, -(2**63) - 1, torch.tensor(7)])
def test_seed_tensor_holds_the_seed_modulo_2_64(seed):
    seed = seed.to(DEVICE) if isinstance(seed, torch.Tensor) else seed
    held = dropout.seed_tensor(seed, DEVICE)
    assert held.shape == (1,) and held.dtype == torch.int64 and held.device.type == DEVICE.type
    assert (int(held) - int(seed)) % 2**64 == 0


@pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.3, 0.5, 0.9])
def test_drop_rate(p):
    for mask in (linear_keep_mask(1, arange(700), 700, p), attention_keep_mask(2, 0, 9, 233, p)):
        drops, n = int((~mask).sum()), mask.numel()
        assert abs(drops - n * p) <= 4.5 * math.sqrt(n * p * (1 - p))


def test_drop_rate_of_every_row_and_column():
    p, n = 0.3, 1000
    mask = linear_keep_mask(5, arange(n), n, p)
    sigma = math.sqrt(p * (1 - p) / n)
    for means in (mask.double().mean(0), mask.double().mean(1)):
        z = (means - (1 - p)) / sigma
        assert z.abs().max() < 5.0  # of 1000 normal values, 5 is passed once in 1700 runs
        assert 0.85 < float(z.std()) < 1.15  # neither more nor less spread than independent draws have


def test_neighbours_are_independent():
    mask = linear_keep_mask(11, arange(600), 600, 0.4)
    for lag in (1, 2, 3, 16, 64, 128):
        assert abs(correlation(mask[:, lag:], mask[:, :-lag])) < 4.5
        assert abs(correlation(mask[lag:], mask[:-lag])) < 4.5
        assert abs(correlation(mask[lag:, lag:], mask[:-lag, :-lag])) < 4.5
        assert abs(correlation(mask[lag:, :-lag], mask[:-lag, lag:])) < 4.5
    assert abs(correlation(mask, mask.T)) < 6.5  # every pair counts twice


def test_heads_samples_and_seeds_are_independent():
    base = attention_keep_mask(0, 0, 6, 200, 0.3)
    for head in range(1, 6):
        assert abs(correlation(base[0], base[head])) < 4.5
    for sample in (1, 2, 2**32, 2**40):
        assert abs(correlation(base, attention_keep_mask(0, sample, 6, 200, 0.3))) < 4.5
    for seed in (1, 2, 2**32, fold_seed(0, 0), fold_seed(0, 1)):
        assert abs(correlation(base, attention_keep_mask(seed, 0, 6, 200, 0.3))) < 4.5
    # heads, samples and seeds may not change places either
    assert abs(correlation(attention_keep_mask(1, 0, 1, 200, 0.3), attention_keep_mask(0, 1, 1, 200, 0.3))) < 4.5


def test_runs_have_the_length_of_independent_draws():
    """Joint patterns of four neighbours: a linear correlation would miss an xor."""
    mask = linear_keep_mask(21, arange(1000), 1000, 0.5).long()
    pattern = mask[:, 0:-3:4] * 8 + mask[:, 1:-2:4] * 4 + mask[:, 2:-1:4] * 2 + mask[:, 3::4]
    counts = torch.bincount(pattern.flatten(), minlength=16).double()
    expected = counts.sum() / 16
    assert float(((counts - expected) ** 2 / expected).sum()) < 44.3  # chi-square, 15 degrees, 1e-4


def test_a_mask_does_not_depend_on_the_batch(monkeypatch):
    token_ids = torch.randperm(50).to(DEVICE)
    whole = linear_keep_mask(3, token_ids, 40, 0.5)
    assert torch.equal(whole[7:19], linear_keep_mask(3, token_ids[7:19], 40, 0.5))
    # on a CPU rows are drawn in blocks: more columns than a block holds, and row counts that no block divides
    for block in (30, 100, 640):
        monkeypatch.setattr(dropout, "CPU_BLOCK", block)
        assert torch.equal(linear_keep_mask(3, token_ids, 40, 0.5), whole)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_words_are_the_mask(dtype, monkeypatch):
    """All bits of a word, whatever its width, in blocks that cover every row once."""
    monkeypatch.setattr(dropout, "CPU_BLOCK", 90)
    token_ids = arange(13) * 5
    mask, rows = linear_keep_mask(3, token_ids, 40, 0.4), []
    for block, words in linear_keep_words(3, token_ids, 40, 0.4, dtype):
        rows += range(13)[block]
        assert words.dtype == dtype and torch.equal(words, -mask[block].to(dtype))
    assert rows == list(range(13))


def test_long_sequences_begin_as_short_ones():
    # the mask of a long sequence begins with that of a short one
    assert torch.equal(attention_keep_mask(3, 1, 2, 30, 0.5)[:, :11, :11], attention_keep_mask(3, 1, 2, 11, 0.5))


def test_empty_masks():
    assert linear_keep_mask(0, arange(0), 5, 0.5).shape == (0, 5)
    assert linear_keep_mask(0, arange(3), 0, 0.5).shape == (3, 0)
    assert attention_keep_mask(0, 0, 2, 0, 0.5).shape == (2, 0, 0)


@pytest.mark.parametrize(
    ("p", "seed", "message"),
    [
        (-0.1, 1, "dropout_p"),
        (1.0, 1, "dropout_p"),
        (float("nan"), 1, "dropout_p"),
        (0.3, None, "seed"),
        (0.3, 1.5, "seed"),
        (0.3, True, "seed"),
        (0.3, torch.tensor([1, 2], device=DEVICE), "seed"),
        (0.3, torch.tensor([1], dtype=torch.int32, device=DEVICE), "seed"),
    ],
)
def test_bad_arguments(p, seed, message):
    with pytest.raises(ValueError, match=message):
        check_dropout(p, seed, "op")
    with pytest.raises(ValueError, match=message):
        linear_keep_mask(seed, arange(3), 4, p)


def test_bad_token_ids():
    with pytest.raises(ValueError, match="token_ids"):
        linear_keep_mask(1, arange(3).int(), 4, 0.5)
    with pytest.raises(ValueError, match="seed"):
        fold_seed(1.0)
