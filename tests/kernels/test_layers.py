"""rms_norm, apply_rotary, swiglu, geglu, lora_linear(s) against the plain statements in kernels/reference.py."""

import pytest
import torch

from bivec.kernels import apply_rotary, dropout, geglu, lora_linear, lora_linears, rms_norm, swiglu
from bivec.kernels import reference as ref
from bivec.kernels.dropout import linear_keep_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = 1e-6  # relative
T, D, POSITIONS = 29, 23, 40


def randn(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def run(function, *tensors):
    """The outputs, and the gradients of the tensors under one fixed upstream gradient per output."""
    leaves = [tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    out = function(*leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    # rounded to bf16, so that every dtype sees the same numbers
    upstream = [randn(*o.shape, seed=90 + i, dtype=torch.bfloat16).to(o.dtype) for i, o in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    return [o.detach() for o in outputs], list(gradients)


def relative_error(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


def assert_close_to_float64(ours, reference, *tensors):
    """Our error is at most twice that of plain torch in the same dtype, outputs and gradients; dtypes are kept."""
    results = run(ours, *tensors)
    plain = run(reference, *tensors)
    exact = run(reference, *(tensor.double() for tensor in tensors))
    assert [g.dtype for g in results[1]] == [tensor.dtype for tensor in tensors]
    for kind, mine, same_dtype, truth in zip(("output", "gradient"), results, plain, exact, strict=True):
        for i, (a, b, c) in enumerate(zip(mine, same_dtype, truth, strict=True)):
            assert relative_error(a, c) <= 2 * relative_error(b, c) + FLOOR, f"{kind} {i}"


# --- rms_norm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
@pytest.mark.parametrize("fused", [False, True])
def test_rms_norm_matches_float64(dtype, weight_offset, fused):
    x, weight = randn(T, D, dtype=dtype, scale=3.0), randn(D, seed=1, dtype=dtype)
    residual = [randn(T, D, seed=2, dtype=dtype)] * fused

    def call(op):
        return lambda x, w, *r: op(x, w, 1e-5, residual=r[0] if r else None, weight_offset=weight_offset)

    assert_close_to_float64(call(rms_norm), call(ref.rms_norm), x, weight, *residual)
    out = call(rms_norm)(x, weight, *residual)
    assert (out[0] if fused else out).dtype == dtype
    if fused:
        assert torch.equal(out[1], x + residual[0])


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (1, 1)])
@pytest.mark.parametrize("fused", [False, True])
def test_rms_norm_gradcheck(shape, fused):
    x, weight, residual = randn(*shape), randn(shape[-1], seed=1), randn(*shape, seed=2)
    inputs = [tensor.requires_grad_() for tensor in ([x, weight, residual] if fused else [x, weight])]
    torch.autograd.gradcheck(lambda x, w, r=None: rms_norm(x, w, 1e-3, residual=r, weight_offset=0.5), inputs)


def test_rms_norm_statistics_are_fp32():
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # a square of 90,000 is beyond fp16
    assert torch.allclose(rms_norm(x, torch.ones(4096, dtype=torch.float16), 1e-5), torch.ones_like(x))


def test_rms_norm_of_zeros_is_zero_with_finite_gradients():
    x = torch.zeros(2, D, requires_grad=True)
    out = rms_norm(x, torch.ones(D), 1e-5)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, D)) and torch.isfinite(x.grad).all()


def test_rms_norm_refuses_a_second_derivative():
    x = randn(2, D).requires_grad_()
    (gradient,) = torch.autograd.grad(rms_norm(x, torch.ones(D).double(), 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("x", "weight", "residual", "message"),
    [
        (torch.ones(3, 4), torch.ones(5), None, r"\(3, 4\) and weight \(5,\)"),
        (torch.ones(()), torch.ones(()), None, r"must be \[\.\.\., D\]"),
        (torch.ones(3, 4, dtype=torch.int64), torch.ones(4), None, "floating point"),
        (torch.ones(3, 4), torch.ones(4), torch.ones(4), "residual"),
        (torch.ones(3, 4), torch.ones(4), torch.ones(3, 4).half(), r"residual.*float16.*float32"),
    ],
)
def test_rms_norm_wrong_operands(x, weight, residual, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, 1e-5, residual=residual)


# --- apply_rotary -----------------------------------------------------------------------------------------------------


def tables(half):
    angles = torch.outer(torch.arange(POSITIONS).float(), 10.0 ** -torch.linspace(0, 3, half))
    return angles.cos(), angles.sin()


def positions(length, seed=3):
    return torch.randint(POSITIONS, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 10), (4, 4, 2), (6, 2, 16)])
