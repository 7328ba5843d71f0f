"""lora_linear and lora_linears in Triton against float64 and the torch backend; their tables of tiles."""

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from bivec.kernels import BackendError, lora_linear, lora_linears, lora_triton
from bivec.kernels import reference as ref
from bivec.kernels.aot_cases_lora import all_cases, cases
from bivec.kernels.dropout import linear_keep_mask
from bivec.kernels.launch import recording
from bivec.kernels.lora_kernels import gradient, project_, update_
from bivec.kernels.tuning import ARCHITECTURES, config_of, read_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("torch", "triton")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(BF16, FP32), (FP16, FP32), (BF16, BF16), (FP32, FP32)]  # base, LoRA
T, IN, OUTS, SCALING = 37, 45, (33, 17, 70), 1.7  # as the operands of conftest.py have them
SEED = 2**40 + 3
IDS = torch.arange(T, device=DEVICE) * 7 + 3
DROPOUT = {"dropout_p": 0.3, "seed": SEED, "token_ids": IDS}
FLOOR = 1e-6  # relative, Frobenius: a few roundings of fp32


def randn(*shape, seed=0, dtype=FP32, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale).to(
        DEVICE, dtype
    )


def joint(backend, **options):
    def call(x, weights, biases, lora_as, lora_bs):
        return lora_linears(x, weights, lora_as, lora_bs, SCALING, biases=biases, backend=backend, **options)

    return call


def separate(backend, **options):
    def call(x, *matrices):
        return [
            lora_linear(x, w, a, b, SCALING, bias=bias, backend=backend, **options)
            for w, bias, a, b in zip(*matrices, strict=True)
        ]

    return call


def plain(dropout_p=0.0, seed=None, token_ids=IDS):
    """The reference; over a narrower base, the update in the dtype of its matrices."""

    def call(x, *matrices):
        outs = []
        keep = linear_keep_mask(seed, token_ids, x.shape[1], dropout_p) if dropout_p else None
        for w, bias, a, b in zip(*matrices, strict=True):
            options = {"dropout_p": dropout_p, "keep_mask": keep}
            if a.dtype == x.dtype:
                outs.append(ref.lora_linear(x, w, a, b, SCALING, bias=bias, **options))
            else:
                update = ref.lora_linear(x.to(a.dtype), w.to(a.dtype) * 0, a, b, SCALING, **options)
                outs.append(torch.nn.functional.linear(x, w, bias) + update.to(x.dtype))
        return outs

    return call


def flat(results):
    outs, gradients = results
    return [*outs, *(g for g in gradients if g is not None)]


def assert_near(found, expected, tolerance=2e-6):
    """Relative to the norm: sums in another order."""
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize(("dtype", "lora_dtype"), PAIRS, ids=lambda d: str(d).removeprefix("torch."))
def test_matches_float64(dtype, lora_dtype, options, backend, lora):
    operands = lora.Operands(dtype, lora_dtype)
    ours = lora.run(joint(backend, **options), operands)
    same_dtype, exact = (lora.run(plain(**options), o) for o in (operands, operands.double()))
    assert [o.dtype for o in ours[0]] == [dtype] * 3
    assert [g.dtype for g in ours[1] if g is not None] == [t.dtype for t in operands.tensors if t is not None]
    for i, (a, b, c) in enumerate(zip(flat(ours), flat(same_dtype), flat(exact), strict=True)):
        error, limit = ((x.double() - c).norm() / c.norm() for x in (a, b))
        assert error <= 2 * limit + FLOOR, f"{i}: {error} > 2 x {limit}"


@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("lora_dtype", [FP32, BF16], ids=str)
def test_jointly_is_as_one_by_one(lora_dtype, options, lora):
    """With the same mask; sums are formed in another order."""
    operands = lora.Operands(FP32 if lora_dtype == FP32 else BF16, lora_dtype)
    together, apart = (lora.run(form("triton", **options), operands) for form in (joint, separate))
    assert_near(together, apart, 4 * torch.finfo(operands.tensors[0].dtype).eps)


