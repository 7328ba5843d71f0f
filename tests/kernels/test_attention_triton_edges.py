"""flash_attention's Triton kernels where it gets narrow: empty rows, the range of fp16, layouts, schedules, offsets."""

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from bivec.kernels.aot_cases import attention_problem
from bivec.kernels.attention import attention_plan, flash_attention
from bivec.kernels.attention_tiles import find_block
from bivec.kernels.attention_triton import LONG, attention_backward_op, attention_op, length_bucket, tile_length
from bivec.kernels.launch import recording

LONG_SEQLEN = 4096  # a max_seqlen that takes the long path, whatever the lengths
GRADIENTS = ("dQ", "dK", "dV")
both_paths = pytest.mark.parametrize("max_seqlen", [32, LONG_SEQLEN], ids=["short", "long"])


@pytest.mark.parametrize(
    ("bucket", "dtype"), [(64, torch.float16), (64, torch.bfloat16), (LONG, torch.float16), (LONG, torch.float32)]
)
@pytest.mark.parametrize(("left", "right"), [(5, -3), (-3, 5), (70, -40)])
def test_rows_without_a_visible_key(left, right, bucket, dtype, attention):
    """No option of flash_attention makes one, but the kernels are promised to survive them: zeros, and lse -inf."""
    lengths = (50, 1, 0, 9)
    inputs = attention.make(lengths, 6, 2, 16, dtype)
    plan = attention_plan(inputs.cu_seqlens, 50)
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out, lse2 = attention_op(
        *leaves, plan.cu_seqlens, plan.starts, plan.order, bucket, 0.25, None, left, right, 0.0, None, None
    )
    gradients = torch.autograd.grad(out, leaves, inputs.d_out)

    exact = [x.detach().double().requires_grad_() for x in leaves]
    parts, empty = [], []
    for q, k, v in zip(*(x.split(lengths) for x in exact), strict=True):
        distance = torch.arange(len(q))[None, :] - torch.arange(len(q))[:, None]
        seen = ((distance >= -left) & (distance <= right)).to(q.device)
        scores = 0.25 * torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(3, dim=1))
        p = scores.masked_fill(~seen, -1e9).softmax(-1) * seen
        parts.append(torch.einsum("hij,jhd->ihd", p, v.repeat_interleave(3, dim=1)))
        empty.append(~seen.any(1))
    expected, empty = torch.cat(parts), torch.cat(empty)
    assert empty.any() and (not empty.all())
    assert (out[empty] == 0).all() and (gradients[0][empty] == 0).all()
    assert (lse2[:, empty] == -torch.inf).all() and lse2[:, ~empty].isfinite().all()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=4 * eps, atol=4 * eps)
    for got, want in zip(gradients, torch.autograd.grad(expected, exact, inputs.d_out.double()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=16 * eps, atol=16 * eps)


def score_gradients(inputs, scale):
    """The largest |dS| of a batch of one sequence with one kv head, in float64."""
    q, k, v, d_out = (x.double() for x in (inputs.q, inputs.k, inputs.v, inputs.d_out))
    p = (scale * torch.einsum("ihd,jd->hij", q, k[:, 0])).softmax(-1)
    d_p = torch.einsum("ihd,jd->hij", d_out, v[:, 0])
    return (p * (d_p - (p * d_p).sum(-1, keepdim=True))).abs().max().item()


def judge_rounding(attention, family, inputs, got, names):
    """Against twice the floor: plain torch overflows here, or loses all bits, and is no measure."""
    exact = attention.oracle(inputs, {})
    floor = attention.rounding(inputs, {}, exact)
    limits = {name: 2 * floor[name] for name in names}
    assert all(exact[name].abs().max() < 65504 for name in names)  # they fit
    attention.judge(family, got, exact, limits, inputs.cu_seqlens)


@both_paths
def test_fp16_scores_gradients_beyond_its_range(max_seqlen, attention):
    """dS passes 65504 where V and dO are large; dQ and dK fit, because K and Q are small."""
    inputs = attention.make((17,), 3, 1, 64, torch.float16)
    inputs.q.mul_(2**-8), inputs.k.mul_(2**-8), inputs.v.mul_(3000).clamp_(-1e4, 1e4), inputs.d_out.mul_(1000)
    assert score_gradients(inputs, 1 / 8) > 10 * 65504
    got = attention.ours(inputs, {}, max_seqlen)
    judge_rounding(attention, "fp16, large dS", inputs, got, ("out", *GRADIENTS))
    plain = attention.oracle(inputs, {}, torch.float16)
    assert not all(plain[name].isfinite().all() for name in GRADIENTS)


@both_paths
def test_fp16_inputs_up_to_1e4(max_seqlen, attention):
    """Scores of 1e8, where fp32 has steps of 8: every row has one probability 1, and dQ = dK = 0.

    Only "finite" is asked of dQ and dK: half a unit in the last place of a stored output reaches them as 1e4. So is of
    the long path's dV: its probabilities come from scores summed in another order than the forward's, a step apart.
    """
    inputs = attention.make((20, 1, 5), 4, 2, 64, torch.float16)
    for x in (inputs.q, inputs.k, inputs.v):
        x.mul_(5000).clamp_(-1e4, 1e4)
    got = attention.ours(inputs, {}, max_seqlen)
    assert all(x.isfinite().all() for x in got.values())
    judge_rounding(attention, "fp16, 1e4", inputs, got, ("out",) if max_seqlen == LONG_SEQLEN else ("out", "dV"))


@both_paths
def test_small_gradients_keep_their_bits_in_fp16(max_seqlen, attention):
    """dO of 1e-6 makes dS of 1e-6, where fp16 has steps of 6e-8; the scale brings dQ and dK back to 1e-4."""
    inputs = attention.make((20, 3), 4, 2, 64, torch.float16)
    inputs.q.mul_(2**-8), inputs.k.mul_(2**-8), inputs.v.mul_(10), inputs.d_out.mul_(1e-6)
    options = {"softmax_scale": 2.0**13}
    got = attention.ours(inputs, options, max_seqlen)
    exact = attention.oracle(inputs, options)
    plain = attention.oracle(inputs, options, torch.float16)
    for name in ("dQ", "dK"):
        error, theirs = ((x[name].double() - exact[name]).abs().max() for x in (got, plain))
        assert error <= 2 * torch.finfo(torch.float16).eps * exact[name].abs().max()
        assert error <= theirs / 4


@both_paths
@pytest.mark.parametrize("layout", ["slices of one projection", "head-major"])
def test_layouts_change_nothing(layout, max_seqlen, attention):
    """With a gradient that is a transposed view."""
    inputs = attention.make((5, 20), 4, 2, 16, torch.float16)
    contiguous = attention.ours(inputs, {}, max_seqlen)
    operands = (inputs.q, inputs.k, inputs.v)
    if layout == "head-major":
        q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in operands)
        assert q.stride() == (16, 25 * 16, 1)
    else:
        q, k, v = torch.cat(operands, dim=1).split([4, 2, 2], dim=1)
    d_out = inputs.d_out.transpose(0, 1).contiguous().transpose(0, 1)
    assert not q.is_contiguous() and not d_out.is_contiguous()
    views = type(inputs)(inputs.cu_seqlens, q, k, v, d_out)
    got = attention.ours(views, {}, max_seqlen)
    for name in contiguous:
        assert torch.equal(got[name], contiguous[name]), name


