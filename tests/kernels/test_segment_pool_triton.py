"""The Triton backend of segment_pool against float64; inside torch; and where offsets and memory get narrow."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from bivec.kernels import BackendError, segment_pool
from bivec.kernels import reference as ref
from bivec.kernels.aot_cases_segment_pool import cases
from bivec.kernels.backend import TRITON_DTYPES
from bivec.kernels.launch import recording
from bivec.kernels.segment_pool import MODES
from bivec.kernels.segment_pool_triton import backward, forward, pool, segment_pool_backward_op, segment_pool_op
from bivec.kernels.tuning import ARCHITECTURES, Config, config_of, overriding, read_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = (5, 0, 1, 31, 0, 7)  # two empty; one longer than a tile and all the others
T, D = sum(LENGTHS), 13
CU_SEQLENS = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0).int()
FLOOR = 2**-22  # relative, Frobenius: two roundings of fp32


def spans_of(*pairs, dtype=torch.int64):
    starts, ends = torch.tensor(pairs, dtype=dtype, device=DEVICE).reshape(-1, 2).unbind(1)
    return {"span_starts": starts, "span_ends": ends}


SPANS = {
    "sequences": {},
    "overlapping": spans_of((0, 44), (0, 5), (3, 9), (3, 9), (44, 44), (43, 44), (10, 10), (0, 0), (7, 8)),
    "nested, backwards": spans_of((40, 44), (12, 13), (11, 14), (10, 15), (4, 38), (0, 44), dtype=torch.int32),
    "leaving out": spans_of((20, 23), (2, 4), (31, 32), (20, 23)),
    "one": spans_of((3, 40), dtype=torch.int32),
    "empty ones": spans_of((7, 7), (0, 0), (44, 44)),
    "none": spans_of(),
}


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def run(function, hidden, d_out, **options):
    """Output and gradient."""
    hidden = hidden.detach().requires_grad_()
    out = function(hidden, CU_SEQLENS, **options)
    return out.detach(), *torch.autograd.grad(out, hidden, d_out.to(out.dtype))


def plain(hidden, cu_seqlens, **options):
    """The reference, which is written for the CPU, connected to ``hidden`` also where no span takes a token."""
    options = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return ref.segment_pool(hidden.cpu(), cu_seqlens.cpu(), **options).to(hidden.device) + 0 * hidden.sum()


def error(found, exact):
    """Relative, Frobenius; where the exact values are all 0 there is none to be found."""
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def d_out_for(spans, dtype):
    count = len(LENGTHS) if not spans else len(spans["span_starts"])
    return randn(count, D, dtype=dtype, seed=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_matches_float64(spans, dtype, mode):
    hidden, d_out = randn(T, D, dtype=dtype), d_out_for(spans, dtype)
    ours = run(segment_pool, hidden, d_out, mode=mode, backend="triton", **spans)
    same_dtype = run(plain, hidden, d_out, mode=mode, **spans)
    exact = run(plain, hidden.double(), d_out, mode=mode, **spans)
    assert ours[0].dtype == ours[1].dtype == dtype
    assert ours[0].shape == exact[0].shape and ours[1].shape == hidden.shape
    for name, found, torchs, truth in zip(("out", "gradient"), ours, same_dtype, exact, strict=True):
        limit = 2 * error(torchs, truth) + FLOOR
        assert error(found, truth) <= limit, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_both_backends_agree(spans, mode):
    """To the rounding of fp32, whose sums they form in different orders; what one token alone makes is equal."""
    hidden, d_out = randn(T, D), d_out_for(spans, torch.float32)
    ours, torchs = (run(segment_pool, hidden, d_out, mode=mode, backend=b, **spans) for b in ("triton", "torch"))
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if mode in ("first", "last"):
        assert torch.equal(ours[0], torchs[0])
    again = run(segment_pool, hidden, d_out, mode=mode, backend="triton", **spans)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@given(data=st.data(), length=st.integers(1, 40), mode=st.sampled_from(MODES), block_t=st.sampled_from([1, 4, 16]))
@settings(max_examples=40, deadline=None)
def test_any_spans(data, length, mode, block_t):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, length), st.integers(0, length)).map(sorted), max_size=12))
    hidden, cu_seqlens = randn(length, 3, seed=3), torch.tensor([0, length], device=DEVICE)
    found = []
    config = Config({"BLOCK_T": block_t, "BLOCK_D": 4}, num_warps=1, num_stages=1)
    for function, x, options in (
        (segment_pool, hidden.clone(), {"backend": "triton"}),
        (plain, hidden.double(), {}),
    ):
        x.requires_grad_()
        with overriding({"segment_pool_forward": config, "segment_pool_backward": config}):
            out = function(x, cu_seqlens, mode=mode, **options, **spans_of(*pairs))
            (out.sin().sum() + 0 * x.sum()).backward()
        found.append((out.detach().double(), x.grad.double()))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_pool(mode):
    empty = torch.zeros(0, D, device=DEVICE, requires_grad=True)
    out = segment_pool(empty, torch.zeros(3, dtype=torch.int32, device=DEVICE), mode=mode, backend="triton")
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out)) and out.shape == (2, D) and empty.grad.shape == (0, D)
    narrow = torch.zeros(T, 0, device=DEVICE, requires_grad=True)
    out = segment_pool(narrow, CU_SEQLENS, mode=mode, backend="triton")
    out.sum().backward()
    assert out.shape == (len(LENGTHS), 0) and narrow.grad.shape == (T, 0)


@pytest.mark.parametrize("mode", MODES)
def test_what_no_span_holds_is_not_touched(mode):
    """NaN outside of the spans, and in the gradients of empty ones, goes nowhere."""
    hidden = torch.full((T, D), torch.nan, device=DEVICE)
    hidden[17:19] = 1.0
    spans = spans_of((0, 0), (17, 19), (18, 18), (T, T))
    d_out = torch.full((4, D), torch.nan, device=DEVICE)
    d_out[1] = 1.0
    out, gradient = run(segment_pool, hidden, d_out, mode=mode, backend="triton", **spans)
    assert (out[1] == 1).all() and (out[[0, 2, 3]] == 0).all()
    assert gradient.isfinite().all() and gradient[17:19].any() and not gradient[:17].any() and not gradient[19:].any()


def test_long_bf16_spans_are_summed_in_fp32():
    length = 2000  # a bf16 running sum of ones stops at 256
    hidden, bounds = torch.ones(length, 2, dtype=torch.bfloat16, device=DEVICE), torch.tensor([0, length]).to(DEVICE)
    for mode in ("mean", "weighted_mean"):
        assert (segment_pool(hidden, bounds, mode=mode, backend="triton") == 1).all()
    short = hidden[:2].detach().requires_grad_()
    many = spans_of(*[(0, 1)] * 300)
    out = segment_pool(
        short, bounds.clamp_max(2), span_starts=many["span_starts"], span_ends=many["span_ends"], backend="triton"
    )
    out.sum().backward()
    assert short.grad.tolist() == [[300.0] * 2, [0.0] * 2]


@pytest.mark.parametrize("spans", [SPANS["sequences"], SPANS["overlapping"]], ids=["sequences", "overlapping"])
def test_layouts(spans):
    """Rows further apart than D, columns that are not neighbours, a broadcast gradient, spans with strides."""
    wide = randn(T, 3 * D)
    d_out = d_out_for(spans, torch.float32)
    strided = {name: torch.stack([x, x], 1)[:, 0] for name, x in spans.items()}
    for hidden in (wide[:, D : 2 * D], wide[:, ::3], randn(D, T).t(), randn(1, D).expand(T, D)):
        for upstream in (d_out, d_out[:1, :1].expand_as(d_out), d_out.t().contiguous().t()):
            expected = run(segment_pool, hidden.contiguous(), upstream.contiguous(), backend="triton", **spans)
            found = run(segment_pool, hidden, upstream, backend="triton", **strided)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_offsets_beyond_2_31_elements():
    """Rows 2^26 elements apart: the later ones begin behind 2^31. The memory is reserved and hardly touched."""
    rows, stride = 40, 2**26
    try:
        memory = torch.empty(2**31 + rows * stride, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("there is no room for 9 GB")
    far = memory.as_strided((rows, 4), (stride, 1), 2**31)
    near = randn(rows, 4, dtype=torch.float16)
    far.copy_(near)
    starts, ends = torch.tensor([0, 33, 30]).to(DEVICE), torch.tensor([40, 40, 31]).to(DEVICE)
    assert torch.equal(pool(far, starts, ends, "mean", False), pool(near, starts, ends, "mean", False))
    d_out = far[:40]
    each = torch.arange(rows, device=DEVICE)
    assert torch.equal(segment_pool_backward_op(d_out, each, each + 1, rows, False, True), near)


def operands(spans, dtype=torch.float32):
    bounds = (CU_SEQLENS[:-1], CU_SEQLENS[1:]) if not spans else (spans["span_starts"], spans["span_ends"])
    return randn(T, D, dtype=dtype), *bounds


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("spans", [SPANS["sequences"], SPANS["overlapping"]], ids=["sequences", "overlapping"])
def test_opcheck(spans, weighted):
    """Schema, fake tensors, autograd registration, and tracing with static and dynamic shapes."""
    hidden, starts, ends = operands(spans)
    torch.library.opcheck(segment_pool_op, (hidden.requires_grad_(), starts, ends, weighted, not spans))
    d_out = d_out_for(spans, torch.float32)
    torch.library.opcheck(segment_pool_backward_op, (d_out, starts, ends, T, weighted, not spans))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spans", [SPANS["sequences"], SPANS["overlapping"]], ids=["sequences", "overlapping"])
def test_compiled_as_one_graph_it_is_the_same(spans, mode):
    torch._dynamo.reset()

    def layer(hidden, cu_seqlens, **options):
        return 3 * segment_pool(2 * hidden, cu_seqlens, mode=mode, backend="triton", **options)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    arguments = randn(T, D, dtype=torch.bfloat16), d_out_for(spans, torch.bfloat16)
    expected = run(layer, *arguments, **spans)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, *arguments, **spans), expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    def layer(hidden, cu_seqlens):
        return segment_pool(hidden.sin(), cu_seqlens, backend="triton").cos()

    found = []
    for function in (layer, lambda *x: checkpoint(layer, *x, use_reentrant=reentrant)):
        hidden = randn(T, D).requires_grad_()
        out = function(hidden, CU_SEQLENS)
        out.backward(d_out_for({}, torch.float32))
        found.append((out.detach(), hidden.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_is_saved_but_the_bounds():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        segment_pool(randn(T, D).requires_grad_(), CU_SEQLENS, backend="triton")
    assert [(x.shape, x.dtype) for x in saved] == [((len(LENGTHS),), torch.int32)] * 2


@pytest.mark.skipif(DEVICE.type != "cuda", reason="without a GPU the test below says the same")
def test_nothing_stalls_a_gpu(monkeypatch):
    monkeypatch.delenv("BIVEC_CHECK", raising=False)
    hidden = randn(T, D).requires_grad_()

    def step():
        for spans in (SPANS["sequences"], SPANS["overlapping"]):
            segment_pool(hidden, CU_SEQLENS, backend="triton", **spans).sum().backward()

    step()  # compiles and loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hidden.grad.isfinite().all()


def test_no_value_is_read_and_sequences_need_no_sort():
    """Tensors without values can be launched, in two launches; spans of sequences go in as they are."""
    hidden, starts, ends = (x.to("meta") for x in operands({}))
    with recording("sm_90") as launches:
        for in_order in (True, False):
            out = forward(hidden, starts, ends, weighted=False)
            backward(out, starts, ends, T, weighted=False, in_order=in_order)
    assert len(launches) == 4 and launches[0].grid[0] == len(LENGTHS)
    plain, ordered = launches[1].arguments, launches[3].arguments
    assert plain["order_ptr"] is None and plain["starts_ptr"] is starts and plain["reach_ptr"] is ends
    assert ordered["order_ptr"].shape == starts.shape


def test_bad_spans_are_refused(monkeypatch):
    monkeypatch.setenv("BIVEC_CHECK", "1")
    for spans in (spans_of((0, T + 1)), spans_of((-1, 3)), spans_of((4, 3))):
        with pytest.raises(ValueError, match="span 0 is"):
            segment_pool(randn(T, D), CU_SEQLENS, backend="triton", **spans)


def test_float64_is_refused():
    with pytest.raises(BackendError, match=r'^segment_pool: .*float64.*backend="torch"'):
        segment_pool(randn(T, D).double(), CU_SEQLENS, backend="triton")


def test_on_a_cpu_the_interpreter_is_needed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        segment_pool(torch.zeros(4, 2), torch.tensor([0, 4]), backend="triton")


def test_the_table_has_every_row():
    keys = [(row["kernel"], row["arch"], row["key"]["itemsize"]) for row in read_table("segment_pool")]
    kernels = ("segment_pool_backward", "segment_pool_forward")
    assert sorted(keys) == sorted(product(kernels, ARCHITECTURES, (2, 4)))
    for row in read_table("segment_pool"):
        assert row["compiled"]["spills"] == 0 and 0 < row["compiled"]["registers"] <= 128


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_what_is_compiled_ahead_of_time_uses_every_row(target):
    with recording(target) as launches:
        for case in cases():
            case.call()
    rows = [row for row in read_table("segment_pool") if row["arch"] == target]
    found = {(x.kernel.__name__, x.arguments["BLOCK_T"], x.arguments["BLOCK_D"], x.num_warps) for x in launches}
    table = {(r["kernel"], *config_of(r).blocks.values(), config_of(r).num_warps) for r in rows}
    assert found == table and len(launches) == 6
