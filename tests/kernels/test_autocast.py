"""Under torch.autocast the torch backend of every operator computes in its operands' dtypes, as the Triton one does."""

import pytest
import torch

from bivec.kernels import (
    apply_rotary,
    flash_attention,
    geglu,
    info_nce,
    linear_cross_entropy,
    lora_linear,
    lora_linears,
    rms_norm,
    segment_pool,
    swiglu,
)

T, D = 12, 16
CU_SEQLENS = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
NOISE = {"dropout_p": 0.3, "seed": 7}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrices(dtype=torch.float32):
    """x, weight, A and B of a LoRA layer; the base in ``dtype``."""
    return [randn(T, D, dtype=dtype), randn(8, D, seed=1, dtype=dtype), randn(4, D, seed=2), randn(8, 4, seed=3)]


def rotary(x):
    angles = torch.arange(T).float()[:, None] * torch.arange(1, 3).float()
    return apply_rotary(x[:, :2], x[:, 2:], angles.cos(), angles.sin(), torch.arange(T))


def attention(**options):
    return lambda q, k, v: flash_attention(q, k, v, CU_SEQLENS, 7, **options)


def projections(x, weight, a, b):
    return lora_linears(x, [weight, weight], [a, a], [b, b], 2.0)


HEADS = [randn(T, heads, 8, seed=heads) for heads in (4, 2, 1)]
CASES = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-5), [randn(T, D), randn(D, seed=1)]),
    "rms_norm with a residual": (
        lambda x, w, r: rms_norm(x, w, 1e-5, residual=r),
        [randn(T, D), randn(D, seed=1), randn(T, D, seed=2)],
    ),
    "lora_linear": (lambda *t: lora_linear(*t, 2.0), matrices()),
    "lora_linear with dropout": (lambda *t: lora_linear(*t, 2.0, **NOISE), matrices()),
    "lora_linear over bf16": (lambda *t: lora_linear(*t, 2.0), matrices(torch.bfloat16)),
    "lora_linears": (projections, matrices()),
    "flash_attention": (attention(), [HEADS[0], HEADS[1], HEADS[1].flip(0)]),
    "flash_attention, causal": (attention(causal=True), [HEADS[0], HEADS[1], HEADS[1].flip(0)]),
    "flash_attention with dropout": (attention(**NOISE), [HEADS[0], HEADS[1], HEADS[1].flip(0)]),
    "apply_rotary": (rotary, [randn(T, 4, 4)]),
    "info_nce": (lambda q, c: info_nce(q, c, symmetric=True, reduction="none"), [randn(T, D), randn(T, D, seed=1)]),
    "linear_cross_entropy": (
        lambda h, w: linear_cross_entropy(h, w, torch.arange(T), reduction="none"),
        [randn(T, D), randn(T + 3, D, seed=1)],
    ),
    "swiglu": (swiglu, [randn(T, D), randn(T, D, seed=1)]),
    "geglu": (geglu, [randn(T, D), randn(T, D, seed=1)]),
    "segment_pool": (lambda x: segment_pool(x, CU_SEQLENS), [randn(T, D)]),
}


def run(function, tensors):
    """Outputs, then the gradients of the tensors."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    found = function(*leaves)
    outs = found if isinstance(found, (tuple, list)) else (found,)
    upstream = [randn(*out.shape, seed=9 + i, dtype=out.dtype) for i, out in enumerate(outs)]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, upstream)]


@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing(name):
    function, tensors = CASES[name]
    expected = run(function, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(function, tensors)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_shapes_without_values():
    """On meta tensors, for which there is no autocast."""
    x, weight, a, b = (tensor.to("meta").requires_grad_() for tensor in matrices())
    out = lora_linear(rms_norm(x, torch.ones(D, device="meta"), 1e-5), weight, a, b, 2.0)
    assert out.shape == (T, 8) and out.device.type == "meta"
    (grad,) = torch.autograd.grad(out.sum(), [x])
    assert grad.shape == x.shape and grad.device.type == "meta"