@both_paths
def test_an_expanded_gradient(max_seqlen, attention):
    """That of ``out.sum()``, all strides 0."""
    inputs = attention.make((5, 20), 4, 2, 16, torch.float16)
    ones = type(inputs)(inputs.cu_seqlens, inputs.q, inputs.k, inputs.v, torch.ones_like(inputs.d_out))
    expected = attention.ours(ones, {}, max_seqlen)
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    flash_attention(*leaves, inputs.cu_seqlens, max_seqlen, backend="triton").sum().backward()
    for name, leaf in zip(GRADIENTS, leaves, strict=True):
        assert torch.equal(leaf.grad, expected[name])


def every_second(x):
    """The values of ``x`` with those of its reverse between them."""
    spaced = torch.stack([x, x.flip(0)], dim=1).flatten()[::2]
    assert torch.equal(spaced, x) and spaced.stride() == (2,)
    return spaced


@both_paths
@pytest.mark.parametrize("expanded", [False, True], ids=["every second id", "one id expanded"])
def test_strides_of_bounds_and_ids_change_nothing(expanded, max_seqlen, attention):
    inputs = attention.make((5, 0, 19), 4, 2, 16, torch.float16)
    ids = torch.tensor([9, 9, 9] if expanded else [7, 2, 5], device=attention.device)
    noise = {"dropout_p": 0.3, "seed": 5}
    expected = attention.ours(inputs, noise | {"sample_ids": ids}, max_seqlen)
    strided = every_second(inputs.cu_seqlens)
    inputs = type(inputs)(strided, inputs.q, inputs.k, inputs.v, inputs.d_out)
    noise["sample_ids"] = ids[:1].expand(3) if expanded else every_second(ids)
    for plan in (None, attention_plan(strided, max_seqlen)):
        got = attention.ours(inputs, noise | {"plan": plan}, max_seqlen)
        for name in expected:
            assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("max_seqlen", [0, 1, LONG_SEQLEN])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens(lengths, max_seqlen, attention):
    inputs = attention.make(lengths, 4, 2, 16, torch.float16)
    for options in ({}, {"causal": True, "dropout_p": 0.5, "seed": 1}):
        got = attention.ours(inputs, options, max_seqlen)
        assert got["lse"].shape == (4, 0)
        assert [got[name].shape for name in ("out", *GRADIENTS)] == [(0, 4, 16), (0, 4, 16), (0, 2, 16), (0, 2, 16)]


