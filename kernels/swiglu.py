"""The gated activations of the feed-forward block: SwiGLU and GeGLU.

    swiglu(g, u) = g · sigmoid(g) · u            geglu(g, u) = gelu_tanh(g) · u

Saved for backward: g and u, nothing else; the activation is recomputed. Elementwise, so memory-bound: forward reads 2
and writes 1 tensor, backward reads 3 and writes 2.

Source: Shazeer, "GLU Variants Improve Transformer" (2020); the tanh form of GELU is Gemma's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bivec.kernels.backend import resolve


def _gated(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


class _GatedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _gated(gate, activation).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        gate, up = ctx.saved_tensors
        dup = _gated(gate, ctx.activation).mul_(dy)
        dgate = dy * up
        if ctx.activation == "silu":
            torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        else:
            torch.ops.aten.gelu_backward.grad_input(dgate, gate, approximate="tanh", grad_input=dgate)
        return dgate, dup, None


def _checked(gate: Tensor, up: Tensor, op: str) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype or not gate.is_floating_point():
        raise ValueError(
            f"{op}: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} "
            "must have one shape and floating-point dtype"
        )


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """``silu(gate) * up``.

    Args:
        gate: any shape and float dtype.
        up: as ``gate``.
        backend: None, "torch" or "triton".

    Returns:
        Tensor like ``gate``.

    Raises:
        ValueError: shapes or dtypes differ, or are not floating point.

    Source: Shazeer 2020.
    """
    resolve(backend, "swiglu")
    _checked(gate, up, "swiglu")
    return _GatedUnit.apply(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """``gelu_tanh(gate) * up``; arguments, result and errors as :func:`swiglu`.

    Source: Shazeer 2020.
    """
    resolve(backend, "geglu")
    _checked(gate, up, "geglu")
    return _GatedUnit.apply(gate, up, "gelu")