def test_rotary_matches_float64(dtype, heads, kv_heads, head_dim):
    cos, sin, ids = *tables(head_dim // 2), positions(T)
    q, k = randn(T, heads, head_dim, dtype=dtype), randn(T, kv_heads, head_dim, seed=1, dtype=dtype)
    assert_close_to_float64(
        lambda q, k: apply_rotary(q, k, cos, sin, ids), lambda q, k: ref.apply_rotary(q, k, cos, sin, ids), q, k
    )


def test_rotary_gradcheck():
    cos, sin, ids = *tables(3), positions(4)
    q, k = randn(4, 2, 6).requires_grad_(), randn(4, 1, 6, seed=1).requires_grad_()
    torch.autograd.gradcheck(lambda q, k: apply_rotary(q, k, cos, sin, ids), (q, k))
    torch.autograd.gradcheck(lambda q, k: apply_rotary(q * 1, k * 1, cos, sin, ids, inplace=True), (q, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_in_place_on_views_of_one_projection(dtype):
    cos, sin, ids = *tables(4), positions(T)
    weight = randn(5 * 8, D, seed=4, dtype=dtype)  # 3 query heads, 1 key head, 1 value head in one matrix

    def attention_inputs(x, inplace):
        qkv = (x @ weight.T).unflatten(-1, (5, 8))
        q, k, v = qkv[:, :3], qkv[:, 3:4], qkv[:, 4:]
        return (*apply_rotary(q, k, cos, sin, ids, inplace=inplace), v)

    x = randn(T, D, dtype=dtype)
    ours, theirs = (run(lambda x, i=inplace: attention_inputs(x, i), x) for inplace in (True, False))
    for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert torch.equal(a, b)


def test_rotary_in_place_overwrites_and_the_inverse_brings_back():
    cos, sin, ids = *tables(8), positions(T)
    q, k = randn(T, 3, 16, dtype=torch.float32), randn(T, 1, 16, seed=1, dtype=torch.float32)
    turned_q, turned_k = q.clone(), k.clone()
    out = apply_rotary(turned_q, turned_k, cos, sin, ids, inplace=True)
    assert out[0].data_ptr() == turned_q.data_ptr() and out[1].data_ptr() == turned_k.data_ptr()
    expected = apply_rotary(q, k, cos, sin, ids)
    assert torch.equal(turned_q, expected[0]) and torch.equal(turned_k, expected[1])
    back_q, back_k = apply_rotary(turned_q, turned_k, cos, -sin, ids)
    assert (back_q - q).abs().max() < 1e-6 and (back_k - k).abs().max() < 1e-6


def test_rotary_keeps_relative_positions():
    cos, sin = tables(8)
    q, k = randn(1, 1, 16), randn(1, 1, 16, seed=1)
    products = []
    for shift in (0, 5, 20):
        turned_q, _ = apply_rotary(q, q, cos, sin, torch.tensor([3 + shift]))
        turned_k, _ = apply_rotary(k, k, cos, sin, torch.tensor([11 + shift]))
        products.append((turned_q * turned_k).sum().item())
    assert max(products) - min(products) < 1e-5
    assert abs(products[0] - (q * k).sum().item()) > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(T, 8)}, "even Dh"),
        ({"q": torch.ones(T, 2, 7), "k": torch.ones(T, 1, 7)}, "even Dh"),
        ({"k": torch.ones(T, 1, 6)}, "even Dh"),
        ({"k": torch.ones(T + 1, 1, 8)}, "even Dh"),
        ({"k": torch.ones(T, 1, 8).half()}, "float16"),
        ({"cos": torch.ones(POSITIONS, 3)}, "cos"),
        ({"sin": torch.ones(POSITIONS + 1, 4)}, "sin"),
        ({"position_ids": torch.zeros(T - 1).long()}, "position_ids"),
        ({"position_ids": torch.zeros(T)}, "int64"),
        ({"position_ids": torch.full((T,), POSITIONS)}, f"positions {POSITIONS} … {POSITIONS}.*table of {POSITIONS}"),
        ({"position_ids": torch.arange(T) - 1}, "positions -1"),
    ],
)
def test_rotary_wrong_operands(changes, message):
    cos, sin = tables(4)
    arguments = {"q": torch.ones(T, 2, 8), "k": torch.ones(T, 1, 8), "cos": cos, "sin": sin}
    with pytest.raises(ValueError, match=message):
        apply_rotary(**{**arguments, "position_ids": torch.arange(T), **changes})


