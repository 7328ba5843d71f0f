"""swiglu and geglu against the plain statements in kernels/reference.py."""

import pytest
import torch

from bivec.kernels import geglu, swiglu
from bivec.kernels import reference as ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T, D = 29, 23


def randn(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ours", "reference"), [(swiglu, ref.swiglu), (geglu, ref.geglu)])
def test_gated_units_match_float64(dtype, ours, reference, layers):
    gate, up = randn(T, D, dtype=dtype, scale=3.0), randn(T, D, seed=1, dtype=dtype)
    layers.assert_close_to_float64(ours, reference, gate, up)


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


@pytest.mark.parametrize("op", [swiglu, geglu])
def test_gated_units_of_no_tokens(op, layers):
    layers.check_empty(lambda x: op(x, x), 0, 8)
