"""flash_attention's Triton kernels against the float64 oracle: accuracy, dropout, and determinism.

The criterion is ``AttentionTests.limits``: at most twice the error of plain torch in the same dtype, plus a floor.
"""

from contextlib import nullcontext
from functools import cache
from itertools import combinations, product

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from bivec.kernels.attention import attention_dropout_mask, flash_attention
from bivec.kernels.dropout import drop_threshold, seed_tensor
from bivec.kernels.dropout_triton import attention_row_keys, kept
from bivec.kernels.launch import architecture, interpreting, recording
from bivec.kernels.tuning import Config, overriding

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 5)},
    "softcap": {"softcap": 1.5},
    "dropout": {"dropout_p": 0.3, "seed": 5},
    "all": {"causal": True, "window": (9, 3), "softcap": 2.0, "dropout_p": 0.5, "seed": 7, "softmax_scale": 0.4},
}
FACTORS = {
    "option": tuple(OPTIONS),
    "head_dim": (16, 64, 80, 96, 128, 256),
    "lengths": ((0, 1, 2, 15), (16, 0, 17), (127, 1), (2, 128), (129, 0), (15, 300)),
    "heads": ((2, 2), (6, 2), (4, 1), (8, 1)),  # query and kv heads: groups of 1, 3, 4, 8
    "dtype": (torch.float16, torch.bfloat16, torch.float32),
    "path": ("short", "long"),
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="takes hours in the interpreter")
LONG_SEQLEN = 4096  # a max_seqlen that takes the long path, whatever the lengths
LONG_KERNELS = ("forward", "backward_q", "backward_kv")
SHORT_KERNELS = ("short_forward", "short_backward")
# A max_seqlen and a dtype; the short path takes half types only, and fp32 shows small errors best.
RUNS = pytest.mark.parametrize(
    ("max_seqlen", "dtype"), [(64, torch.float16), (LONG_SEQLEN, torch.float32)], ids=["short", "long"]
)
# Given tiles, as in the interpreter, the short path takes fp32 too.
RUNS_OF_SMALL_TILES = pytest.mark.parametrize(
    ("max_seqlen", "dtype"),
    [(64, torch.float16), (64, torch.float32), (LONG_SEQLEN, torch.float32)],
    ids=["short", "short fp32", "long"],
)


@cache
def takes_short_path(max_seqlen, head_dim, dtype, arch=None):
    """Which kernel flash_attention launches: the tuning tables say which short tiles there are."""
    x = torch.zeros(1, 1, head_dim, dtype=dtype, device=DEVICE)
    with recording(arch or architecture(DEVICE)) as launches:
        flash_attention(x, x, x, torch.tensor([0, 1], dtype=torch.int32, device=DEVICE), max_seqlen, backend="triton")
    return launches[0].kernel.__name__ == "attention_short_forward"


def possible(case):
    return case["path"] == "long" or takes_short_path(max(case["lengths"]), case["head_dim"], case["dtype"])


def full_product():
    cases = (dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values()))
    return [case for case in cases if possible(case)]


def pairwise():
    """Few cases in which any two values of two factors meet, if they can: greedy, so the same list every time."""
    pairs = [(case, set(combinations(case.items(), 2))) for case in full_product()]
    missing, chosen = set().union(*(pair for _, pair in pairs)), []
    while missing:
        case, covered = max(pairs, key=lambda entry: len(entry[1] & missing))
        chosen.append(case)
        missing -= covered
    return chosen


def describe(case):
    return "-".join(str(value).removeprefix("torch.").replace(" ", "") for value in case.values())


def tiles(block_m, block_n):
    """The same tiles for all kernels; the tile of a short sequence is as long as its bucket, which is no tuning."""
    long = {f"attention_{kernel}": {"BLOCK_M": block_m, "BLOCK_N": block_n} for kernel in LONG_KERNELS}
    short = {f"attention_{kernel}": {"BLOCK_M": block_m} for kernel in SHORT_KERNELS}
    return overriding({kernel: Config(blocks, 4, 1) for kernel, blocks in (long | short).items()})


def needs_given_tiles(max_seqlen, dtype):
    """Skips the short path in fp32 on a GPU, where it would be the long path once more."""
    if dtype == torch.float32 and max_seqlen != LONG_SEQLEN and not interpreting():
        pytest.skip("the tables have no short tiles for fp32, which would not fit a GPU's registers")


