"""flash_attention's torch backend against the float64 oracle of kernels/reference.py."""

import pytest
import torch

from bivec.kernels import attention_layout, attention_torch, reference
from bivec.kernels.attention import attention_dropout_mask, attention_plan, flash_attention

HEADS = [(3, 3), (9, 3), (8, 2), (8, 1)]  # group of 1, 3, 4, 8 query heads
LENGTHS = [5, 0, 1, 17, 5, 33, 0, 1, 128, 2, 15, 5]
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 2)},
    "causal window": {"causal": True, "window": (4, -1)},
    "right window": {"window": (-1, 0)},
    "own key only": {"window": (0, 0)},
    "softcap": {"softcap": 1.5},
    "scale": {"softmax_scale": 0.7},
    "dropout": {"dropout_p": 0.3, "seed": 5},
    "all": {"causal": True, "window": (9, 3), "softcap": 2.0, "dropout_p": 0.5, "seed": 7, "softmax_scale": 0.4},
}


def make(lengths, heads, kv_heads, head_dim=16, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    total = sum(lengths)
    q, k, v, d_out = (
        torch.randn(total, h, head_dim, generator=g, dtype=torch.float64).to(dtype)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    return cu_seqlens, q, k, v, d_out


def with_gradients(function, q, k, v, d_out):
    """Output, lse and the three gradients."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = function(q, k, v)
    return out.detach(), lse, *torch.autograd.grad(out, (q, k, v), d_out)


def oracle(q, k, v, d_out, cu_seqlens, options, dtype=torch.float64, sample_ids=None):
    options = dict(options)
    if "seed" in options:
        seed = options.pop("seed")
        options["keep_masks"] = attention_dropout_mask(
            seed, cu_seqlens, q.shape[1], options["dropout_p"], sample_ids=sample_ids
        )
    return with_gradients(
        lambda q, k, v: reference.attention(q, k, v, cu_seqlens, **options), *(x.to(dtype) for x in (q, k, v, d_out))
    )


def ours(q, k, v, d_out, cu_seqlens, options, want_lse=True):
    def call(q, k, v):
        result = flash_attention(q, k, v, cu_seqlens, 4096, return_lse=want_lse, **options)
        return result if want_lse else (result, None)

    return with_gradients(call, q, k, v, d_out)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_float64_agrees_with_the_oracle(name, heads):
    cu_seqlens, q, k, v, d_out = make(LENGTHS, *heads)
    expected = oracle(q, k, v, d_out, cu_seqlens, OPTIONS[name])
    for want_lse in (True, False):  # with lse always the explicit path, without it whichever is preferred
        got = ours(q, k, v, d_out, cu_seqlens, OPTIONS[name], want_lse)
        if want_lse:
            assert got[1].dtype == torch.float32 and got[1].shape == (heads[0], sum(LENGTHS))
            assert not got[1].requires_grad
            torch.testing.assert_close(got[1].double(), expected[1].detach(), rtol=1e-6, atol=1e-6)
        for a, b in zip((got[0], *got[2:]), (expected[0], *expected[2:]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "causal", "window", "softcap", "dropout", "all"])
def test_error_is_at_most_twice_that_of_plain_torch(name, dtype):
    lengths = [7, 1, 64, 0, 7, 40]
    cu_seqlens, q, k, v, d_out = make(lengths, 6, 2, dtype=dtype)
    exact = oracle(q, k, v, d_out, cu_seqlens, OPTIONS[name])
    plain = oracle(q, k, v, d_out, cu_seqlens, OPTIONS[name], dtype=dtype)
    floor = torch.finfo(dtype).eps
    for want_lse in (True, False):
        got = ours(q, k, v, d_out, cu_seqlens, OPTIONS[name], want_lse)
        for i in (0, 2, 3, 4):
            assert got[i].dtype == dtype
            error = (got[i].double() - exact[i]).abs().max()
            allowed = 2 * (plain[i].double() - exact[i]).abs().max() + floor * exact[i].abs().max()
            assert error <= allowed, f"output {i}: {error} > {allowed}"


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64, 127, 129, 300])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_one_length(length, p):
    cu_seqlens, q, k, v, d_out = make([length, length], 6, 2, head_dim=8)
    options = {"dropout_p": p, "seed": 3} if p else {}
    expected = oracle(q, k, v, d_out, cu_seqlens, options)
    for want_lse in (True, False):
        got = ours(q, k, v, d_out, cu_seqlens, options, want_lse)
        for i in (0, 2, 3, 4):
            torch.testing.assert_close(got[i], expected[i], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("budget", [1, 700, 2000])
@pytest.mark.parametrize("name", ["plain", "dropout", "all"])
def test_chunks_and_saved_probabilities_change_nothing(name, budget, kept, monkeypatch):
    """Cutting the scores at any place, and saving them or computing them again, gives the same numbers."""
    cu_seqlens, q, k, v, d_out = make([9, 4, 9, 20, 9], 6, 2)
    expected = oracle(q, k, v, d_out, cu_seqlens, OPTIONS[name])
    monkeypatch.setattr(attention_layout, "_CHUNK_ELEMENTS_CPU", budget)
    monkeypatch.setattr("bivec.kernels.attention.prefers_explicit", lambda *_: kept)
    plan = attention_plan(cu_seqlens, 64)
    got = ours(q, k, v, d_out, cu_seqlens, OPTIONS[name] | {"plan": plan})
    chunks = plan.layout(6, 2).chunks
    rows = [row for c in chunks for p in c for row in range(p.row, p.row + p.cells * p.length)]
    assert len(chunks) > 1 and rows == list(range(2 * 51))
    assert all(len(c) == 1 or sum(p.cells * 3 * p.length**2 for p in c) <= budget for c in chunks)
    for i in (0, 2, 3, 4):
        torch.testing.assert_close(got[i], expected[i], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "causal", "window", "softcap", "dropout"])
@pytest.mark.parametrize("long", [False, True])  # the explicit and the fused path
def test_gradcheck(name, long):
    lengths = [2, 0, 1, 3] if not long else [7, 6]
    cu_seqlens, q, k, v, _ = make(lengths, 2, 1, head_dim=2 if long else 4)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: flash_attention(*x, cu_seqlens, 8, **OPTIONS[name]), inputs)


def test_path_follows_the_lengths(monkeypatch):
    """Short sequences take the explicit path, long ones without dropout the fused kernel, as all do without a graph:
    there the choice would fall by batch, and a sequence be rounded by what is beside it."""
    called = []
    fused = attention_torch.fused_attention
    monkeypatch.setattr("bivec.kernels.attention.fused_attention", lambda *a: called.append("fused") or fused(*a))
    for lengths, options, expected in (
        ([8, 8], {}, []),
        ([200], {}, ["fused"]),
        ([200], {"dropout_p": 0.1, "seed": 0}, []),
        ([200], {"softcap": 3.0}, []),
        ([200], {"return_lse": True}, []),
    ):
        called.clear()
        cu_seqlens, q, k, v, _ = make(lengths, 4, 2)
        flash_attention(q.requires_grad_(), k, v, cu_seqlens, 256, **options)
        assert called == expected
    called.clear()
    cu_seqlens, q, k, v, _ = make([8, 8], 4, 2)
    flash_attention(q, k, v, cu_seqlens, 256)
    with torch.no_grad():
        flash_attention(q.requires_grad_(), k, v, cu_seqlens, 256)
    assert called == ["fused", "fused"]


@pytest.mark.parametrize("name", ["plain", "dropout"])
def test_runs_are_bit_identical(name):
    for lengths in (LENGTHS, [90, 70, 90]):
        cu_seqlens, q, k, v, d_out = make(lengths, 9, 3, dtype=torch.float32)
        first = ours(q, k, v, d_out, cu_seqlens, OPTIONS[name], want_lse=False)
        second = ours(q, k, v, d_out, cu_seqlens, OPTIONS[name], want_lse=False)
        for i in (0, 2, 3, 4):
            assert torch.equal(first[i], second[i])


def test_dropout_is_keyed_by_sample_id():
    """The same sequences in another order, and in a smaller batch, see the same masks under their ids."""
    lengths = [6, 11, 6]
    cu_seqlens, q, k, v, d_out = make(lengths, 4, 2)
    ids = torch.tensor([40, 2**40, 7])
    options = {"dropout_p": 0.5, "seed": torch.tensor([99])}
    whole = flash_attention(q, k, v, cu_seqlens, 16, sample_ids=ids, **options)
    expected = oracle(q, k, v, d_out, cu_seqlens, options, sample_ids=ids)[0]
    torch.testing.assert_close(whole, expected, rtol=1e-11, atol=1e-12)
    part = slice(6, 23)  # the last two
    some = flash_attention(
        q[part], k[part], v[part], torch.tensor([0, 11, 17], dtype=torch.int32), 16, sample_ids=ids[1:], **options
    )
    torch.testing.assert_close(some, whole[part], rtol=1e-11, atol=1e-12)
    default = flash_attention(q, k, v, cu_seqlens, 16, **options)
    assert not torch.allclose(default, whole)
    assert not torch.allclose(flash_attention(q, k, v, cu_seqlens, 16, sample_ids=ids, dropout_p=0.5, seed=98), whole)


def test_dropout_mask_differs_by_sequence_and_head():
    cu_seqlens = torch.tensor([0, 12, 24], dtype=torch.int32)
    first, second = attention_dropout_mask(3, cu_seqlens, 2, 0.5)
    assert first.shape == (2, 12, 12) and first.dtype == torch.bool
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    again = attention_dropout_mask(3, cu_seqlens, 2, 0.5, sample_ids=torch.tensor([1, 0]))
    assert torch.equal(again[0], second) and torch.equal(again[1], first)


def test_a_plan_serves_all_layers():
    cu_seqlens, q, k, v, _ = make(LENGTHS, 8, 2)
    plan = attention_plan(cu_seqlens, 128)
    for options in OPTIONS.values():
        with_plan = flash_attention(q, k, v, cu_seqlens, 128, plan=plan, **options)
        assert torch.equal(with_plan, flash_attention(q, k, v, cu_seqlens, 128, **options))
    more = flash_attention(q, k[:, :1], v[:, :1], cu_seqlens, 128, plan=plan)  # another number of kv heads
    assert torch.equal(more, flash_attention(q, k[:, :1], v[:, :1], cu_seqlens, 128))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens(lengths):
    cu_seqlens, q, k, v, d_out = make(lengths, 4, 2)
    for options in ({}, OPTIONS["dropout"]):
        out, lse, *grads = ours(q, k, v, d_out, cu_seqlens, options)
        assert out.shape == (0, 4, 16) and lse.shape == (4, 0)
        assert [g.shape for g in grads] == [(0, 4, 16), (0, 2, 16), (0, 2, 16)]


def test_a_sequence_of_one_returns_its_value():
    cu_seqlens, q, k, v, _ = make([1, 1, 1], 4, 2)
    torch.testing.assert_close(flash_attention(q, k, v, cu_seqlens, 1), v.repeat_interleave(2, dim=1))


def test_max_seqlen_is_a_bound_and_no_size():
    cu_seqlens, q, k, v, _ = make([4, 3], 4, 2)
    huge = flash_attention(q, k, v, cu_seqlens, 2**40)
    assert torch.equal(huge, flash_attention(q, k, v, cu_seqlens, 4))


@pytest.mark.parametrize("lengths", [[6, 3], [120, 90]])
def test_large_fp16_values_do_not_overflow(lengths):
    cu_seqlens, q, k, v, d_out = make(lengths, 4, 2, dtype=torch.float16)
    q, k = (q * 3e3).clamp(-1e4, 1e4), (k * 3e3).clamp(-1e4, 1e4)
    got = ours(q, k, v, d_out, cu_seqlens, {}, want_lse=False)
    assert all(torch.isfinite(got[i]).all() for i in (0, 2, 3, 4))


def test_views_are_accepted_as_they_come():
    """q, k and v as slices of one projection: strided rows, contiguous heads."""
    cu_seqlens, q, k, v, _ = make([5, 90], 4, 2)
    packed = torch.cat([q, k, v], dim=1)
    views = packed.split([4, 2, 2], dim=1)
    assert torch.equal(flash_attention(*views, cu_seqlens, 90), flash_attention(q, k, v, cu_seqlens, 90))


def bad(**changes):
    cu_seqlens, q, k, v, _ = make([3, 2], 4, 2)
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens, "max_seqlen": 3} | changes
    return flash_attention(**arguments)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(5, 64)}, "q must have shape"),
        ({"q": torch.zeros(5, 4, 16, dtype=torch.int64)}, "q must be floating"),
        ({"k": torch.zeros(5, 2, 16)}, "k must be floating point and of one dtype"),
        ({"k": torch.zeros(4, 2, 16).double()}, "k must have q's tokens"),
        ({"k": torch.zeros(5, 2, 8).double()}, "k must have q's tokens and head_dim"),
        ({"v": torch.zeros(5, 1, 16).double()}, "v must have k's shape"),
        ({"v": torch.zeros(5, 2, 16, device="meta").double()}, "v is on meta"),
        ({"k": torch.zeros(5, 3, 16).double(), "v": torch.zeros(5, 3, 16).double()}, "heads of q must be a multiple"),
        ({"q": torch.zeros(5, 16, 4).double().transpose(1, 2)}, "last dimension of q must be contiguous"),
        ({"cu_seqlens": torch.tensor([0, 3, 5])}, "cu_seqlens must be an int32"),
        ({"cu_seqlens": int32()}, "cu_seqlens must be an int32"),
        ({"cu_seqlens": int32(1, 3, 5)}, "cu_seqlens must start at 0"),
        ({"cu_seqlens": int32(0, 4, 3, 5), "max_seqlen": 9}, "cu_seqlens must not decrease"),
        ({"cu_seqlens": int32(0, 3, 4)}, "cu_seqlens must end at"),
        ({"cu_seqlens": int32(0, 3, 6)}, "cu_seqlens must end at"),
        ({"max_seqlen": 2}, "max_seqlen=2"),
        ({"window": (1, 2, 3)}, "window"),
        ({"window": (-2, 0)}, "window"),
        ({"window": (1.5, 0)}, "window"),
        ({"softcap": 0.0}, "softcap"),
        ({"dropout_p": 1.0, "seed": 0}, "dropout_p"),
        ({"dropout_p": 0.1}, "seed"),
        ({"dropout_p": 0.1, "seed": 1.0}, "seed"),
        ({"sample_ids": torch.arange(3)}, "sample_ids"),
        ({"sample_ids": torch.arange(2, dtype=torch.int32)}, "sample_ids"),
        ({"plan": attention_plan(int32(0, 2, 5), 3)}, "plan was made from other cu_seqlens"),
        ({"backend": "cuda"}, "cuda"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        bad(**changes)


def test_plan_of_a_smaller_bound():
    cu_seqlens = int32(0, 3, 5)
    with pytest.raises(ValueError, match="max_seqlen=2"):
        bad(plan=attention_plan(cu_seqlens, 3), max_seqlen=2)


@pytest.mark.parametrize("size", [1.0, 30.0, -30.0, 300.0])
@pytest.mark.parametrize("name", ["plain", "causal", "dropout", "softcap"])
def test_scores_of_any_size(name, size):
    """Narrow softmaxes shift nothing; scores near ±size, where that would overflow or vanish, are shifted."""
    cu_seqlens, q, k, v, d_out = make([7, 3, 12, 20, 7, 1], 6, 2, dtype=torch.float32)
    q, k = q * 0.1, k * 0.1  # every score is size (4²: the scale is 1/4) and a little
    q[..., 0], k[..., 0] = 4.0, size
    exact = oracle(*(x.double() for x in (q, k, v, d_out)), cu_seqlens, OPTIONS[name])
    plain = oracle(q, k, v, d_out, cu_seqlens, OPTIONS[name], dtype=torch.float32)
    got = ours(q, k, v, d_out, cu_seqlens, OPTIONS[name])
    for i in (0, 2, 3, 4):
        error, expected = ((x[i].double() - exact[i]).abs().max() for x in (got, plain))
        assert error <= 2 * expected + 1e-6 * exact[i].abs().max()


@pytest.mark.parametrize(("size", "narrow"), [(1.0, 2), (300.0, 0), (-300.0, 0), (float("nan"), 0)])
def test_which_softmaxes_are_narrow(size, narrow, monkeypatch):
    """Those of the two lengths below a vector, unless a score is out of reach."""
    done, original = [], attention_torch._narrow_softmax
    monkeypatch.setattr(attention_torch, "_narrow_softmax", lambda *a: done.append(original(*a)) or done[-1])
    cu_seqlens, q, k, v, _ = make([7, 20, 12, 7], 6, 2, dtype=torch.float32)
    q[..., 0], k[..., 0] = 4.0, size
    flash_attention(q, k, v, cu_seqlens, 20, return_lse=True)  # always the explicit path
    assert done == [narrow]