# --- swiglu, geglu ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ours", "reference"), [(swiglu, ref.swiglu), (geglu, ref.geglu)])
def test_gated_units_match_float64(dtype, ours, reference):
    gate, up = randn(T, D, dtype=dtype, scale=3.0), randn(T, D, seed=1, dtype=dtype)
    assert_close_to_float64(ours, reference, gate, up)


@pytest.mark.parametrize("op", [swiglu, geglu])
def test_gated_units_gradcheck_also_on_halves_of_one_tensor(op):
    both = randn(3, 8).requires_grad_()
    torch.autograd.gradcheck(lambda x: op(*x.chunk(2, dim=-1)), (both,))


@pytest.mark.parametrize("op", [swiglu, geglu])
def test_gated_units_saturate_without_nan(op):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    up = torch.full((5,), 2.0, requires_grad=True)
    out = op(gate, up)
    out.sum().backward()
    assert torch.equal(out, torch.tensor([-0.0, -0.0, 0.0, 200.0, 2e4]))
    assert torch.equal(gate.grad, torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0]))
    assert torch.equal(up.grad, torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4]))


@pytest.mark.parametrize("op", [swiglu, geglu])
@pytest.mark.parametrize("up", [torch.ones(2, 3), torch.ones(2, 4).half(), torch.ones(4)])
def test_gated_units_wrong_operands(op, up):
    with pytest.raises(ValueError, match=op.__name__):
        op(torch.ones(2, 4), up)
    with pytest.raises(ValueError, match="floating"):
        op(torch.ones(2, 4).long(), torch.ones(2, 4).long())


# --- lora_linear ------------------------------------------------------------------------------------------------------

IN, OUT, RANK, SCALING = 23, 17, 5, 1.7


@pytest.fixture(params=[None, 3 * 23 + 1], ids=["one block", "blocks"])
def blocks(request, monkeypatch):
    """Dropout in one block of rows on a CPU, as here it would be, and in several with a last one that is not full."""
    if request.param is not None:
        monkeypatch.setattr(dropout, "CPU_BLOCK", request.param)


