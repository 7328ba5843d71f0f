"""rms_norm against the plain statement in kernels/reference.py."""

import pytest
import torch

from bivec.kernels import reference as ref
from bivec.kernels import rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T, D = 29, 23


def randn(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
@pytest.mark.parametrize("fused", [False, True])
def test_rms_norm_matches_float64(dtype, weight_offset, fused, layers):
    x, weight = randn(T, D, dtype=dtype, scale=3.0), randn(D, seed=1, dtype=dtype)
    residual = [randn(T, D, seed=2, dtype=dtype)] * fused

    def call(op):
        return lambda x, w, *r: op(x, w, 1e-5, residual=r[0] if r else None, weight_offset=weight_offset)

    layers.assert_close_to_float64(call(rms_norm), call(ref.rms_norm), x, weight, *residual)
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


def test_rms_norm_of_no_tokens(layers):
    layers.check_empty(lambda x: rms_norm(x, torch.ones(8), 1e-5, residual=x), 0, 8)
