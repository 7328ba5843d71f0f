"""The Triton backend of swiglu and geglu against float64, overwriting backwards of both backends, and inside torch."""

from importlib import import_module
from itertools import product

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from bivec.kernels import BackendError, geglu, swiglu
from bivec.kernels import reference as ref
from bivec.kernels.aot_cases_layers import cases
from bivec.kernels.backend import TRITON_DTYPES
from bivec.kernels.launch import recording
from bivec.kernels.swiglu_triton import (
    CURVES,
    backward,
    forward,
    gated_unit_backward_inplace_op,
    gated_unit_backward_op,
    gated_unit_op,
    has_rows,
)
from bivec.kernels.tuning import ARCHITECTURES, Config, config_of, overriding, read_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOOR = 2**-22  # relative, Frobenius: two roundings of fp32
KERNELS = ("gated_unit_backward", "gated_unit_forward")
OPS = {swiglu: ref.swiglu, geglu: ref.geglu}
WAYS = list(product(OPS, ("triton", "torch")))


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def operands(*shape, dtype=torch.float32):
    """gate, up and the gradient of the result."""
    return 3 * randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1), randn(*shape, dtype=dtype, seed=2)


def run(function, gate, up, d_out, **options):
    """The result and both gradients; with ``overwrite`` of copies, as leaves are refused."""
    leaves = [x.detach().requires_grad_() for x in (gate, up)]
    inputs = [x * 1 for x in leaves] if options.get("overwrite") else leaves
    out = function(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


def error(found, exact):
    """Relative, Frobenius; where the exact values are all 0 there is none to be found."""
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(17, 13), (1, 64), (3, 4096), (0, 5), (3, 0), (7,), (), (2, 3, 5)], ids=str)
def test_matches_float64(shape, dtype, op, overwrite):
    """At most twice the error that the torch backend makes in the same dtype."""
    tensors = operands(*shape, dtype=dtype)
    ours = run(op, *tensors, backend="triton", overwrite=overwrite)
    torchs = run(op, *tensors, backend="torch")
    exact = run(OPS[op], *(x.double() for x in tensors))
    for found, plain, truth in zip(ours, torchs, exact, strict=True):
        assert found.dtype == dtype and found.shape == truth.shape
        assert error(found, truth) <= 2 * error(plain, truth) + FLOOR


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_in_fp32_it_is_right_to_the_last_places_everywhere(op):
    """Elementwise: the tails, where sigmoid and 1 - sigmoid are small, and 1 + tanh cancels, in float64 too."""

    def without_tanh(gate, up):
        a, b = CURVES["silu" if op is swiglu else "gelu"]
        return gate * torch.sigmoid(a * gate + b * gate**3) * up

    gate = torch.linspace(-20, 20, 999, device=DEVICE)
    ones = torch.ones_like(gate)
    ours = run(op, gate, ones, ones, backend="triton")
    exact = run(without_tanh, gate.double(), ones.double(), ones.double())
    for found, truth in zip(ours, exact, strict=True):
        # a few places, and as many as z is large, whose rounding the exponential takes along; d_gate crosses 0 near -1
        places = 4 + 2 * gate.double().abs() ** (1 if op is swiglu else 3)
        floor = 1e-37 + 2.0**-22 * (gate.abs() < 3)
        assert ((found.double() - truth).abs() <= 2.0**-24 * places * truth.abs() + floor).all()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_saturates_without_nan(op):
    gate = torch.tensor([-1e30, -1e4, -200.0, 0.0, 100.0, 1e4, 1e12], device=DEVICE)
    twos = torch.full_like(gate, 2.0)
    out, d_gate, d_up = run(op, gate, twos, torch.ones_like(gate), backend="triton")
    assert out.tolist() == [0, 0, 0, 0, 200, 2e4, 2 * gate[-1].item()]
    assert d_gate.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert torch.equal(d_up, gate.clamp_min(0))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("block", [1, 4, 64])
def test_both_backends_agree_and_runs_repeat(block, op):
    tensors = operands(7, 13)
    with overriding(dict.fromkeys(KERNELS, Config({"BLOCK_N": block}, num_warps=1, num_stages=1))):
        ours = run(op, *tensors, backend="triton")
        again = run(op, *tensors, backend="triton")
    for a, b, c in zip(ours, again, run(op, *tensors, backend="torch"), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)


