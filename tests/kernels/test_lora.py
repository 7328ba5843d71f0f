"""lora_linear and lora_linears against the plain statement in kernels/reference.py."""

import pytest
import torch

from bivec.kernels import dropout, lora_linear, lora_linears
from bivec.kernels import reference as ref
from bivec.kernels.dropout import linear_keep_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T, IN, OUT, RANK, SCALING = 29, 23, 17, 5, 1.7


def randn(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


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
def test_lora_matches_float64(dtype, bias, dropout_p, blocks, layers):
    token_ids = torch.arange(T) * 7 + 3
    keep = linear_keep_mask(11, token_ids, IN, dropout_p) if dropout_p else None
    options = {"dropout_p": dropout_p, "seed": 11, "token_ids": token_ids}

    def ours(x, w, a, b, bias=None):
        return lora_linear(x, w, a, b, SCALING, bias=bias, **options)

    def reference(x, w, a, b, bias=None):
        return ref.lora_linear(x, w, a, b, SCALING, bias=bias, dropout_p=dropout_p, keep_mask=keep)

    layers.assert_close_to_float64(ours, reference, *lora_operands(dtype, bias=bias))
    if dropout_p:  # the mask is really in use, and both passes meet the same one
        assert 0.5 < keep.float().mean() < 0.9
        undropped, _ = layers.run(lambda *t: lora_linear(*t[:4], SCALING), *lora_operands(dtype))
        assert not torch.equal(layers.run(ours, *lora_operands(dtype))[0][0], undropped[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_fp32_lora_over_a_half_precision_base(dtype, dropout_p, blocks, layers):
    keep = linear_keep_mask(5, torch.arange(T), IN, dropout_p) if dropout_p else None

    def reference(x, w, a, b):
        update = ref.lora_linear(x.to(a.dtype), w.to(a.dtype) * 0, a, b, SCALING, dropout_p=dropout_p, keep_mask=keep)
        return x @ w.T + update.to(x.dtype)

    layers.assert_close_to_float64(
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
def test_joint_lora_is_as_one_by_one(dtype, lora_dtype, dropout_p, blocks, layers):
    options = {"dropout_p": dropout_p, "seed": SEED, "token_ids": torch.arange(T) * 7 + 3}
    operands = joint_operands(dtype, lora_dtype)
    together, apart = (layers.run(lambda *t, f=f: f(*t, **options), *operands) for f in (jointly, one_by_one))
    tolerance = 4 * torch.finfo(dtype).eps
    for a, b in zip([*together[0], *together[1]], [*apart[0], *apart[1]], strict=True):
        assert a.dtype == b.dtype and layers.relative_error(a, b.double()) <= tolerance


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


def test_lora_of_no_tokens(layers):
    layers.check_empty(lambda x: lora_linear(x, torch.ones(4, 8), torch.ones(2, 8), torch.ones(4, 2), 1.0), 0, 8)
    layers.check_empty(lambda x: lora_linear(x, *lora_operands(x.dtype)[1:], 1.0, dropout_p=0.5, seed=1), 0, IN)
    layers.check_empty(lambda x: jointly(x, *joint_operands(x.dtype)[1:], dropout_p=0.5, seed=SEED), 0, IN)