@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
def test_both_backends_agree(options, lora):
    assert_near(
        lora.run(joint("triton", **options), lora.Operands()), lora.run(joint("torch", **options), lora.Operands())
    )


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("width", [16, 70])
def test_the_mask_has_the_same_bits(dtype, width):
    """Through identities an output, a gradient of x and one of A show nothing but a mask. A rank of 70 takes blocks."""
    tokens, outs, p = 67, (width, width), 0.5
    ids = torch.arange(tokens, device=DEVICE) - 2**40
    mask = linear_keep_mask(5, ids, width, p)
    x, identity = torch.ones(tokens, width, device=DEVICE, dtype=dtype), torch.eye(width, device=DEVICE, dtype=dtype)
    x.requires_grad_()
    lora_as = [identity.clone().requires_grad_() for _ in outs]
    options = {"dropout_p": p, "seed": 5, "token_ids": ids, "backend": "triton"}
    ys = lora_linears(x, [torch.zeros_like(identity)] * 2, lora_as, [identity] * 2, 1.0, **options)
    assert all(torch.equal(y, 2.0 * mask.to(dtype)) for y in ys) and 0.3 < mask.float().mean() < 0.7
    sum(y.sum() for y in ys).backward()
    assert torch.equal(x.grad, 4.0 * mask.to(dtype))
    for lora_a in lora_as:  # the same for every row of A
        assert torch.equal(lora_a.grad, (2.0 * mask.sum(0)).to(dtype).expand(width, width))