def check_case(attention, family, case):
    inputs = attention.make(case["lengths"], *case["heads"], case["head_dim"], case["dtype"])
    longest = max(case["lengths"])
    # A step costs the interpreter the same whatever the tile, so it walks over long sequences in large ones.
    with tiles(128, 128) if interpreting() and longest > 64 else nullcontext():
        attention.check(family, inputs, OPTIONS[case["option"]], longest if case["path"] == "short" else LONG_SEQLEN)


def family_of(case):
    return f"{case['path']} path, {case['dtype']}"


@pytest.mark.parametrize("case", pairwise(), ids=describe)
def test_error_is_at_most_twice_that_of_plain_torch(case, attention):
    check_case(attention, family_of(case), case)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("path", FACTORS["path"])
@pytest.mark.parametrize("dtype", FACTORS["dtype"], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_error_is_at_most_twice_that_of_plain_torch_in_the_full_product(option, dtype, path, attention):
    for case in full_product():
        if (case["option"], case["dtype"], case["path"]) == (option, dtype, path):
            check_case(attention, f"{family_of(case)}, full product", case)


REAL_SIZES = [((128,) * 64, (32, 8), 128), ((512,) * 8, (32, 8), 128), ((8192,), (32, 8), 128)]


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.1, "seed": 3}], ids=["plain", "dropout"])
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim"),
    [
        ((40, 9), (4, 2), 16),  # the interpreter's, so that no line runs first on a GPU
        *(pytest.param(*size, marks=(pytest.mark.gpu, needs_gpu)) for size in REAL_SIZES),
    ],
    ids=["tiny", "128 x 64", "512 x 8", "8192"],
)
def test_error_at_real_sizes(lengths, heads, head_dim, options, attention):
    """The whole batch at once, judged by one kv head after the other: 8192 tokens of one with its 4 query heads make
    2 GB of float64 probabilities, of which the oracle holds several; of all 32 query heads they would be 17 GB.
    """
    inputs = attention.make(lengths, *heads, head_dim, torch.bfloat16)
    results = attention.ours(inputs, options, max(lengths))
    masks = attention_dropout_mask(options["seed"], inputs.cu_seqlens, heads[0], 0.1) if options else None
    group = heads[0] // heads[1]
    for head in range(heads[1]):
        query, key = slice(head * group, (head + 1) * group), slice(head, head + 1)
        d_out, q, k, v = inputs.d_out[:, query], inputs.q[:, query], inputs.k[:, key], inputs.v[:, key]
        part = type(inputs)(inputs.cu_seqlens, q, k, v, d_out)
        kept_here = {"dropout_p": 0.1, "keep_masks": [mask[query] for mask in masks]} if masks else {}
        exact, limits = attention.limits(part, kept_here)
        got = {name: results[name][:, query if name in ("out", "dQ") else key] for name in limits}
        attention.judge(f"real sizes, {max(lengths)}", got, exact, limits, inputs.cu_seqlens)
        torch.testing.assert_close(results["lse"][query].double(), exact["lse"].detach(), rtol=2e-6, atol=2e-6)


def test_the_pairwise_cases_are_few_and_hold_every_value():
    cases = pairwise()
    assert len(cases) < 60
    for name, values in FACTORS.items():
        assert {case[name] for case in cases} == set(values)
    together = set().union(*(combinations(case.items(), 2) for case in cases))
    assert (("option", "dropout"), ("head_dim", 80)) in together and (("heads", (6, 2)), ("path", "short")) in together


@pytest.mark.parametrize("dtype", FACTORS["dtype"], ids=str)
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("plain", lambda slip: {"softmax_scale": slip * 64**-0.5}),
        ("softcap", lambda slip: {"softcap": slip * 1.5}),
        ("plain", lambda slip: {"window": (38, -1)}),  # the last row of the 40 misses one key, of the 129 some more
        ("causal", lambda slip: {"window": (-1, 1)}),  # a key too many
        ("dropout", lambda slip: {"dropout_p": 0.303, "seed": 5}),  # 1 % more dropped
        ("dropout", lambda slip: {"dropout_p": 0.3, "seed": 6}),
    ],
)
def test_the_criterion_refuses_exact_results_of_a_slightly_wrong_option(name, wrong, dtype, attention):
    """Numbers that are off by 10 eps, or by one key of one row, fail however exactly they were computed."""
    inputs = attention.make((40, 129), 4, 2, 64, dtype)
    exact, limits = attention.limits(inputs, OPTIONS[name])
    results = attention.oracle(inputs, wrong(1 + 10 * torch.finfo(dtype).eps))
    best = {quantity: results[quantity].to(dtype) for quantity in limits}
    with pytest.raises(AssertionError, match="error / limit"):
        attention.judge("wrong", best, exact, limits, inputs.cu_seqlens)


