"""The Triton backend of apply_rotary against float64; in place, on views; inside torch."""

from itertools import product

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from bivec.kernels import BackendError, apply_rotary
from bivec.kernels import reference as ref
from bivec.kernels.aot_cases_layers import cases
from bivec.kernels.backend import TRITON_DTYPES
from bivec.kernels.launch import recording
from bivec.kernels.rotary_triton import rotary_inplace_op, rotary_op, rotate
from bivec.kernels.tuning import ARCHITECTURES, Config, config_of, overriding, read_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOOR = 2**-22  # relative, Frobenius: two roundings of fp32
T, POSITIONS = 17, 40
SHAPES = [  # T, H, Hkv, Dh
    (T, 4, 2, 64),
    (T, 3, 1, 80),
    (3, 5, 5, 96),
    (1, 9, 3, 128),
    (2, 2, 1, 256),
    (T, 3, 2, 10),
    (T, 1, 1, 2),
    (0, 2, 1, 8),
]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tables(half):
    angles = torch.outer(torch.arange(POSITIONS).float(), 10.0 ** -torch.linspace(0, 3, half))
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


def positions(length=T):
    return torch.randint(POSITIONS, (length,), generator=torch.Generator().manual_seed(3)).to(DEVICE)


def run(function, q, k, head_dim, upstream=(True, True), **options):
    """The outputs and the gradients of q and k, None where nothing reaches one; in place on copies."""
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    operands = [x * 1 for x in leaves] if options.get("inplace") else leaves
    out = function(*operands, *tables(head_dim // 2), positions(len(q)), **options)
    used = [(o, randn(*o.shape, dtype=q.dtype, seed=9 + i).to(o.dtype)) for i, o in enumerate(out) if upstream[i]]
    used_outputs, d_outputs = zip(*used, strict=True)
    gradients = torch.autograd.grad(used_outputs, leaves, d_outputs, allow_unused=True)
    return [*(o.detach() for o in out), *gradients]


def error(found, exact):
    """Relative, Frobenius; where the exact values are all 0 there is none to be found."""
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim"),
    SHAPES,
)
def test_matches_float64(length, heads, kv_heads, head_dim, dtype, inplace):
    """At most twice the error that the torch backend, fp32 inside, makes in the same dtype."""
    q, k = randn(length, heads, head_dim, dtype=dtype), randn(length, kv_heads, head_dim, dtype=dtype, seed=1)
    ours = run(apply_rotary, q, k, head_dim, backend="triton", inplace=inplace)
    torchs = run(apply_rotary, q, k, head_dim, backend="torch")
    exact = run(ref.apply_rotary, q.double(), k.double(), head_dim)
    for found, plain, truth in zip(ours, torchs, exact, strict=True):
        assert found.dtype == dtype and found.shape == truth.shape
        assert error(found, truth) <= 2 * error(plain, truth) + FLOOR


@pytest.mark.parametrize("size", [8, 32, 512])
def test_any_tile(size):
    """Part of a token's heads in a tile, all of them, those of several tokens."""
    q, k = randn(T, 5, 10), randn(T, 2, 10, seed=1)
    expected = run(apply_rotary, q, k, 10, backend="torch")
    with overriding({"rotary": Config({"BLOCK_TILE": size}, num_warps=1, num_stages=1)}):
        found = run(apply_rotary, q, k, 10, backend="triton")
        again = run(apply_rotary, q, k, 10, backend="triton")
    for a, b, c in zip(found, expected, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert torch.equal(a, c)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("upstream", [(True, False), (False, True)], ids=["q alone", "k alone"])
def test_a_gradient_that_is_missing(upstream, inplace):
    q, k = randn(T, 3, 10), randn(T, 2, 10, seed=1)
    both = run(apply_rotary, q, k, 10, backend="triton")[2:]
    found = run(apply_rotary, q, k, 10, upstream, backend="triton", inplace=inplace)[2:]
    for gradient, expected, wanted in zip(found, both, upstream, strict=True):
        assert torch.equal(gradient, expected) if wanted else gradient is None


def test_the_inverse_brings_back():
    q, k = randn(T, 3, 16), randn(T, 1, 16, seed=1)
    arguments = *tables(8), positions()
    turned = rotary_op(q, k, *arguments, False)
    for back, x in zip(rotary_op(*turned, *arguments, True), (q, k), strict=True):
        torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(turned[0], q)


def test_tables_of_other_layouts_and_dtypes():
    q, k, ids = randn(T, 3, 10), randn(T, 2, 10, seed=1), positions()
    cos, sin = tables(5)
    expected = rotary_op(q, k, cos, sin, ids, False)
    strided_ids = torch.stack([ids, ids], 1)[:, 0]
    both = torch.cat([cos, sin], 1)
    for c, s in ((both[:, :5], both[:, 5:]), (cos.t().contiguous().t(), sin), (cos.double(), sin.double())):
        found = apply_rotary(q, k, c, s, strided_ids, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_position_outside_the_tables_is_nan_and_checked_on_a_cpu(monkeypatch):
    q, k, ids = randn(4, 3, 10), randn(4, 2, 10, seed=1), torch.tensor([0, -1, POSITIONS, 2], device=DEVICE)
    for out in rotary_op(q, k, *tables(5), ids, False):
        assert out[[1, 2]].isnan().all() and out[[0, 3]].isfinite().all()
    monkeypatch.setenv("BIVEC_CHECK", "1")
    with pytest.raises(ValueError, match=f"positions -1 … {POSITIONS} are not all inside"):
        apply_rotary(q, k, *tables(5), ids, backend="triton")


# --- layouts and views ------------------------------------------------------------------------------------------------


def layouts():
    """q [T, 3, 8] and k [T, 2, 8] by name: slices of one projection, head-major, every other token, from split."""
    qkv = randn(T, 7, 8)
    return {
        "one projection": lambda x: (x[:, :3], x[:, 3:5]),
        "head-major": lambda x: (x[:, :3].transpose(0, 1).contiguous().transpose(0, 1), x[:, 3:5]),
        "gaps": lambda x: (torch.cat([x, x], 2)[:, :3, 4:12] * 1, torch.cat([x, x], 2)[:, 3:5, 8:]),
        "split": lambda x: x.split([3, 2, 2], dim=1)[:2],
    }, qkv


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", layouts()[0])
def test_layouts(name, inplace):
    choices, qkv = layouts()
    q, k = choices[name](qkv.clone())
    expected = apply_rotary(q.clone(), k.clone(), *tables(4), positions(), backend="torch")
    found = apply_rotary(q, k, *tables(4), positions(), inplace=inplace, backend="triton")
    for out, operand, truth in zip(found, (q, k), expected, strict=True):
        torch.testing.assert_close(out, truth, rtol=1e-6, atol=1e-6)
        assert (out.data_ptr() == operand.data_ptr()) == inplace
        assert not inplace or torch.equal(out, operand)


def test_columns_that_are_not_neighbours():
    q, k = randn(T, 3, 16)[..., ::2], randn(T, 8, 2, seed=1).transpose(1, 2)
    expected = apply_rotary(q.contiguous(), k.contiguous(), *tables(4), positions(), backend="triton")
    found = apply_rotary(q, k, *tables(4), positions(), backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="inplace=True needs neighbouring elements"):
        apply_rotary(q, k, *tables(4), positions(), inplace=True, backend="triton")


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["one projection", "three projections"])
def test_in_place_on_views_the_gradients_are_those_out_of_place(fused, dtype):
    x, weight = randn(T, 6, dtype=dtype), randn(7 * 8, 6, dtype=dtype, seed=1)

    def attention_inputs(x, weight, inplace, backend):
        if fused:
            qkv = (x @ weight.T).unflatten(-1, (7, 8))
            q, k, v = qkv[:, :3], qkv[:, 3:5], qkv[:, 5:]
        else:
            q, k, v = ((x @ w.T).unflatten(-1, (-1, 8)) for w in weight.split([24, 16, 16]))
        return (*apply_rotary(q, k, *tables(4), positions(), inplace=inplace, backend=backend), v)

    found = []
    for inplace, backend in ((True, "triton"), (False, "triton"), (False, "torch")):
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = attention_inputs(*leaves, inplace, backend)
        upstream = [randn(*o.shape, dtype=dtype, seed=5 + i) for i, o in enumerate(out)]
        found.append([*(o.detach() for o in out), *torch.autograd.grad(out, leaves, upstream)])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    for a, b in zip(found[0], found[2], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)


def projected():
    """q and k, views of two projections' outputs, with their leaf."""
    x = randn(T, 6).requires_grad_()
    q, k = ((x @ randn(6, heads * 8, seed=heads)).unflatten(-1, (heads, 8)) for heads in (3, 2))
    return x, q, k


@pytest.mark.parametrize("operand", [0, 1], ids=["q", "k"])
def test_what_somebody_else_has_saved_and_lost_is_an_error(operand):
    """Not a silently wrong gradient."""
    _, *pair = projected()
    squares = pair[operand].square()  # saves it
    turned = apply_rotary(*pair, *tables(4), positions(), inplace=True, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squares.sum() + turned[0].sum()).backward()


def test_one_that_is_overwritten_after_use_is_an_error_too():
    """The rotated pair, saved by its consumer, and then rotated again in place."""
    _, q, k = projected()
    q, k = apply_rotary(q, k, *tables(4), positions(), inplace=True, backend="triton")
    product = (q[:, :2] * k).sum()
    apply_rotary(q.detach(), k.detach(), *tables(4), positions(), inplace=True, backend="triton")
    with pytest.raises(RuntimeError, match=r"modified (by an inplace operation|inplace)"):
        product.backward()


def test_turned_twice_in_place():
    found = []
    for inplace in (True, False):
        x, q, k = projected()
        for _ in range(2):
            q, k = apply_rotary(q, k, *tables(4), positions(), inplace=inplace, backend="triton")
        (q.sin().sum() + k.cos().sum()).backward()
        found.append((q.detach(), k.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_what_cannot_be_overwritten_is_refused(backend):
    def turn(q, k):
        return apply_rotary(q, k, *tables(4), positions(), inplace=True, backend=backend)

    q, k, leaf = randn(T, 3, 8), randn(T, 2, 8), randn(T, 3, 8).requires_grad_()
    with pytest.raises(ValueError, match=r"apply_rotary: q is a leaf that requires grad.*without inplace=True"):
        turn(leaf, k)
    with pytest.raises(ValueError, match="k is a leaf that requires grad, or a view of one"):
        turn(q, leaf[:, 1:])
    with pytest.raises(ValueError, match="elements of k share memory"):
        turn(q, k[:, :1].expand(T, 3, 8))
    with pytest.raises(ValueError, match="q and k are one memory"):
        turn(q, q)
    with torch.no_grad():
        assert torch.equal(turn(leaf, k)[0], leaf)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_place_without_autograd(mode):
    with mode():
        q, k = randn(T, 3, 8), randn(T, 2, 8, seed=1)
        expected = apply_rotary(q, k, *tables(4), positions(), backend="triton")
        found = apply_rotary(q, k, *tables(4), positions(), inplace=True, backend="triton")
        for out, operand, truth in zip(found, (q, k), expected, strict=True):
            assert torch.equal(out, truth) and out.data_ptr() == operand.data_ptr() and not out.requires_grad


# --- inside torch -----------------------------------------------------------------------------------------------------


def test_gradients_match_finite_differences():
    """In fp32; the function is linear, so that a long step costs nothing."""
    q, k = randn(T, 3, 10).requires_grad_(), randn(T, 2, 10, seed=1).requires_grad_()
    weights = randn(T, 3, 10, seed=5).double(), randn(T, 2, 10, seed=6).double()

    def loss(q, k):
        out = apply_rotary(q * 1, k * 1, *tables(5), positions(), inplace=True, backend="triton")
        return sum((o.double() * w).sum() for o, w in zip(out, weights, strict=True))

    gradients = torch.autograd.grad(loss(q, k), (q, k))
    directions = randn(T, 3, 10, seed=7), randn(T, 2, 10, seed=8)
    with torch.no_grad():
        change = loss(q + directions[0], k + directions[1]) - loss(q, k)
    expected = sum((g.double() * d).sum() for g, d in zip(gradients, directions, strict=True))
    assert abs(change - expected) <= 1e-5 * sum(g.norm() * d.norm() for g, d in zip(gradients, directions, strict=True))


def test_opcheck():
    """Schema, fake tensors, autograd registration, and tracing with static and dynamic shapes."""
    q, k = randn(T, 3, 10), randn(T, 2, 10, seed=1)
    torch.library.opcheck(rotary_inplace_op, (q.clone(), k.clone(), *tables(5), positions(), False))
    for inverse in (False, True):
        arguments = q.requires_grad_(), k.requires_grad_(), *tables(5), positions(), inverse
        torch.library.opcheck(rotary_op, arguments)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_as_one_graph_it_is_the_same(inplace):
    torch._dynamo.reset()

    def layer(q, k, cos, sin, ids):
        q, k = apply_rotary(2 * q, 2 * k, cos, sin, ids, inplace=inplace, backend="triton")
        return 3 * q, 3 * k

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    q, k = randn(T, 3, 10, dtype=torch.bfloat16), randn(T, 2, 10, dtype=torch.bfloat16, seed=1)
    expected = run(layer, q, k, 10)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, q, k, 10), expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    def layer(q, k):
        return apply_rotary(q.sin(), k.sin(), *tables(4), positions(), inplace=True, backend="triton")

    found = []
    for function in (layer, lambda *x: checkpoint(layer, *x, use_reentrant=reentrant)):
        q, k = randn(T, 3, 8).requires_grad_(), randn(T, 2, 8, seed=1).requires_grad_()
        turned = function(q, k)
        (turned[0].cos().sum() + turned[1].exp().sum()).backward()
        found.append([*(x.detach() for x in turned), q.grad, k.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_is_saved_but_the_tables_and_positions(inplace):
    q, k = (x.requires_grad_() * 1 for x in (randn(T, 3, 8), randn(T, 2, 8)))
    cos, sin, ids = *tables(4), positions()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        apply_rotary(q, k, cos, sin, ids, inplace=inplace, backend="triton")
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for x in (cos, sin, ids)]


def test_offsets_beyond_2_31_elements():
    """Tokens, or heads, 2^26 elements apart: the later ones lie behind 2^31. The memory is hardly touched."""
    rows, stride = 40, 2**26
    try:
        memory = torch.empty(2**31 + rows * stride, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("there is no room for 9 GB")
    near, k = randn(rows, 1, 8, dtype=torch.float16), randn(rows, 1, 8, dtype=torch.float16, seed=1)
    expected, _ = apply_rotary(near, k, *tables(4), positions(rows), backend="triton")
    far = memory.as_strided((rows, 1, 8), (stride, 8, 1), 2**31)
    far.copy_(near)
    assert torch.equal(rotary_op(far, k, *tables(4), positions(rows), False)[0], expected)
    rotary_inplace_op(far, k.clone(), *tables(4), positions(rows), False)
    assert torch.equal(far, expected)
    heads = near.transpose(0, 1)  # all of one token
    expected, _ = apply_rotary(heads, heads, *tables(4), positions(1), backend="triton")
    far = memory.as_strided((1, rows, 8), (8, stride, 1), 2**31)
    far.copy_(heads)
    rotary_inplace_op(far, heads.clone(), *tables(4), positions(1), False)
    assert torch.equal(far, expected)


def test_no_value_is_read_and_each_pass_is_one_launch():
    q, k, ids = (x.to("meta") for x in (randn(T, 3, 10), randn(T, 2, 10), positions()))
    cos, sin = (x.to("meta") for x in tables(5))
    with recording("sm_90") as launches:
        rotate(*rotate(q, k, cos, sin, ids, False), cos, sin, ids, True)
    assert [launch.arguments["direction"] for launch in launches] == [1.0, -1.0]


def test_wrong_operands():
    q, k = randn(T, 3, 8), randn(T, 2, 8)
    with pytest.raises(BackendError, match=r'^apply_rotary: .*float64.*backend="torch"'):
        apply_rotary(q.double(), k.double(), *tables(4), positions(), backend="triton")
    with pytest.raises(ValueError, match="cos is on meta"):
        apply_rotary(q, k, tables(4)[0].to("meta"), tables(4)[1], positions(), backend="triton")
    with pytest.raises(ValueError, match="even Dh"):
        apply_rotary(q, k[..., :6], *tables(4), positions(), backend="triton")


def test_on_a_cpu_the_interpreter_is_needed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, table = torch.zeros(4, 1, 4), torch.ones(4, 2)
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        apply_rotary(x, x, table, table, torch.arange(4), backend="triton")


def test_the_table_has_every_row():
    keys = [(row["kernel"], row["arch"], row["key"]["itemsize"]) for row in read_table("rotary")]
    assert sorted(keys) == sorted(product(["rotary"], ARCHITECTURES, (2, 4)))
    assert all(row["compiled"]["spills"] == 0 < row["compiled"]["registers"] for row in read_table("rotary"))


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_what_is_compiled_ahead_of_time_uses_every_row(target):
    with recording(target) as launches:
        for case in cases():
            if case.family == "rotary":
                case.call()
    found = {(x.arguments["BLOCK_ROWS"] * x.arguments["BLOCK_HALF"], x.num_warps) for x in launches}
    rows = [config_of(row) for row in read_table("rotary") if row["arch"] == target]
    assert found == {(config.blocks["BLOCK_TILE"], config.num_warps) for config in rows}
