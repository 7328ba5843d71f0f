"""segment_pool against the span-by-span statement in kernels/reference.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bivec.kernels import reference as ref
from bivec.kernels import segment_pool

MODES = ["mean", "weighted_mean", "first", "last"]
CU_SEQLENS = torch.tensor([0, 5, 5, 6, 37, 37, 44], dtype=torch.int32)  # two empty; one longer than all the others
T, D = 44, 13
FLOOR = 1e-6


def overlapping_spans():
    starts = torch.tensor([0, 0, 3, 3, 44, 43, 10, 0, 7])
    ends = torch.tensor([44, 5, 9, 9, 44, 44, 10, 0, 8])
    return {"span_starts": starts, "span_ends": ends}


def run(function, hidden, dtype=torch.float32, **options):
    """Pools and goes back with a fixed gradient that was rounded to ``dtype`` once."""
    hidden = hidden.detach().clone().requires_grad_()
    out = function(hidden, CU_SEQLENS, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(out.dtype)
    out.backward(upstream)
    return out.detach(), hidden.grad


def relative_error(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spans", [{}, overlapping_spans()], ids=["sequences", "overlapping"])
def test_matches_float64(mode, dtype, spans):
    hidden = torch.randn(T, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = run(segment_pool, hidden, dtype, mode=mode, **spans)
    plain = run(ref.segment_pool, hidden, dtype, mode=mode, **spans)
    truth = run(ref.segment_pool, hidden.double(), dtype, mode=mode, **spans)
    assert ours[0].dtype == ours[1].dtype == dtype
    for value, same_dtype, exact in zip(ours, plain, truth, strict=True):
        assert relative_error(value, exact) <= 2 * relative_error(same_dtype, exact) + FLOOR


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spans", [False, True])
def test_gradcheck(mode, spans):
    hidden = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    cu_seqlens = torch.tensor([0, 4, 4, 9])
    options = {"span_starts": torch.tensor([1, 0, 9, 3]), "span_ends": torch.tensor([6, 9, 9, 4])} if spans else {}
    torch.autograd.gradcheck(lambda h: segment_pool(h, cu_seqlens, mode=mode, **options), (hidden,))


@given(data=st.data(), length=st.integers(1, 20), mode=st.sampled_from(MODES))
@settings(max_examples=60, deadline=None)
def test_any_spans(data, length, mode):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, length), st.integers(0, length)).map(sorted), max_size=12))
    starts, ends = (torch.tensor([p[i] for p in pairs], dtype=torch.int64) for i in (0, 1))
    hidden = torch.randn(length, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    options = {"mode": mode, "span_starts": starts, "span_ends": ends}
    cu_seqlens = torch.tensor([0, length])
    grads = []
    for function in (segment_pool, ref.segment_pool):
        x = hidden.clone().requires_grad_()
        out = function(x, cu_seqlens, **options)
        (out.sin().sum() + 0 * x.sum()).backward()
        grads.append((out.detach(), x.grad))
    for ours, exact in zip(*grads, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_pool(mode):
    empty = torch.zeros(0, D, requires_grad=True)
    out = segment_pool(empty, torch.tensor([0, 0, 0]), mode=mode)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, D)) and empty.grad.shape == (0, D)
    hidden = torch.ones(4, D, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    out = segment_pool(hidden, torch.tensor([0, 4]), mode=mode, span_starts=none, span_ends=none)
    out.sum().backward()
    assert out.shape == (0, D) and (hidden.grad == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_empty_span_reads_nothing(mode):
    hidden = torch.full((3, 2), float("nan"))
    hidden[1] = 1.0
    starts, ends = torch.tensor([0, 3, 1, 2]), torch.tensor([0, 3, 2, 2])
    out = segment_pool(hidden, torch.tensor([0, 3]), mode=mode, span_starts=starts, span_ends=ends)
    assert torch.equal(out, torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))


def test_long_bf16_span_is_summed_in_fp32():
    hidden = torch.ones(5000, 2, dtype=torch.bfloat16)  # a bf16 running sum of ones stops at 256
    for mode in ("mean", "weighted_mean"):
        assert (segment_pool(hidden, torch.tensor([0, 5000]), mode=mode) == 1).all()


def test_repeated_runs_are_bit_identical():
    hidden = torch.randn(T, D)
    first, second = (run(segment_pool, hidden, mode="weighted_mean", **overlapping_spans()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(T)}, r"hidden must be \[T, D\]"),
        ({"mode": "max"}, "mode must be one of"),
        ({"span_starts": torch.tensor([0])}, "come together"),
        ({"span_starts": torch.tensor([0]), "span_ends": torch.tensor([1, 2])}, "one pair a span"),
        ({"span_starts": torch.tensor([0]), "span_ends": torch.tensor([T + 1])}, r"span 0 is \[0, 45\)"),
        ({"span_starts": torch.tensor([0, 3]), "span_ends": torch.tensor([1, 2])}, r"span 1 is \[3, 2\)"),
        ({"span_starts": torch.tensor([0.0]), "span_ends": torch.tensor([1.0])}, "int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "from 0 to T=44"),
        ({"cu_seqlens": torch.tensor([0, 20, 10, T])}, "falls in between"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "it is empty"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"hidden": torch.zeros(T, D), "cu_seqlens": CU_SEQLENS} | change
    with pytest.raises(ValueError, match=message):
        segment_pool(arguments.pop("hidden"), arguments.pop("cu_seqlens"), **arguments)