def lora_operands(dtype, lora_dtype=None, bias=False):
    lora_dtype = lora_dtype or dtype
    tensors = [
        randn(T, IN, dtype=dtype),
        randn(OUT, IN, seed=1, dtype=dtype, scale=0.2),
        randn(RANK, IN, seed=2, dtype=lora_dtype, scale=0.2),
        randn(OUT, RANK, seed=3, dtype=lora_dtype, scale=0.4),
    ]
    return [*tensors, randn(OUT, seed=4, dtype=dtype)] if bias else tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_lora_matches_float64(dtype, bias, dropout_p, blocks):
    token_ids = torch.arange(T) * 7 + 3
    keep = linear_keep_mask(11, token_ids, IN, dropout_p) if dropout_p else None
    options = {"dropout_p": dropout_p, "seed": 11, "token_ids": token_ids}

    def ours(x, w, a, b, bias=None):
        return lora_linear(x, w, a, b, SCALING, bias=bias, **options)

    def reference(x, w, a, b, bias=None):
        return ref.lora_linear(x, w, a, b, SCALING, bias=bias, dropout_p=dropout_p, keep_mask=keep)

    assert_close_to_float64(ours, reference, *lora_operands(dtype, bias=bias))
    if dropout_p:  # the mask is really in use, and both passes meet the same one
        assert 0.5 < keep.float().mean() < 0.9
        undropped, _ = run(lambda *t: lora_linear(*t[:4], SCALING), *lora_operands(dtype))
        assert not torch.equal(run(ours, *lora_operands(dtype))[0][0], undropped[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_fp32_lora_over_a_half_precision_base(dtype, dropout_p, blocks):
    keep = linear_keep_mask(5, torch.arange(T), IN, dropout_p) if dropout_p else None

    def reference(x, w, a, b):
        update = ref.lora_linear(x.to(a.dtype), w.to(a.dtype) * 0, a, b, SCALING, dropout_p=dropout_p, keep_mask=keep)
        return x @ w.T + update.to(x.dtype)

    assert_close_to_float64(
        lambda x, w, a, b: lora_linear(x, w, a, b, SCALING, dropout_p=dropout_p, seed=5),
        reference,
        *lora_operands(dtype, torch.float32),
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("trainable", ["all", "lora", "a", "b", "x"])
def test_lora_gradcheck(dropout_p, trainable, monkeypatch):
    monkeypatch.setattr(dropout, "CPU_BLOCK", 12)  # two rows
    x, weight, a, b, bias = randn(4, 5), randn(3, 5, seed=1), randn(2, 5, seed=2), randn(3, 2, seed=3), randn(3, seed=4)
    chosen = {"all": [x, weight, a, b, bias], "lora": [a, b], "a": [a], "b": [b], "x": [x]}[trainable]
    inputs = [tensor.requires_grad_() for tensor in chosen]

    def call(*_):
        return lora_linear(x, weight, a, b, 0.8, bias=bias, dropout_p=dropout_p, seed=1)

    torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_lora_of_a_strided_input(dropout_p):
    x, weight, a, b = lora_operands(torch.float64)
    wide = torch.stack((x, -x), dim=2).flatten(1).requires_grad_()  # every second column is x
    options = {"dropout_p": dropout_p, "seed": 9}
    found, expected = lora_linear(wide[:, ::2], weight, a, b, SCALING, **options), x.clone().requires_grad_()
    out = lora_linear(expected, weight, a, b, SCALING, **options)
    torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)
    found.sum().backward(), out.sum().backward()
    torch.testing.assert_close(wide.grad[:, ::2], expected.grad, rtol=1e-12, atol=1e-12)


def test_lora_dropout_follows_the_token_and_not_its_row():
    x, weight, a, b = lora_operands(torch.float32)
    ids = torch.arange(100, 100 + T)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(6))
    options = {"dropout_p": 0.5, "seed": 9}
    out = lora_linear(x, weight, a, b, SCALING, token_ids=ids, **options)
    assert torch.allclose(
        lora_linear(x[order], weight, a, b, SCALING, token_ids=ids[order], **options), out[order], atol=1e-5
    )
    assert not torch.allclose(lora_linear(x, weight, a, b, SCALING, token_ids=ids + 1, **options), out, atol=1e-3)
    by_default = lora_linear(x, weight, a, b, SCALING, **options)
    assert torch.equal(by_default, lora_linear(x, weight, a, b, SCALING, token_ids=torch.arange(T), **options))
    as_tensor = lora_linear(x, weight, a, b, SCALING, token_ids=ids, dropout_p=0.5, seed=torch.tensor([9]))
    assert torch.equal(as_tensor, out)


def test_lora_saves_no_mask_and_no_copy_of_the_input():
    x, weight, a, b = lora_operands(torch.float32)
    x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, weight, a, b, SCALING, dropout_p=0.3, seed=1)
    own = {x.data_ptr(), weight.data_ptr(), a.data_ptr(), b.data_ptr()}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in own) == T * RANK * 4 + T * 8  # h and the token ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 3, 4)}, r"\[T, in\]"),
        ({"x": torch.ones(3, 5)}, r"\[T, in\]"),
        ({"weight": torch.ones(6, 5)}, r"\[T, in\]"),
        ({"lora_a": torch.ones(2, 5)}, r"\[T, in\]"),
        ({"lora_b": torch.ones(6, 3)}, "lora_b"),
        ({"lora_b": torch.ones(5, 2)}, "lora_b"),
        ({"bias": torch.ones(1)}, "bias"),
        ({"bias": torch.ones(6).half()}, "float16"),
        ({"weight": torch.ones(6, 4).half()}, "float16"),
        ({"lora_b": torch.ones(6, 2).half()}, "float16"),
        ({"dropout_p": 1.0, "seed": 1}, "dropout_p"),
        ({"dropout_p": -0.1, "seed": 1}, "dropout_p"),
        ({"dropout_p": 0.5}, "seed"),
        ({"dropout_p": 0.5, "seed": 1.5}, "seed"),
        ({"dropout_p": 0.5, "seed": 1, "token_ids": torch.arange(4)}, "token_ids"),
        ({"dropout_p": 0.5, "seed": 1, "token_ids": torch.arange(3.0)}, "int64"),
        ({"weight": torch.ones(6, 4, device="meta")}, "weight is on meta, x on cpu; move them together"),
        ({"lora_a": torch.ones(2, 4, device="meta")}, "lora_a is on meta"),
        ({"lora_b": torch.ones(6, 2, device="meta")}, "lora_b is on meta"),
        ({"bias": torch.ones(6, device="meta")}, "bias is on meta"),
        ({"dropout_p": 0.5, "seed": 1, "token_ids": torch.arange(3, device="meta")}, "token_ids is on meta"),
        ({"dropout_p": 0.5, "seed": torch.ones(1, dtype=torch.int64, device="meta")}, "seed is on meta"),
    ],
)
def test_lora_wrong_operands(changes, message):
    arguments = {"x": torch.ones(3, 4), "weight": torch.ones(6, 4), "scaling": 1.0}
    arguments |= {"lora_a": torch.ones(2, 4), "lora_b": torch.ones(6, 2)}
    with pytest.raises(ValueError, match=message):
        lora_linear(**{**arguments, **changes})