SMALL_TILES = [  # kernels' tile, heads and kv heads: blocks begin and end inside a position's group of heads
    ((16, 16), (3, 1), "plain"),
    ((16, 32), (3, 1), "causal"),
    ((32, 16), (8, 1), "window"),
    ((16, 16), (6, 2), "softcap"),
    ((32, 16), (3, 1), "dropout"),
    ((16, 16), (5, 1), "all"),
]


@pytest.mark.parametrize(("tile", "heads", "name"), SMALL_TILES, ids=str)
@RUNS_OF_SMALL_TILES
def test_many_small_blocks(max_seqlen, dtype, tile, heads, name, attention):
    """Several blocks a sequence, with begin and end anywhere, and slots that stay empty."""
    needs_given_tiles(max_seqlen, dtype)
    inputs = attention.make((33, 0, 5, 50, 1, 16), *heads, 16, dtype)
    with tiles(*tile) if interpreting() else nullcontext():
        path = "long" if max_seqlen == LONG_SEQLEN else "short"
        attention.check(f"small tiles, {path}, {dtype}", inputs, OPTIONS[name], max_seqlen)


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("head_dim", [136, 200, 256])
def test_wide_fp32_operands_are_read_in_chunks(head_dim, name, attention):
    """Head dims that end before, inside and at the end of a chunk."""
    inputs = attention.make((33, 0, 1, 20), 3, 1, head_dim, torch.float32)
    attention.check("fp32 in chunks", inputs, OPTIONS[name], LONG_SEQLEN)


@pytest.mark.parametrize("window", [(1, 1), (17, 15)])
def test_windows_that_reach_one_key_into_another_block(window, attention):
    """One off in the range of a loop would lose a whole block, and no other test would see it."""
    inputs = attention.make((50,), 1, 1, 16, torch.float32)
    with tiles(16, 16) if interpreting() else nullcontext():
        attention.check(f"small tiles, long, {inputs.q.dtype}", inputs, {"window": window}, LONG_SEQLEN)


def test_more_sequences_than_are_searched_at_once(attention):
    """find_block looks at 256 at a time."""
    lengths = [0] * 300
    lengths[3], lengths[150], lengths[280], lengths[299] = 2, 3, 1, 18
    inputs = attention.make(lengths, 3, 1, 16, torch.float32)
    attention.check("300 sequences", inputs, OPTIONS["all"], LONG_SEQLEN)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_both_paths_agree(name, dtype, attention):
    inputs = attention.make((40, 1, 0, 17), 4, 2, 32, dtype)
    short, limits = attention.check("both paths, each", inputs, OPTIONS[name], 64)
    with tiles(16, 16) if interpreting() else nullcontext():  # where the short path's tile is the whole sequence
        long = attention.ours(inputs, OPTIONS[name], LONG_SEQLEN)
    attention.judge("both paths, one against the other", short, long, limits, inputs.cu_seqlens)
    torch.testing.assert_close(short["lse"], long["lse"], rtol=2e-6, atol=2e-6)


@RUNS
@pytest.mark.parametrize(
    ("seed", "sample_ids"),
    [(-1, None), (2**70 + 3, [2**33 + 1, 7, -5]), (torch.tensor([2**62 + 11]), [4, 4, 2**40])],
    ids=["negative", "huge", "tensor"],
)
def test_the_mask_of_the_debug_function_is_the_one_that_is_used(seed, sample_ids, max_seqlen, dtype, attention):
    inputs = attention.make((20, 9, 2), 4, 2, 16, dtype)
    if isinstance(seed, torch.Tensor):
        seed = seed.to(attention.device)
    options = {"dropout_p": 0.4, "seed": seed}
    if sample_ids is not None:
        options["sample_ids"] = torch.tensor(sample_ids, device=attention.device)
    attention.check(f"dropout keys, {dtype}", inputs, options, max_seqlen)


