"""The Triton backend of ``swiglu`` and ``geglu``: one kernel forward and one backward, for both activations.

    out = g · σ(z) · u          z = g · (a + b · g²)          σ(z) = 1 / (1 + e^-z)

SiLU is a = 1, b = 0. The tanh form of GELU is a = 2 √(2/π), b = 0.044715 a, since (1 + tanh(z/2)) / 2 = σ(z). Then

    du = dout · g · σ          dg = dout · u · (σ + g · (a + 3 b · g²) · σ (1 - σ))

With e = e^-|z| and r = 1 / (1 + e), σ is r or e r and σ (1 - σ) is e r²: nothing overflows and nothing cancels. All
arithmetic is in fp32.

A program owns BLOCK_N neighbouring elements of a row; tensors without gaps count as a single row. gate and up may be
slices of one projection [T, 2 I].

Saved for backward: gate and up, nothing else. Elements moved: forward 2 reads and 1 write, backward 3 and 2. With
``overwrite`` the backward's writes go over gate and up, and it allocates nothing.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs
# No `from __future__ import annotations`: torch.library reads the operators' schemas from the annotations.

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from bivec.kernels.attention_tiles import LOG2E
from bivec.kernels.launch import architecture, launch
from bivec.kernels.tuning import config_for

TANH_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)
CURVES = {"silu": (1.0, 0.0), "gelu": (TANH_SLOPE, 0.044715 * TANH_SLOPE)}  # a and b
LARGEST_SQUARE = tl.constexpr(1024.0)  # σ is 0 or 1 from g = 32 on either way, and nothing overflows to inf · 0


@triton.jit
def sigmoid_and_slope(gate, a, b):
    """σ(z) and σ(z) + g · dσ(z)/dg, by which the activation g · σ(z) rises."""
    square = tl.minimum(gate * gate, LARGEST_SQUARE)
    z = gate * (a + b * square)
    e = tl.exp2(-tl.abs(z) * LOG2E)
    r = 1.0 / (1.0 + e)
    sigmoid = tl.where(z >= 0.0, r, e * r)
    return sigmoid, sigmoid + gate * (a + 3.0 * b * square) * (e * r * r)


@triton.jit
def place(width, blocks, BLOCK_N: tl.constexpr):
    """A program's row, its columns ``[BLOCK_N]``, and which of them there are; a row has ``blocks`` blocks."""
    program = tl.program_id(0)
    first = (program % blocks).to(tl.int64) * BLOCK_N
    columns = tl.arange(0, BLOCK_N)
    return (program // blocks).to(tl.int64), first + columns, columns < width - first


@triton.jit(do_not_specialize=["blocks"])
def gated_unit_forward(
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_stride,
    up_stride,
    width,
    blocks,
    a,
    b,
    BLOCK_N: tl.constexpr,
):
    """Grid: blocks of rows."""
    row, columns, mask = place(width, blocks, BLOCK_N)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N]
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid, _ = sigmoid_and_slope(gate, a, b)
    tl.store(out_ptr + row * width + columns, (gate * sigmoid * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["blocks"])
def gated_unit_backward(
    d_out_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    d_up_ptr,
    d_out_stride,
    gate_stride,
    up_stride,
    d_gate_stride,
    d_up_stride,
    width,
    blocks,
    a,
    b,
    BLOCK_N: tl.constexpr,
):
    """Grid: blocks of rows. ``d_gate`` and ``d_up`` may be ``gate`` and ``up``."""
    row, columns, mask = place(width, blocks, BLOCK_N)
    d_out = tl.load(d_out_ptr + row * d_out_stride + columns, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N]
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid, slope = sigmoid_and_slope(gate, a, b)
    d_gate = d_out * up * slope
    # NaN where up is: so that, over up, no thread writes an element before the thread that reads it has read it
    d_up = tl.where(up == up, d_out * gate * sigmoid, float("nan"))
    tl.store(d_gate_ptr + row * d_gate_stride + columns, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(d_up_ptr + row * d_up_stride + columns, d_up.to(d_up_ptr.dtype.element_ty), mask=mask)


def has_rows(x: Tensor) -> bool:
    """Whether ``x [..., N]`` can be seen as rows of neighbouring elements, a constant stride apart."""
    if x.numel() == 0 or x.is_contiguous():
        return True
    if x.dim() == 0 or x.stride(-1) != 1:
        return False
    sizes, strides = x.shape[:-1], x.stride()[:-1]
    kept = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size > 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(kept))


def _rows(*tensors: Tensor) -> list[Tensor]:
    """``[rows, N]`` each, those copied that are not ``has_rows``; a single row where none has gaps."""
    shape = tensors[0].shape
    seen = [x if has_rows(x) else x.contiguous() for x in tensors]
    if all(x.is_contiguous() for x in seen):
        return [x.view(1, -1) for x in seen]
    return [x.view(math.prod(shape[:-1]), shape[-1]) for x in seen]


def _launch(kernel: Any, tensors: dict[str, Tensor], activation: str, strides: dict[str, int]) -> None:
    first = next(iter(tensors.values()))  # [rows, N]
    config = config_for("swiglu", kernel.__name__, architecture(first.device), itemsize=first.element_size())
    a, b = CURVES[activation]
    blocks = triton.cdiv(first.shape[1], config.blocks["BLOCK_N"])  # of a row
    arguments = {**tensors, **strides, "width": first.shape[1], "blocks": blocks, "a": a, "b": b, **config.blocks}
    if first.numel():
        launch(kernel, (first.shape[0] * blocks,), arguments, num_warps=config.num_warps, num_stages=config.num_stages)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Launches the forward kernel; see ``gated_unit_op``."""
    out = gate.new_empty(gate.shape)
    gate, up = _rows(gate, up)
    tensors = {"gate_ptr": gate, "up_ptr": up, "out_ptr": out}
    _launch(gated_unit_forward, tensors, activation, {"gate_stride": gate.stride(0), "up_stride": up.stride(0)})
    return out


def backward(d_out: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor, activation: str) -> None:
    """Launches the backward kernel, which fills ``d_gate`` and ``d_up``: new tensors without gaps, or gate and up."""
    d_out, gate, up, d_gate, d_up = _rows(d_out, gate, up, d_gate, d_up)
    tensors = {"d_out_ptr": d_out, "gate_ptr": gate, "up_ptr": up, "d_gate_ptr": d_gate, "d_up_ptr": d_up}
    strides = {name.replace("_ptr", "_stride"): x.stride(0) for name, x in tensors.items()}
    _launch(gated_unit_backward, tensors, activation, strides)


@torch.library.custom_op("bivec::gated_unit", mutates_args=())
def gated_unit_op(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up``.

    Args:
        gate: any shape, of ``TRITON_DTYPES``.
        up: as gate.
        activation: a key of ``CURVES``.
    """
    return forward(gate, up, activation)


@gated_unit_op.register_fake
def _(gate: Tensor, *_: Any) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("bivec::gated_unit_backward", mutates_args=())
def gated_unit_backward_op(d_out: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up; ``d_out`` has their shape and dtype."""
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    backward(d_out, gate, up, d_gate, d_up, activation)
    return d_gate, d_up


@gated_unit_backward_op.register_fake
def _(_d_out: Tensor, gate: Tensor, up: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@torch.library.custom_op("bivec::gated_unit_backward_", mutates_args=("gate", "up"))
def gated_unit_backward_inplace_op(d_out: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """Overwrites gate and up, which do not overlap, by their gradients."""
    if has_rows(gate) and has_rows(up):
        backward(d_out, gate, up, gate, up, activation)
    else:  # the kernel has no way to write such a layout
        d_gate, d_up = gated_unit_backward_op(d_out, gate, up, activation)
        gate.copy_(d_gate)
        up.copy_(d_up)


@gated_unit_backward_inplace_op.register_fake
def _(*_: Any) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return *gated_unit_backward_op(d_out, *ctx.saved_tensors, ctx.activation), None


gated_unit_op.register_autograd(_differentiate, setup_context=_save)


class _Overwriting(torch.autograd.Function):
    """The gradients are in the memory of gate and up; that the operator mutates them raises their versions."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        out: Tensor = gated_unit_op(gate, up, activation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = (x.detach() for x in ctx.saved_tensors)
        gated_unit_backward_inplace_op(d_out, gate, up, ctx.activation)
        return gate, up, None


def gated_unit(gate: Tensor, up: Tensor, activation: str, overwrite: bool) -> Tensor:
    """``swiglu`` or ``geglu`` of operands that they have checked."""
    run: Callable[..., Tensor] = _Overwriting.apply if overwrite else gated_unit_op
    return run(gate, up, activation)
