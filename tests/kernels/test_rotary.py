"""apply_rotary against the plain statement in kernels/reference.py."""

import pytest
import torch

from bivec.kernels import apply_rotary
from bivec.kernels import reference as ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T, D, POSITIONS = 29, 23, 40


def randn(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def tables(half):
    angles = torch.outer(torch.arange(POSITIONS).float(), 10.0 ** -torch.linspace(0, 3, half))
    return angles.cos(), angles.sin()


def positions(length, seed=3):
    return torch.randint(POSITIONS, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 10), (4, 4, 2), (6, 2, 16)])
def test_rotary_matches_float64(dtype, heads, kv_heads, head_dim, layers):
    cos, sin, ids = *tables(head_dim // 2), positions(T)
    q, k = randn(T, heads, head_dim, dtype=dtype), randn(T, kv_heads, head_dim, seed=1, dtype=dtype)
    layers.assert_close_to_float64(
        lambda q, k: apply_rotary(q, k, cos, sin, ids), lambda q, k: ref.apply_rotary(q, k, cos, sin, ids), q, k
    )


def test_rotary_gradcheck():
    cos, sin, ids = *tables(3), positions(4)
    q, k = randn(4, 2, 6).requires_grad_(), randn(4, 1, 6, seed=1).requires_grad_()
    torch.autograd.gradcheck(lambda q, k: apply_rotary(q, k, cos, sin, ids), (q, k))
    torch.autograd.gradcheck(lambda q, k: apply_rotary(q * 1, k * 1, cos, sin, ids, inplace=True), (q, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_in_place_on_views_of_one_projection(dtype, layers):
    cos, sin, ids = *tables(4), positions(T)
    weight = randn(5 * 8, D, seed=4, dtype=dtype)  # 3 query heads, 1 key head, 1 value head in one matrix

    def attention_inputs(x, inplace):
        qkv = (x @ weight.T).unflatten(-1, (5, 8))
        q, k, v = qkv[:, :3], qkv[:, 3:4], qkv[:, 4:]
        return (*apply_rotary(q, k, cos, sin, ids, inplace=inplace), v)

    x = randn(T, D, dtype=dtype)
    ours, theirs = (layers.run(lambda x, i=inplace: attention_inputs(x, i), x) for inplace in (True, False))
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


def test_rotary_of_no_tokens(layers):
    cos, sin = tables(4)
    layers.check_empty(lambda x: apply_rotary(x, x, cos, sin, torch.arange(0)), 0, 2, 8)