# --- layouts ----------------------------------------------------------------------------------------------------------


def pairs():
    """gate and up [6, 4] by name: halves of one projection, rows apart, transposed, columns apart, broadcast."""
    wide = randn(6, 16)
    return {
        "halves": wide[:, :8].chunk(2, dim=1),
        "rows apart": (wide[::1, 4:8], wide.flip(0)[:, 12:]),
        "transposed": (randn(4, 6).t(), randn(4, 6, seed=1).t()),
        "columns apart": (wide[:, ::4], wide[:, 1::4]),
        "one of each": (wide[:, :4], randn(6, 4, seed=1)),
    }


@pytest.mark.parametrize("block", [2, 64])
@pytest.mark.parametrize("name", pairs())
def test_layouts(name, block):
    gate, up = pairs()[name]
    upstream = randn(6, 4, seed=2)
    with overriding(dict.fromkeys(KERNELS, Config({"BLOCK_N": block}, num_warps=1, num_stages=1))):
        expected = run(swiglu, gate.contiguous(), up.contiguous(), upstream, backend="triton")
        for d_out in (upstream, upstream.t().contiguous().t(), torch.cat([upstream] * 2, 1)[:, :4]):
            found = run(swiglu, gate, up, d_out, backend="triton")
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            d_gate, d_up = (torch.empty_strided(x.shape, x.stride(), device=DEVICE).copy_(x) for x in (gate, up))
            gated_unit_backward_inplace_op(d_out, d_gate, d_up, "silu")
            assert torch.equal(d_gate, expected[1]) and torch.equal(d_up, expected[2])
    broadcast = torch.ones(1, 1, device=DEVICE).expand(6, 4)
    assert torch.equal(swiglu(gate, broadcast, backend="triton"), swiglu(gate, torch.ones_like(up), backend="triton"))


def test_what_has_rows():
    x = torch.empty(6, 5, 8)
    assert all(map(has_rows, (x, x[:, :, :3], x[:, 1], x[:, 2:3, 1:], x[:1, ::2], x[0, 0], x[0, 0, 0], x[:0])))
    assert not any(map(has_rows, (x[:, 1:], x.transpose(0, 1), x[:, :, ::2], x[0, 0, ::2], x[:1].expand(6, 5, 8))))


