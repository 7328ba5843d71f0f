"""The gated activations of the feed-forward block: SwiGLU and GeGLU.

    swiglu(g, u) = g · sigmoid(g) · u            geglu(g, u) = gelu_tanh(g) · u

Saved for backward: g and u, nothing else; the activation is recomputed. Elementwise, so memory-bound: forward reads 2
and writes 1 tensor, backward reads 3 and writes 2.

With ``overwrite`` the backward writes over gate and up, the largest activations of a layer, and allocates a sixteenth
of each. This is the torch backend; ``kernels/swiglu_triton.py`` is one pass over memory each way.

Source: Shazeer, "GLU Variants Improve Transformer" (2020); the tanh form of GELU is Gemma's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bivec.kernels.backend import check_triton_dtypes, resolve
from bivec.kernels.overwriting import check_overwritable

SMALLEST_PART = 1 << 18  # elements that a part of an overwriting backward has at least


def _gated(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def _gradients(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dup = _gated(gate, activation).mul_(dy)
    dgate = dy * up
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    else:
        torch.ops.aten.gelu_backward.grad_input(dgate, gate, approximate="tanh", grad_input=dgate)
    return dgate, dup


def _overwrite_by_gradients(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """A few slices along the first dimension at a time, so that what is between is small."""
    dy, gate, up = torch.atleast_1d(dy, gate, up)
    elements = max(gate.numel() // 16, SMALLEST_PART)
    slices = max(elements * gate.shape[0] // max(gate.numel(), 1), 1)
    for part_dy, part_gate, part_up in zip(dy.split(slices), gate.split(slices), up.split(slices), strict=True):
        d_gate, d_up = _gradients(part_dy, part_gate, part_up, activation)
        part_gate.copy_(d_gate)
        part_up.copy_(d_up)


class _GatedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, overwrite: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.overwrite = activation, overwrite
        return _gated(gate, activation).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if not ctx.overwrite:
            return *_gradients(dy, gate, up, ctx.activation), None, None
        gate, up = gate.detach(), up.detach()  # views that share memory and version
        _overwrite_by_gradients(dy, gate, up, ctx.activation)
        return gate, up, None, None


def _gated_unit(op: str, gate: Tensor, up: Tensor, activation: str, overwrite: bool, backend: str | None) -> Tensor:
    chosen = resolve(backend, op, gate.device)
    if gate.shape != up.shape or gate.dtype != up.dtype or not gate.is_floating_point():
        raise ValueError(
            f"{op}: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} "
            "must have one shape and floating-point dtype"
        )
    if up.device != gate.device:
        raise ValueError(f"{op}: up is on {up.device}, gate on {gate.device}; move them together")
    if overwrite:
        check_overwritable(op, "overwrite=True", gate=gate, up=up)
    overwrite = overwrite and not torch.compiler.is_compiling()  # which reuses memory by itself
    if chosen == "triton":
        from bivec.kernels import swiglu_triton  # triton is an optional dependency

        check_triton_dtypes(op, gate=gate)
        return swiglu_triton.gated_unit(gate, up, activation, overwrite)
    out: Tensor = _GatedUnit.apply(gate, up, activation, overwrite)
    return out


def swiglu(gate: Tensor, up: Tensor, *, overwrite: bool = False, backend: str | None = None) -> Tensor:
    """``silu(gate) * up``.

    Args:
        gate: any shape and float dtype; fp16, bf16 or fp32 with the Triton backend.
        up: as ``gate``.
        overwrite: the backward writes the gradients into the storage of gate and up instead of allocating; they must
            not be needed by anybody else's backward, and a second backward through the graph raises autograd's version
            error. Compiled by torch.compile, nothing is overwritten.
        backend: None, "torch" or "triton".

    Returns:
        Tensor like ``gate``.

    Raises:
        ValueError: shapes, dtypes or devices differ, or are not floating point; operands that cannot be overwritten.
        BackendError: the backend cannot be used here, or not with these dtypes.

    Source: Shazeer 2020.
    """
    return _gated_unit("swiglu", gate, up, "silu", overwrite, backend)


def geglu(gate: Tensor, up: Tensor, *, overwrite: bool = False, backend: str | None = None) -> Tensor:
    """``gelu_tanh(gate) * up``; arguments, result and errors as :func:`swiglu`.

    Source: Shazeer 2020.
    """
    return _gated_unit("geglu", gate, up, "gelu", overwrite, backend)