@pytest.mark.parametrize("max_seqlen", [1, LONG_SEQLEN])
def test_sequences_of_one_return_their_values(max_seqlen, attention):
    inputs = attention.make((1, 1, 1), 4, 2, 16, torch.bfloat16)
    got = attention.ours(inputs, {"causal": True}, max_seqlen)
    assert torch.equal(got["out"], inputs.v.repeat_interleave(2, dim=1))
    attention.check("sequences of one", inputs, {"dropout_p": 0.5, "seed": 3}, max_seqlen)


def test_one_sequence_longer_than_all_others_together(attention):
    inputs = attention.make((2, 0, 150, 1, 3, 0, 2), 3, 1, 16, torch.float32)
    attention.check("one long sequence", inputs, {"window": (40, 20)}, LONG_SEQLEN)


@both_paths
def test_a_plan_and_a_huge_bound_change_nothing(max_seqlen, attention):
    inputs = attention.make((5, 0, 19), 4, 2, 16, torch.float16)
    plan = attention_plan(inputs.cu_seqlens, max_seqlen)
    for options in ({}, {"window": (2, 3), "dropout_p": 0.2, "seed": 1}):
        without = attention.ours(inputs, options, max_seqlen)
        with_plan = attention.ours(inputs, options | {"plan": plan}, max_seqlen)
        assert all(torch.equal(without[name], with_plan[name]) for name in without)
    long = attention.ours(inputs, options, LONG_SEQLEN)
    huge = attention.ours(inputs, options, 2**40)
    assert all(torch.equal(long[name], huge[name]) for name in long)


@pytest.mark.parametrize("window", [(2**31 - 2, 3), (3, 2**31 - 2), (2**40, 2**40)], ids=str)
def test_huge_windows_see_everything_on_that_side(window, attention):
    inputs = attention.make((5, 0, 19), 4, 2, 16, torch.float16)
    unbounded = tuple(-1 if edge > 2**30 else edge for edge in window)
    expected = attention.ours(inputs, {"window": unbounded}, LONG_SEQLEN)
    got = attention.ours(inputs, {"window": window}, 2**41)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=2e-3, atol=2e-3)