def test_offsets_beyond_2_31_elements():
    """Rows 2^26 elements apart: the later ones begin behind 2^31. The memory is reserved and hardly touched."""
    rows, stride = 40, 2**26
    try:
        memory = torch.empty(2**31 + rows * stride, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("there is no room for 9 GB")
    near, up, d_out = (randn(rows, 4, dtype=torch.float16, seed=seed) for seed in range(3))
    far = memory.as_strided((rows, 4), (stride, 1), 2**31)
    far.copy_(near)
    for pair in ((far, up), (up, far)):
        plain = [near if x is far else x for x in pair]
        assert torch.equal(gated_unit_op(*pair, "silu"), gated_unit_op(*plain, "silu"))
    expected = gated_unit_backward_op(near, near, up, "silu")
    gated_unit_backward_inplace_op(far.clone(), far, up, "silu")
    assert torch.equal(far, expected[0]) and torch.equal(up, expected[1])
    for found, truth in zip(
        gated_unit_backward_op(far, near, d_out, "gelu"),
        gated_unit_backward_op(far.clone(), near, d_out, "gelu"),
        strict=True,
    ):
        assert torch.equal(found, truth)


# --- overwriting ------------------------------------------------------------------------------------------------------


def projected(fused):
    """A leaf, and gate and up [6, 8] computed from it: two tensors, or halves of one."""
    x = randn(6, 3).requires_grad_()
    both = x @ randn(3, 16, seed=1)
    return x, *(both.chunk(2, dim=-1) if fused else (both[:, :8] * 1, both[:, 8:] * 1))


@pytest.mark.parametrize("fused", [False, True], ids=["two tensors", "halves of one"])
@pytest.mark.parametrize(("op", "backend"), WAYS)
def test_the_gradients_are_written_over_gate_and_up(op, backend, fused):
    found = []
    for overwrite in (True, False):
        x, gate, up = projected(fused)
        out = op(gate, up, overwrite=overwrite, backend=backend)
        before, seen = gate.detach().clone(), {}
        gate.register_hook(lambda g, seen=seen: seen.update(gate=g.detach().clone()))
        up.register_hook(lambda g, seen=seen: seen.update(up=g.detach().clone()))
        out.backward(randn(6, 8, seed=2))
        found.append((out.detach(), x.grad, seen["gate"], seen["up"]))
        if overwrite:
            assert torch.equal(gate, seen["gate"]) and torch.equal(up, seen["up"])
        else:
            assert torch.equal(gate, before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("op", "backend"), WAYS)
def test_a_second_backward_is_an_error(op, backend):
    _, gate, up = projected(False)
    out = op(gate, up, overwrite=True, backend=backend).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    _, gate, up = projected(False)
    out = op(gate, up, backend=backend).sum()
    out.backward(retain_graph=True)
    out.backward()  # without overwrite there can be as many as one likes


@pytest.mark.parametrize("which", [0, 1], ids=["gate", "up"])
@pytest.mark.parametrize(("op", "backend"), WAYS)
def test_what_somebody_else_needs_is_an_error(op, backend, which):
    """Its backward comes after ours, and finds what it has saved overwritten."""
    _, *pair = projected(False)
    squares = pair[which].square()
    out = op(*pair, overwrite=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squares.sum() + out.sum()).backward()


@pytest.mark.parametrize("shape", [(3,), (), (64, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_the_torch_backend_overwrites_part_by_part(op, shape, monkeypatch):
    monkeypatch.setattr(import_module("bivec.kernels.swiglu"), "SMALLEST_PART", 7)
    tensors = operands(*shape)
    expected = run(op, *tensors, backend="torch")
    found = run(op, *tensors, backend="torch", overwrite=True)
    for a, b in zip(found, expected, strict=True):  # of other lengths torch vectorises other elements
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_torch_backend_allocates_little():
    """Of the memories that the backward makes, none is larger than a sixteenth of gate."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
                sizes.append(out.untyped_storage().nbytes())
            return out

    gate, up = (randn(64, 1 << 17).requires_grad_() * 1 for _ in range(2))
    out = swiglu(gate, up, overwrite=True, backend="torch")
    d_out = torch.ones_like(out)
    given = {x.untyped_storage().data_ptr() for x in (gate, up, d_out)}
    with Sizes():
        gradients = torch.autograd.grad(out, (gate, up), d_out)
    assert [g.data_ptr() for g in gradients] == [gate.data_ptr(), up.data_ptr()]
    assert len(sizes) >= 16 and max(sizes) <= gate.nbytes / 16


@pytest.mark.parametrize(("op", "backend"), WAYS)
def test_what_cannot_be_overwritten_is_refused(op, backend):
    gate, up, leaf = randn(4, 8), randn(4, 8), randn(4, 8).requires_grad_()
    for name, pair in {"gate": (leaf, up), "up": (gate, leaf)}.items():
        with pytest.raises(ValueError, match=rf"{name} is a leaf that requires grad.*without overwrite=True"):
            op(*pair, overwrite=True, backend=backend)
    with pytest.raises(ValueError, match="gate is a leaf that requires grad, or a view of one"):
        op(leaf[:, :4], up[:, :4], overwrite=True, backend=backend)
    with pytest.raises(ValueError, match="elements of up share memory"):
        op(gate, up[:1].expand(4, 8), overwrite=True, backend=backend)
    with pytest.raises(ValueError, match="gate and up are one memory"):
        op(gate, gate, overwrite=True, backend=backend)
    with torch.no_grad():
        op(leaf, up, overwrite=True, backend=backend)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_checkpointing_an_overwriting_layer(backend, reentrant):
    def layer(x):
        gate, up = (x @ randn(3, 16, seed=1)).chunk(2, dim=-1)
        return swiglu(gate, up, overwrite=True, backend=backend)

    found = []
    for function in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        x = randn(6, 3).requires_grad_()
        out = function(x)
        out.sin().sum().backward()
        found.append((out.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- inside torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_gradients_match_finite_differences(op):
    """In fp32, along a random direction, from central differences."""
    gate, up, d_out = operands(7, 13)
    gradients = run(op, gate, up, d_out, backend="triton")[1:]
    for i, gradient in enumerate(gradients):
        direction, h = randn(7, 13, seed=9), 1e-2
        moved = [[x + s * h * direction if i == j else x for j, x in enumerate((gate, up))] for s in (1, -1)]
        above, below = ((op(*pair, backend="triton").double() * d_out).sum() for pair in moved)
        expected = (gradient.double() * direction).sum()
        assert abs((above - below) / (2 * h) - expected) <= 1e-3 * gradient.norm() * direction.norm()


@pytest.mark.parametrize("activation", CURVES)
def test_opcheck(activation):
    """Schema, fake tensors, autograd registration, and tracing with static and dynamic shapes."""
    gate, up, d_out = operands(7, 13)
    torch.library.opcheck(gated_unit_backward_op, (d_out, gate, up, activation))
    torch.library.opcheck(gated_unit_backward_inplace_op, (d_out, gate.clone(), up.clone(), activation))
    torch.library.opcheck(gated_unit_op, (gate.requires_grad_(), up.requires_grad_(), activation))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_compiled_as_one_graph_it_is_the_same(op, overwrite):
    torch._dynamo.reset()

    def layer(gate, up):
        return 3 * op(2 * gate, 2 * up, overwrite=overwrite, backend="triton")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    tensors = operands(7, 13, dtype=torch.bfloat16)
    expected = run(layer, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, *tensors), expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    def layer(gate, up):
        return geglu(gate.sin(), up, backend="triton").cos()

    gate, up, d_out = operands(7, 13)
    expected = run(layer, gate, up, d_out)
    found = run(lambda *x: checkpoint(layer, *x, use_reentrant=reentrant), gate, up, d_out) if not reentrant else None
    if reentrant:  # which refuses autograd.grad
        leaves = [x.detach().requires_grad_() for x in (gate, up)]
        out = checkpoint(layer, *leaves, use_reentrant=True)
        out.backward(d_out)
        found = [out.detach(), *(x.grad for x in leaves)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("op", "backend"), WAYS)
def test_nothing_is_saved_but_gate_and_up(op, backend, overwrite):
    _, gate, up = projected(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        op(gate, up, overwrite=overwrite, backend=backend)
    assert [x.data_ptr() for x in saved] == [gate.data_ptr(), up.data_ptr()]


def test_a_second_derivative_is_refused():
    gate, up = randn(2, 5).requires_grad_(), randn(2, 5)
    (gradient,) = torch.autograd.grad(swiglu(gate, up, backend="triton").sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def test_no_value_is_read_and_each_pass_is_one_launch():
    """A single row where nothing has gaps; rows where something has."""
    gate, up, d_out = (x.to("meta") for x in operands(6, 8))
    with recording("sm_90") as launches:
        for pair in ((gate, up), torch.empty(6, 16, device="meta").chunk(2, dim=1)):
            forward(*pair, "silu")
            backward(d_out, *pair, *pair, "silu")
    assert [launch.arguments["width"] for launch in launches] == [48, 48, 8, 8]


def test_wrong_operands():
    x = randn(4, 8)
    with pytest.raises(BackendError, match=r'^geglu: .*float64.*backend="torch"'):
        geglu(x.double(), x.double(), backend="triton")
    with pytest.raises(ValueError, match="swiglu: gate"):
        swiglu(x, x[:, :4], backend="triton")
    with pytest.raises(ValueError, match="up is on meta"):
        swiglu(x, x.to("meta"), backend="triton")


def test_on_a_cpu_the_interpreter_is_needed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for op in OPS:
        with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
            op(torch.zeros(4, 2), torch.zeros(4, 2), backend="triton")


def test_the_table_has_every_row():
    keys = [(row["kernel"], row["arch"], row["key"]["itemsize"]) for row in read_table("swiglu")]
    assert sorted(keys) == sorted(product(KERNELS, ARCHITECTURES, (2, 4)))
    assert all(row["compiled"]["spills"] == 0 < row["compiled"]["registers"] for row in read_table("swiglu"))


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_what_is_compiled_ahead_of_time_uses_every_row(target):
    with recording(target) as launches:
        for case in cases():
            if case.family == "swiglu":
                case.call()
    found = {(x.kernel.__name__, x.arguments["BLOCK_N"], x.num_warps) for x in launches}
    rows = [row for row in read_table("swiglu") if row["arch"] == target]
    assert found == {(r["kernel"], *config_of(r).blocks.values(), config_of(r).num_warps) for r in rows}
