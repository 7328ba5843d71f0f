"""The Triton backend of rms_norm against float64; inside torch; and where offsets and memory get narrow."""

from itertools import product

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from bivec.kernels import BackendError, rms_norm, rms_norm_triton
from bivec.kernels import reference as ref
from bivec.kernels.aot_cases_layers import cases
from bivec.kernels.backend import TRITON_DTYPES
from bivec.kernels.launch import recording
from bivec.kernels.rms_norm_triton import add_rms_norm_op, rms_norm_backward_op, rms_norm_op
from bivec.kernels.tuning import ARCHITECTURES, Config, config_of, overriding, read_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOOR = 2**-22  # relative, Frobenius: two roundings of fp32
EPS = 1e-5
KERNELS = ("rms_norm_backward", "rms_norm_forward")
SHAPES = [(17, 13), (17, 64), (17, 1), (1, 576), (3, 4096), (0, 8), (5,), (2, 3, 7), (3, 0)]
FORMS = ["plain", "residual", "residual, y alone", "residual, sum alone"]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tiles_of(size):
    """All rows walked over with tiles of so many elements."""
    return overriding(dict.fromkeys(KERNELS, Config({"BLOCK_TILE": size}, num_warps=1, num_stages=1)))


def operands(*shape, dtype=torch.float32, form="residual"):
    """x, weight, perhaps residual, and the gradients of the outputs, None where an output is not used."""
    tensors = [3 * randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)]
    if form == "plain":
        return tensors, [randn(*shape, dtype=dtype, seed=3)]
    upstream = [randn(*shape, dtype=dtype, seed=3), randn(*shape, dtype=dtype, seed=4)]
    if "alone" in form:
        upstream["y" in form] = None
    return [*tensors, randn(*shape, dtype=dtype, seed=2)], upstream