@pytest.mark.parametrize("tokens", [0, 1, 65])
@pytest.mark.parametrize(
    ("width", "outs", "ranks"), [(1, (1,), [1]), (3, (130, 1), [16, 2]), (129, (16,), [64]), (33, (20, 5), [70, 3])]
)
def test_any_shape(tokens, width, outs, ranks, lora):
    operands = lora.Operands(tokens=tokens, width=width, outs=outs, ranks=ranks)
    ids = torch.arange(tokens, device=DEVICE)
    for options in ({}, DROPOUT | {"token_ids": ids}):
        ours = lora.run(joint("triton", **options), operands)
        exact = lora.run(plain(**options), operands.double())
        for a, b in zip(flat(ours), flat(exact), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


def test_nothing_in_nothing_out(lora):
    for width, out in ((0, 7), (7, 0)):
        ours, torchs = (
            lora.run(joint(b), lora.Operands(width=width, outs=(out,), bias=False)) for b in ("triton", "torch")
        )
        lora.assert_equal(ours, torchs)


def test_runs_repeat_bit_for_bit_and_long_sums_have_parts(lora):
    """More tokens than one part of a sum over them; partial sums reach neither other parts nor lack any row."""
    operands = lora.Operands(BF16, FP32, tokens=300, width=20, outs=(18, 3))
    options = {"dropout_p": 0.1, "seed": SEED, "token_ids": torch.arange(300, device=DEVICE)}
    first, second = (lora.run(joint("triton", **options), operands) for _ in range(2))
    lora.assert_equal(first, second)
    exact = lora.run(plain(**options), operands.double())
    for found, truth in list(zip(first[1], exact[1], strict=True))[5:]:  # of A and B
        assert (found.double() - truth).norm() <= 1e-5 * truth.norm()
    for tokens, parts in ((1, 1), (256, 1), (257, 2), (4096, 16), (4097, 9), (10**6, 16)):
        with recording("sm_90") as launches:
            gradient(torch.empty(tokens, 4, device="meta"), torch.empty(tokens, 16, device="meta"), FP32, 1.0)
        assert launches[0].arguments["parts_ptr"].shape[0] == parts
        assert launches[0].arguments["part_rows"] % launches[0].arguments["BLOCK_T"] == 0


TRAINED = {"lora": range(7, 13), "x": [0], "one A": [8], "one B": [12], "base": range(1, 7), "x and one B": [0, 10]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_any_subset_may_be_trained(trained, options, backend, lora):
    operands = lora.Operands()
    outs, everything = lora.run(joint(backend, **options), operands)
    found, some = lora.run(joint(backend, **options), operands, trained)
    for i, (one, other) in enumerate(zip(some, everything, strict=True)):
        assert (one is None) == (i not in trained or other is None)
    assert_near((found, some), (outs, [g if i in trained else None for i, g in enumerate(everything)]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("reached", [[0], [2], [0, 2]], ids=str)
def test_outputs_that_nothing_depends_on(reached, options, backend, lora):
    """Their operands get no gradient, the others and x what they get without them."""
    operands = lora.Operands()
    found = lora.run(joint(backend, **options), operands, reached=reached)
    expected = lora.run(separate(backend, **options), operands, reached=reached)
    assert [g is None for g in found[1]] == [g is None for g in expected[1]]
    assert_near(found, expected)


def test_no_work_for_what_nobody_wants(monkeypatch, lora):
    calls = []
    for name in ("project_", "update_", "gradient"):
        real = getattr(lora_triton, name)
        monkeypatch.setattr(lora_triton, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))
    operands = lora.Operands()

    def counts(trained, reached=None):
        calls.clear()
        lora.run(joint("triton", **DROPOUT), operands, trained, reached)
        return [calls.count(name) for name in ("project_", "update_", "gradient")]

    forward_alone = [1, 3, 0]
    for trained, reached, more in (
        (range(7, 13), None, [3, 0, 4]),  # LoRA under a frozen base and input: three dB, one dA of all
        (range(7, 13), [1], [1, 0, 2]),
        ([0, *range(7, 13)], None, [3, 1, 4]),
        ([0], [2], [1, 1, 0]),
        ([12], None, [0, 0, 1]),
        ([9], None, [1, 0, 1]),
        (range(1, 7), None, [0, 0, 0]),
        ([12], [0], [0, 0, 0]),
    ):
        assert counts(trained, reached) == [a + b for a, b in zip(forward_alone, more, strict=True)], (trained, reached)
    with torch.no_grad():
        calls.clear()
        joint("triton")(*operands.unpack(operands.tensors))
    assert calls == ["project_", "update_", "update_", "update_"]


def test_the_seed_may_be_a_tensor(lora):
    for backend in BACKENDS:
        expected = lora.run(joint(backend, **DROPOUT), lora.Operands())
        for seed in (torch.tensor([SEED], device=DEVICE), torch.tensor(SEED, device=DEVICE)):
            lora.assert_equal(lora.run(joint(backend, **DROPOUT | {"seed": seed}), lora.Operands()), expected)
        other = lora.run(joint(backend, **DROPOUT | {"seed": 1}), lora.Operands())
        assert not torch.equal(other[0][0], expected[0][0])


def test_token_ids_count_by_default(lora):
    ids = torch.arange(T, device=DEVICE)
    expected = lora.run(joint("triton", **DROPOUT | {"token_ids": ids}), lora.Operands())
    lora.assert_equal(lora.run(joint("triton", dropout_p=0.3, seed=SEED), lora.Operands()), expected)
    strided = torch.stack([ids, ids + 1], 1)[:, 0]
    lora.assert_equal(lora.run(joint("triton", **DROPOUT | {"token_ids": strided}), lora.Operands()), expected)


def test_layouts(lora):
    """Rows further apart than ``in``, columns that are not neighbours, transposed matrices, a broadcast gradient."""
    operands = lora.Operands()
    x, weights, biases, lora_as, lora_bs = operands.unpack(operands.tensors)
    expected = joint("triton", **DROPOUT)(x, weights, biases, lora_as, lora_bs)

    def turned(matrices):
        return [m.t().contiguous().t() for m in matrices]

    wide = torch.zeros(T, 3 * IN, device=DEVICE)
    for place in (slice(IN, 2 * IN), slice(None, None, 3)):
        wide[:, place] = x
        found = joint("triton", **DROPOUT)(wide[:, place], turned(weights), biases, turned(lora_as), turned(lora_bs))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    results = []
    for upper in (torch.ones(T, OUTS[0], device=DEVICE), torch.ones((), device=DEVICE).expand(T, OUTS[0])):
        leaf = x.clone().requires_grad_()
        lora_linear(leaf, weights[0], lora_as[0], lora_bs[0], SCALING, backend="triton").backward(upper)
        results.append(leaf.grad)
    assert torch.equal(*results)


def test_offsets_beyond_2_31_elements():
    """Rows 2^26 elements apart: the later ones begin behind 2^31. The memory is reserved and hardly touched."""
    rows, stride, width = 40, 2**26, 4
    try:
        memory = torch.empty(2**31 + rows * stride, dtype=FP16, device=DEVICE)
    except RuntimeError:
        pytest.skip("there is no room for 9 GB")
    far = memory.as_strided((rows, width), (stride, 1), 2**31)
    near, m, h = randn(rows, width, dtype=FP16), randn(2, width), randn(rows, 2)
    far.copy_(near)
    found, expected = torch.empty_like(h), torch.empty_like(h)
    project_(found, far, m, 1.0), project_(expected, near, m, 1.0)
    assert torch.equal(found, expected)
    assert torch.equal(gradient(far, h, FP32, 1.0), gradient(near, h, FP32, 1.0))
    update_(far, h, m, 1.0), update_(near, h, m, 1.0)
    assert torch.equal(far, near)


def test_float64_is_refused(lora):
    for lora_dtype in (FP32, torch.float64):
        with pytest.raises(BackendError, match=r'^lora_linears: .*float64.*backend="torch"'):
            lora.run(joint("triton"), lora.Operands(torch.float64, lora_dtype))
    x, w, a, b = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)
    with pytest.raises(BackendError, match=r"^lora_linear: .*float64"):
        lora_linear(*(t.double() for t in (x, w, a, b)), 1.0, backend="triton")


def test_on_a_cpu_the_interpreter_is_needed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, w, a, b = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)
    for call in (lambda: lora_linear(x, w, a, b, 1.0, backend="triton"),):
        with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
            call()
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        lora_linears(x, [w], [a], [b], 1.0, backend="triton")


def test_the_table_has_every_row():
    table = read_table("lora")
    keys = [(r["kernel"], r["arch"], r["key"]["itemsize"], r["key"]["lora_itemsize"]) for r in table]
    kernels, itemsizes = ("lora_gradient", "lora_project", "lora_update"), ((2, 2), (2, 4), (4, 4))
    assert sorted(keys) == sorted((k, a, *sizes) for k, a, sizes in product(kernels, ARCHITECTURES, itemsizes))
    for row in table:
        assert row["compiled"]["spills"] == 0 and 0 < row["compiled"]["registers"] <= 255
        assert row["arch"] != "sm_80" or row["compiled"]["shared"] <= 99 * 1024


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_what_is_compiled_ahead_of_time_uses_every_row(target):
    rows = [row for row in read_table("lora") if row["arch"] == target]
    table = {(r["kernel"], str(config_of(r).blocks), config_of(r).num_warps, config_of(r).num_stages) for r in rows}
    for these in (cases(), all_cases()):
        with recording(target) as launches:
            for case in these:
                case.call()
        found = set()
        for launch in launches:
            blocks = {
                name: launch.arguments[name] for name in ("BLOCK_T", "BLOCK_K", "BLOCK_N") if name in launch.arguments
            }
            if launch.kernel.__name__ != "lora_row_keys":
                found.add((launch.kernel.__name__, str(blocks), launch.num_warps, launch.num_stages))
        assert found == table