# --- lora_linears -----------------------------------------------------------------------------------------------------

OUTS, SEED = (17, 6, 9), 11


def joint_operands(dtype, lora_dtype=None):
    """x, then the weights, the A and the B of three projections; the last has another rank."""
    lora_dtype, ranks = lora_dtype or dtype, (RANK, RANK, 2)
    weights = [randn(out, IN, seed=10 + p, dtype=dtype, scale=0.2) for p, out in enumerate(OUTS)]
    lora_as = [randn(rank, IN, seed=20 + p, dtype=lora_dtype, scale=0.2) for p, rank in enumerate(ranks)]
    lora_bs = [randn(OUTS[p], rank, seed=30 + p, dtype=lora_dtype, scale=0.4) for p, rank in enumerate(ranks)]
    return [randn(T, IN, dtype=dtype), *weights, *lora_as, *lora_bs]


def jointly(*tensors, **options):
    x, *matrices = tensors
    return lora_linears(x, matrices[:3], matrices[3:6], matrices[6:], SCALING, **options)


def one_by_one(*tensors, **options):
    x, *matrices = tensors
    operands = zip(matrices[:3], matrices[3:6], matrices[6:], strict=True)
    return tuple(lora_linear(x, w, a, b, SCALING, **options) for w, a, b in operands)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "lora_dtype"), [(torch.float64, None), (torch.float32, None), (torch.bfloat16, torch.float32)]
)
def test_joint_lora_is_as_one_by_one(dtype, lora_dtype, dropout_p, blocks):
    options = {"dropout_p": dropout_p, "seed": SEED, "token_ids": torch.arange(T) * 7 + 3}
    operands = joint_operands(dtype, lora_dtype)
    together, apart = (run(lambda *t, f=f: f(*t, **options), *operands) for f in (jointly, one_by_one))
    tolerance = 4 * torch.finfo(dtype).eps
    for a, b in zip([*together[0], *together[1]], [*apart[0], *apart[1]], strict=True):
        assert a.dtype == b.dtype and relative_error(a, b.double()) <= tolerance


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("trainable", ["all", "lora", "x", "one A", "one bias"])
def test_joint_lora_gradcheck(dropout_p, trainable, monkeypatch):
    """One of the outputs has a bias, and another is not used."""
    monkeypatch.setattr(dropout, "CPU_BLOCK", 12)  # two rows
    x, bias = randn(4, 5), randn(2, seed=9)
    weights = [randn(out, 5, seed=out) for out in (3, 2, 4)]
    lora_as, lora_bs = [randn(2, 5, seed=p) for p in range(3)], [randn(out, 2, seed=out) for out in (3, 2, 4)]
    chosen = {
        "all": [x, *weights[:2], *lora_as[:2], *lora_bs[:2], bias],
        "lora": [*lora_as[:2], *lora_bs[:2]],
        "x": [x],
        "one A": [lora_as[1]],
        "one bias": [bias],
    }[trainable]
    inputs = [tensor.requires_grad_() for tensor in chosen]

    def call(*_):
        options = {"biases": (None, bias, None), "dropout_p": dropout_p, "seed": 1}
        return lora_linears(x, weights, lora_as, lora_bs, 0.8, **options)[:2]

    torch.autograd.gradcheck(call, inputs)