def run(function, tensors, upstream, frozen=False, **options):
    """The outputs, and the gradients of x, weight and residual; zeros for those that nothing reaches."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    leaves[1].requires_grad_(not frozen)
    out = function(*leaves[:2], EPS, residual=leaves[2] if len(leaves) == 3 else None, **options)
    outputs = out if isinstance(out, tuple) else (out,)
    used = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream, strict=True) if g is not None]
    wanted = [x for x in leaves if x.requires_grad]
    used_outputs, d_outputs = zip(*used, strict=True)
    gradients = torch.autograd.grad(used_outputs, wanted, d_outputs, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True)]
    return [*(o.detach() for o in outputs), *filled]


def error(found, exact):
    """Relative, Frobenius; where the exact values are all 0 there is none to be found."""
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def assert_close_to_float64(tensors, upstream, **options):
    """At most twice the error that the torch backend, fp32 inside, makes in the same dtype."""
    ours = run(rms_norm, tensors, upstream, backend="triton", **options)
    torchs = run(rms_norm, tensors, upstream, backend="torch", **options)
    exact = run(ref.rms_norm, [x.double() for x in tensors], upstream, **options)
    for i, (found, plain, truth) in enumerate(zip(ours, torchs, exact, strict=True)):
        assert found.dtype == tensors[0].dtype and found.shape == truth.shape
        assert error(found, truth) <= 2 * error(plain, truth) + FLOOR, i


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, form):
    assert_close_to_float64(*operands(*shape, dtype=dtype, form=form))


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "residual"])
def test_weight_offset(form, dtype):
    assert_close_to_float64(*operands(5, 13, dtype=dtype, form=form), weight_offset=1.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [2, 16, 64])
def test_any_tile(size, form, monkeypatch):
    """Rows in pieces, each in a tile, and many in one; programs with one tile, several, and none of them whole."""
    tensors, upstream = operands(11, 21, form=form)
    for partials in (3, 512):
        monkeypatch.setattr(rms_norm_triton, "PARTIALS", partials)
        with tiles_of(size):
            assert_close_to_float64(tensors, upstream)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [4, 64])
def test_both_backends_agree_and_runs_repeat(size, form):
    tensors, upstream = operands(17, 21, form=form)
    with tiles_of(size):
        ours = run(rms_norm, tensors, upstream, backend="triton")
        again = run(rms_norm, tensors, upstream, backend="triton")
    for a, b in zip(ours, run(rms_norm, tensors, upstream, backend="torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_the_norm_is_of_the_rounded_sum(dtype):
    """Bit for bit the two steps; so a layer that adds by itself sees the same numbers."""
    (x, weight, residual), upstream = operands(7, 13, dtype=dtype)
    y, total = rms_norm(x, weight, EPS, residual=residual, backend="triton")
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight, EPS, backend="triton"))
    fused = run(rms_norm, (x, weight, residual), upstream, backend="triton")
    assert torch.equal(fused[2], fused[4]) and fused[2].data_ptr() == fused[4].data_ptr()


def test_a_frozen_weight_costs_no_gradient():
    tensors, upstream = operands(7, 13)
    frozen = run(rms_norm, tensors, upstream, frozen=True, backend="triton")
    trained = run(rms_norm, tensors, upstream, backend="triton")
    assert torch.equal(frozen[2], trained[2]) and torch.equal(frozen[3], trained[4])
    dy, d_total, x, weight, rstd = (tensor.to("meta") for tensor in (*upstream, *tensors[:2], randn(7)))
    with recording("sm_90") as launches:
        rms_norm_triton.backward(dy, d_total, x, weight, rstd, 0.0, False)
        rms_norm_triton.backward(dy, None, x, weight, rstd, 0.0, True)
    assert launches[0].arguments["partial_ptr"] is None and launches[1].arguments["partial_ptr"].shape == (1, 13)
    assert len(launches) == 2


def test_the_number_of_partial_sums_is_bounded():
    x, weight, rstd = (torch.empty(*shape, device="meta") for shape in ((10**6, 64), (64,), (10**6,)))
    with recording("sm_90") as launches:
        rms_norm_triton.backward(x, x, x, weight, rstd, 0.0, True)
    assert launches[0].grid[0] <= 512 and launches[0].arguments["partial_ptr"].shape == (launches[0].grid[0], 64)


@pytest.mark.parametrize("size", [4, 64])
def test_layouts(size):
    """Rows further apart than D, columns that are not neighbours, broadcast and transposed tensors."""
    wide = randn(6, 3 * 21)
    weight, upstream = randn(21, seed=1), [randn(6, 21, seed=3), randn(6, 21, seed=4)]
    strided_weight = torch.stack([weight, weight], 1)[:, 0]
    transposed = [g.t().contiguous().t() for g in upstream]
    for x in (wide[:, 21:42], wide[:, ::3], randn(21, 6).t(), randn(1, 21).expand(6, 21), randn(6, 1).expand(6, 21)):
        with tiles_of(size):
            expected = run(rms_norm, [x.contiguous(), weight, wide[:, :21].contiguous()], upstream, backend="triton")
            found = run(rms_norm, [x, strided_weight, wide[:, :21]], transposed, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    x = randn(21, 2, 3).permute(1, 2, 0)
    assert torch.equal(
        rms_norm(x, weight, EPS, backend="triton"), rms_norm(x.contiguous(), weight, EPS, backend="triton")
    )


def test_statistics_are_fp32():
    x = torch.full((1, 300), 300.0, dtype=torch.float16, device=DEVICE)  # a square of 90,000 is beyond fp16
    assert torch.allclose(rms_norm(x, torch.ones_like(x[0]), EPS, backend="triton"), torch.ones_like(x))
    many = torch.ones(2000, 1, dtype=torch.bfloat16, device=DEVICE)  # a bf16 running sum of ones stops at 256
    weight = torch.ones(1, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    rms_norm(many, weight, 1e-9, backend="triton").sum().backward()
    assert weight.grad.item() == 2000


def test_an_fp32_weight_over_half_precision_rows():
    x, weight = randn(5, 13, dtype=torch.bfloat16), randn(13, seed=1)
    ours, torchs = (run(rms_norm, (x, weight), [x], backend=b) for b in ("triton", "torch"))
    assert [a.dtype for a in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]
    torch.testing.assert_close(ours, torchs, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ours[2], torchs[2], rtol=1e-5, atol=1e-5)


def test_zeros_and_infinities():
    x = torch.zeros(2, 13, device=DEVICE, requires_grad=True)
    out = rms_norm(x, torch.ones(13, device=DEVICE), EPS, backend="triton")
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out)) and torch.isfinite(x.grad).all()
    huge = torch.full((1, 13), 1e30, device=DEVICE)  # the square overflows: rstd is 0
    assert torch.equal(rms_norm(huge, torch.ones(13, device=DEVICE), EPS, backend="triton"), torch.zeros_like(huge))


def test_rows_of_nan_stay_alone():
    (x, weight, residual), upstream = operands(6, 13)
    x[2] = torch.nan
    found = run(rms_norm, (x, weight, residual), upstream, frozen=True, backend="triton")
    for tensor in found:
        assert tensor[2].isnan().all() and tensor[[0, 1, 3, 4, 5]].isfinite().all()


def test_gradients_match_finite_differences():
    """In fp32, along random directions, from central differences of a smooth function of both outputs."""
    tensors, _ = operands(5, 13)

    def loss(x, weight, residual):
        y, total = rms_norm(x, weight, 1e-2, residual=residual, weight_offset=0.5, backend="triton")
        return (y.double().sin() + total.double().cos()).sum()

    leaves = [x.requires_grad_() for x in tensors]
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    for i, gradient in enumerate(gradients):
        direction, h = randn(*gradient.shape, seed=9), 1e-2
        with torch.no_grad():
            moved = [[x + s * h * direction if i == j else x for j, x in enumerate(leaves)] for s in (1, -1)]
            slope = (loss(*moved[0]) - loss(*moved[1])) / (2 * h)
        expected = (gradient.double() * direction).sum()
        assert abs(slope - expected) <= 2e-3 * gradient.norm() * direction.norm()


def test_a_second_derivative_is_refused():
    x, weight = randn(2, 13).requires_grad_(), torch.ones(13, device=DEVICE)
    y = rms_norm(x, weight, EPS, backend="triton")
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def test_offsets_beyond_2_31_elements():
    """Rows 2^26 elements apart: the later ones begin behind 2^31. The memory is reserved and hardly touched."""
    rows, stride = 40, 2**26
    try:
        memory = torch.empty(2**31 + rows * stride, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("there is no room for 9 GB")
    far = memory.as_strided((rows, 8), (stride, 1), 2**31)
    near, weight = randn(rows, 8, dtype=torch.float16), randn(8, dtype=torch.float16, seed=1)
    far.copy_(near)
    for size in (2, 64):
        with tiles_of(size):
            found = run(rms_norm, [far, weight, far], [far, far], backend="triton")
            expected = run(rms_norm, [near, weight, near], [near, near], backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(5, 13), (2, 3, 7)], ids=str)
def test_opcheck(shape):
    """Schema, fake tensors, autograd registration, and tracing with static and dynamic shapes."""
    x, weight, residual = (x.requires_grad_() for x in operands(*shape)[0])
    torch.library.opcheck(rms_norm_op, (x, weight, EPS, 0.0))
    torch.library.opcheck(add_rms_norm_op, (x, residual, weight, EPS, 1.0))
    rstd = torch.ones(x.shape[:-1].numel(), device=DEVICE)
    for d_total, want_dweight in product((None, x.detach()), (False, True)):
        arguments = (x.detach(), d_total, x.detach(), weight.detach(), rstd, 0.0, want_dweight)
        torch.library.opcheck(rms_norm_backward_op, arguments)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_as_one_graph_it_is_the_same(form):
    torch._dynamo.reset()

    def layer(x, weight, eps, residual=None):
        out = rms_norm(2 * x, weight, eps, residual=residual, backend="triton")
        return 3 * out if residual is None else (3 * out[0], out[1] * 2)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    tensors, upstream = operands(5, 13, dtype=torch.bfloat16, form=form)
    expected = run(layer, tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, tensors, upstream), expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    def layer(x, weight, residual):
        y, total = rms_norm(x.sin(), weight, EPS, residual=residual, backend="triton")
        return (y * total).cos()

    tensors, (d_out, _) = operands(5, 13)
    found = []
    for function in (layer, lambda *x: checkpoint(layer, *x, use_reentrant=reentrant)):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = function(*leaves)
        out.backward(d_out)
        found.append([out.detach(), *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("form", ["plain", "residual"])
def test_what_is_saved(form):
    """The rows that are normed, which x or the sum holds anyway, the weight, and 4 bytes a row."""
    tensors, _ = operands(5, 13, dtype=torch.bfloat16, form=form)
    x, weight, *residual = (x.requires_grad_() for x in tensors)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = rms_norm(x, weight, EPS, residual=residual[0] if residual else None, backend="triton")
    held = {tensor.data_ptr() for tensor in (x, weight, out[1])}
    held.remove(x.data_ptr() if residual else out[1].data_ptr())
    assert {tensor.data_ptr() for tensor in saved} >= held
    new = [tensor for tensor in saved if tensor.data_ptr() not in held]
    assert [(tensor.dtype, tensor.nbytes) for tensor in new] == [(torch.float32, 4 * 5)] and len(saved) == 3


@pytest.mark.skipif(DEVICE.type != "cuda", reason="without a GPU the test below says the same")
def test_nothing_stalls_a_gpu():
    tensors, upstream = operands(17, 13)
    run(rms_norm, tensors, upstream, backend="triton")  # compiles and loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(rms_norm, tensors, upstream, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.isfinite().all() for x in found)


def test_no_value_is_read_and_each_pass_is_one_launch():
    x, weight, residual = (x.to("meta") for x in operands(17, 13)[0])
    with recording("sm_90") as launches:
        y, total, rstd = rms_norm_triton.forward(x, residual, weight, EPS, 0.0)
        rms_norm_triton.backward(y, total, total, weight, rstd, 0.0, True)
    assert [launch.kernel.__name__ for launch in launches] == ["rms_norm_forward", "rms_norm_backward"]


def test_wrong_operands():
    x, weight = randn(3, 4), randn(4)
    with pytest.raises(BackendError, match=r'^rms_norm: .*float64.*backend="torch"'):
        rms_norm(x.double(), weight.double(), EPS, backend="triton")
    with pytest.raises(BackendError, match=r"weight of torch\.float64"):
        rms_norm(x, weight.double(), EPS, backend="triton")
    with pytest.raises(ValueError, match=r"\(3, 4\) and weight \(5,\)"):
        rms_norm(x, randn(5), EPS, backend="triton")
    with pytest.raises(ValueError, match=r"residual.*float16"):
        rms_norm(x, weight, EPS, residual=x.half(), backend="triton")
    with pytest.raises(ValueError, match="weight is on meta"):
        rms_norm(x, weight.to("meta"), EPS, backend="triton")


def test_on_a_cpu_the_interpreter_is_needed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        rms_norm(torch.zeros(4, 2), torch.zeros(2), EPS, backend="triton")


def test_the_table_has_every_row():
    keys = [(row["kernel"], row["arch"], row["key"]["itemsize"]) for row in read_table("rms_norm")]
    assert sorted(keys) == sorted(product(KERNELS, ARCHITECTURES, (2, 4)))
    for row in read_table("rms_norm"):
        assert row["compiled"]["spills"] == 0 and 0 < row["compiled"]["registers"] <= 128
        assert row["config"]["num_warps"] <= 4  # a long row's tile has four times as many


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_what_is_compiled_ahead_of_time_uses_every_row(target):
    with recording(target) as launches:
        for case in cases():
            if case.family == "rms_norm":
                case.call()
    found = {
        (x.kernel.__name__, x.arguments["x_ptr"].element_size(), x.num_warps)
        for x in launches
        if x.arguments["DIM"] == 4096
    }
    table = set()
    for row in read_table("rms_norm"):
        if row["arch"] == target:
            config = config_of(row)
            warps = config.num_warps * max(4096 // config.blocks["BLOCK_TILE"], 1)
            table.add((row["kernel"], row["key"]["itemsize"], warps))
    assert found == table