@triton.jit
def store_kept(seed_ptr, sample_ids_ptr, kept_ptr, threshold, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """A mask ``[B, HEADS, BLOCK, BLOCK]``, drawn as the attention kernels draw it. Grid: B x HEADS."""
    sequence, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    rows = tl.arange(0, BLOCK)
    row_keys = attention_row_keys(seed_ptr, sample_ids_ptr, sequence, head + tl.zeros_like(rows), rows)
    keep = kept(row_keys[:, None], rows[None, :], threshold)
    at = tl.program_id(0) * BLOCK * BLOCK + rows[:, None] * BLOCK + rows[None, :]
    tl.store(kept_ptr + at, keep.to(tl.int8))


def drawn(seed, sample_ids, p, heads=4, length=64):
    device = sample_ids.device
    out = torch.empty(len(sample_ids), heads, length, length, dtype=torch.int8, device=device)
    store_kept[(len(sample_ids) * heads,)](
        seed_tensor(seed, device), sample_ids, out, drop_threshold(p), HEADS=heads, BLOCK=length
    )
    return out.bool()


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("seed", [0, -7, 2**63 - 1, 2**64 + 2**63])
def test_kernels_draw_the_bits_of_torch(seed, p, attention):
    sample_ids = torch.tensor([0, 1, 2**33 + 1, -3, 2**63 - 1], device=attention.device)
    bits = drawn(seed, sample_ids, p)
    cu_seqlens = torch.arange(6, dtype=torch.int32, device=attention.device) * 64
    assert torch.equal(bits, torch.stack(attention_dropout_mask(seed, cu_seqlens, 4, p, sample_ids)))
    standard_error = (p * (1 - p) / bits.numel()) ** 0.5
    assert abs((~bits).double().mean().item() - p) <= 4 * standard_error


def test_masks_of_other_seeds_sequences_and_heads_are_independent(attention):
    sample_ids = torch.tensor([0, 1], device=attention.device)
    first, second = (drawn(seed, sample_ids, 0.5) for seed in (1, 2))
    masks = torch.cat([first, second]).flatten(0, 1).flatten(1).double() * 2 - 1  # [16 masks, 64 * 64]
    correlation = masks @ masks.T / masks.shape[1]
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 4.5 / 64  # standard errors
    assert torch.equal(first, drawn(1, sample_ids, 0.5))


@RUNS
def test_runs_are_bit_identical(max_seqlen, dtype, attention):
    inputs = attention.make((18, 0, 3), 6, 2, 32, dtype)
    with tiles(16, 16) if interpreting() else nullcontext():
        first = attention.ours(inputs, OPTIONS["all"], max_seqlen)
        second = attention.ours(inputs, OPTIONS["all"], max_seqlen)
        other = attention.ours(inputs, OPTIONS["all"] | {"seed": 8}, max_seqlen)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert not torch.equal(first["dQ"], other["dQ"])


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # that the inputs are not float64
@pytest.mark.parametrize("max_seqlen", [16, LONG_SEQLEN], ids=["short", "long"])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_gradcheck(name, max_seqlen, attention):
    """At a step of 1e-2 central differences are off by 1e-4 / 6 third derivatives, and by 1e-5 for rounding.

    The tables have no short tiles for fp32, because of a GPU's registers; the interpreter is given some.
    """
    needs_given_tiles(max_seqlen, torch.float32)
    inputs = attention.make((3, 0), 2, 1, 2, torch.float32)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]

    def call(q, k, v):
        return flash_attention(q, k, v, inputs.cu_seqlens, max_seqlen, backend="triton", **OPTIONS[name])

    with tiles(16, 16) if interpreting() else nullcontext():
        assert torch.autograd.gradcheck(call, leaves, eps=1e-2, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_path_follows_the_length_and_the_size_of_a_tile(arch):
    """The shared memory of sm_80's rows, 99 KB, holds no tile of 128 rows and 128 dims."""
    for head_dim in (64, 80, 96, 128):
        assert takes_short_path(1, head_dim, torch.float16, arch)
        assert takes_short_path(128, head_dim, torch.bfloat16, arch) == (arch != "sm_80" or head_dim == 64)
        assert not takes_short_path(129, head_dim, torch.float16, arch)
        assert not takes_short_path(16, head_dim, torch.float32, arch)
    assert takes_short_path(64, 256, torch.float16, arch) == (arch == "sm_100")
    assert not takes_short_path(65, 256, torch.float16, arch)