@triton.jit
def count_visits(visits_ptr, starts_ptr, order_ptr, num_sequences, most, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: slots. Counts in ``[sequences, most]`` who is visited."""
    sequence, block = find_block(tl.program_id(0), starts_ptr, order_ptr, num_sequences, GROUP, BLOCK)
    tl.atomic_add(visits_ptr + sequence * most + block, 1)


@pytest.mark.parametrize(("group", "block"), [(1, 16), (3, 16), (8, 64)])
@pytest.mark.parametrize("kind", ["random", "more than 256", "one long", "equal to the block", "mostly empty"])
def test_every_block_of_every_sequence_has_one_slot(kind, group, block, attention):
    g = torch.Generator().manual_seed(1)
    lengths = {
        "random": torch.randint(0, 90, (20,), generator=g),
        "more than 256": torch.randint(1, 3, (300,), generator=g),
        "one long": torch.tensor([1, 2, 600, 3]),
        "equal to the block": torch.tensor([block, 2 * block, block, 0]),
        "mostly empty": torch.randint(0, 12, (40,), generator=g).sub(9).clamp(min=0),
    }[kind]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(attention.device)
    plan = attention_plan(cu_seqlens, 1000)
    total, sequences = int(lengths.sum()), len(lengths)
    slots = total * group // block + sequences  # Problem.slots, see test_launches_follow_the_tokens
    visits = torch.zeros(sequences, slots + 1, dtype=torch.int32, device=attention.device)
    count_visits[(slots,)](visits, plan.starts, plan.order, sequences, slots + 1, GROUP=group, BLOCK=block)
    blocks = -(-lengths * group // block)
    needed = torch.arange(slots + 1)[None, :] < blocks[:, None]
    assert (visits.cpu()[needed] == 1).all()
    assert visits.sum() == slots


def test_launches_follow_the_tokens_and_not_the_longest_sequence(attention):
    """8192 tokens and 999 sequences of 2: no padded grid."""
    lengths = torch.tensor([2] * 500 + [8192] + [2] * 499)
    heads, kv_heads, head_dim = 32, 8, 128
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(attention.device)
    total, sequences = int(cu_seqlens[-1]), len(lengths)
    plan = attention_plan(cu_seqlens, 8192)
    q, k, v = (
        torch.empty(total, h, head_dim, dtype=torch.bfloat16, device=attention.device)
        for h in (heads, kv_heads, kv_heads)
    )
    with recording("sm_90") as launches:
        out, lse = flash_attention(q, k, v, cu_seqlens, 8192, plan=plan, return_lse=True, backend="triton")
        # not by autograd, which runs a GPU's backward in a thread of its own, where nothing is recorded
        schedule = (plan.cu_seqlens, plan.starts, plan.order, LONG)
        attention_backward_op(out, q, k, v, out, lse, *schedule, 0.1, None, None, None, 0.0, None, None)
    assert [launch.kernel.__name__ for launch in launches] == [
        "attention_forward",
        "attention_backward_q",
        "attention_backward_kv",
    ]
    for launch, rows in zip(launches, ("BLOCK_M", "BLOCK_M", "BLOCK_N"), strict=True):
        block = launch.arguments[rows]
        per_token = 1 if rows == "BLOCK_N" else heads // kv_heads
        assert launch.grid == (kv_heads * (total * per_token // block + sequences),)
        assert launch.grid[0] < kv_heads * sequences * (8192 * per_token // block) / 50


SPREADS = {  # lengths, and the strides of a token and of a head, in elements
    "tokens": ((30, 30, 30, 30, 30, 20), 2**24 - 64, 16),  # the last that int32 spans in a tile: tokens 128 and up
    "tokens of one sequence": ((150, 2), 2**24 - 64, 16),
    "distant tokens": ((20, 13, 2), 2**26, 16),
    "heads": ((20, 13, 2), 16, 2**30),
    "tokens and heads together": ((100, 2), 2**24 - 64, 2**29),
}


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize(
    ("spread", "path"),
    [("tokens", "short"), ("tokens of one sequence", "long"), *product(list(SPREADS)[2:], ("short", "long"))],
)
def test_offsets_beyond_2_31_elements(spread, which, path, attention):
    """Something of every operand begins behind 2^31; 32 bits would land 2^32 elements before.

    The memory is reserved and hardly touched. It begins 2^31 elements before the tensor, so that wrong offsets read
    zeros or another token instead of ending the process.
    """
    lengths, token_stride, head_stride = SPREADS[spread]
    inputs = attention.make(lengths, 3, 3, 16, torch.float16)
    max_seqlen = max(lengths) if path == "short" else LONG_SEQLEN
    before, last = 2**31, (sum(lengths) - 1) * token_stride + 2 * head_stride
    assert last >= 2**31
    try:
        memory = torch.empty(before + last + 16, dtype=torch.float16, device=attention.device)
    except RuntimeError:
        pytest.skip("10 GB of address space cannot be reserved")
    x = getattr(inputs, which)
    far = memory.as_strided(x.shape, (token_stride, head_stride, 1), before)
    far.copy_(x)
    expected = attention.ours(inputs, {}, max_seqlen)
    fields = {name: getattr(inputs, name) for name in ("cu_seqlens", "q", "k", "v", "d_out")}
    got = attention.ours(type(inputs)(**(fields | {which: far})), {}, max_seqlen)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize(
    ("arch", "head_dim", "dtype", "longest"),
    [
        ("sm_80", 64, torch.bfloat16, 128),
        ("sm_80", 128, torch.float16, 64),
        ("sm_80", 256, torch.bfloat16, 0),
        ("sm_90", 128, torch.bfloat16, 128),
        ("sm_90", 256, torch.bfloat16, 0),
        ("sm_100", 80, torch.bfloat16, 128),
        ("sm_100", 256, torch.float16, 64),
        ("gfx942", 256, torch.bfloat16, 64),
        ("sm_90", 64, torch.float32, 0),
    ],
)
def test_which_sequences_take_the_short_path(arch, head_dim, dtype, longest):
    problem = attention_problem(dtype, head_dim)
    with recording(arch):
        for max_seqlen in (1, 16, 63, 64, 65, 127, 128, 129, 4096):
            expected = next((tile for tile in (64, 128) if max_seqlen <= tile <= longest), LONG)
            assert tile_length(problem, length_bucket(max_seqlen)) == expected, max_seqlen