def test_joint_lora_saves_the_input_once():
    operands = [tensor.requires_grad_() for tensor in joint_operands(torch.float32)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        jointly(*operands, dropout_p=0.3, seed=SEED)
    own = {tensor.data_ptr() for tensor in operands}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in own) == T * (2 * RANK + 2) * 4 + T * 8
    assert sum(t.data_ptr() == operands[0].data_ptr() for t in saved) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": []}, "at least one projection; got 0 weights, 2 lora_as, 2 lora_bs, 0 biases"),
        ({"lora_as": [torch.ones(2, 4)]}, "one of each a projection.*got 2 weights, 1 lora_as"),
        ({"biases": [None]}, "1 biases"),
        ({"dropout_p": 0.5}, "needs a seed"),
        ({"dropout_p": 1.0, "seed": 1}, "dropout_p"),
        ({"lora_bs": [torch.ones(6, 2), torch.ones(5, 3)]}, "projection 1: lora_b has shape"),
        ({"biases": [None, torch.ones(6)]}, "projection 1: bias has shape"),
        ({"weights": [torch.ones(6, 5), torch.ones(5, 4)]}, "projection 0: x"),
        ({"token_ids": torch.arange(4)}, "token_ids must be int64 of shape"),
    ],
)
def test_joint_lora_wrong_operands(changes, message):
    arguments = {"x": torch.ones(3, 4), "weights": [torch.ones(6, 4), torch.ones(5, 4)], "scaling": 1.0}
    arguments |= {"lora_as": [torch.ones(2, 4)] * 2, "lora_bs": [torch.ones(6, 2), torch.ones(5, 2)]}
    with pytest.raises(ValueError, match=f"^lora_linears: .*{message}"):
        lora_linears(**{**arguments, **changes})


def test_joint_lora_wants_one_dtype_of_all_matrices():
    x, a, b = torch.ones(3, 4).bfloat16(), torch.ones(2, 4), torch.ones(6, 2)
    weights = [torch.ones(6, 4).bfloat16()] * 2
    with pytest.raises(ValueError, match=r"lora_as must have one dtype, got .*float32.*bfloat16"):
        lora_linears(x, weights, [a, a.bfloat16()], [b, b.bfloat16()], 1.0)


# --- all --------------------------------------------------------------------------------------------------------------


def test_no_tokens():
    cos, sin = tables(4)
    calls = [
        (lambda x: rms_norm(x, torch.ones(8), 1e-5, residual=x), (0, 8)),
        (lambda x: apply_rotary(x, x, cos, sin, torch.arange(0)), (0, 2, 8)),
        (lambda x: swiglu(x, x), (0, 8)),
        (lambda x: geglu(x, x), (0, 8)),
        (lambda x: lora_linear(x, torch.ones(4, 8), torch.ones(2, 8), torch.ones(4, 2), 1.0), (0, 8)),
        (lambda x: lora_linear(x, *lora_operands(x.dtype)[1:], 1.0, dropout_p=0.5, seed=1), (0, IN)),
        (lambda x: jointly(x, *joint_operands(x.dtype)[1:], dropout_p=0.5, seed=SEED), (0, IN)),
    ]
    for call, shape in calls:
        x = torch.ones(*shape, requires_grad=True)
        out = call(x)
        sum(o.sum() for o in (out if isinstance(out, tuple) else (out,))).backward()
        assert x.grad.shape == shape
