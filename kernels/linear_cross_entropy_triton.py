"""The Triton backend of ``linear_cross_entropy``: three GEMMs a chunk of rows and, between them, one kernel in place.

The kernel. A program owns a row of logits, and walks over it twice. First it keeps, in every lane, a running maximum
and sum of exponentials of the logits that are *not* the target's; merged at the end, with p = exp(z_target - top) and
q = sum exp(z_other - top), top being the largest logit,

    loss = top - z_target + log(p + q)        dz_target = -q / (p + q)        dz_j = exp(z_j - top) / (p + q)

so that nothing cancels in a row that is nearly solved, where p - 1 from a softmax would keep no digit. Then it reads
the row again, from the cache, and writes dz over it, in the dtype of the operands: both gradient GEMMs run in half
precision on a strided view of the fp32 workspace, dz being in the first half of every row.

In place. Block b of a row, of B logits, is bytes 4bB … 4bB + 4B, and its half-precision dz goes to bytes 2bB … 2bB +
2B: into the block for b = 0, and before it for b > 0, over logits of blocks before b. So a store meets only loads of
its own block and of earlier ones, and one barrier a block, between its loads and its stores, puts all of them in order.
(AMD's barrier does not wait for loads under way. There dz is fp32, and a lane overwrites what it has read itself.)

fp16. Below 6e-5 its numbers lose bits, and most probabilities are smaller. dz is stored times 2^15, which cannot
overflow since -1 <= dz <= 1 (the softcap's slope is at most 1 as well), and the GEMMs, which accumulate in fp32, take
the factor out again through their ``alpha``.

Rows of the workspace are padded to 128 bytes, so that loads are wide and cuBLAS finds aligned operands at any V.

Saved for backward are the gradients that the forward formed (``kernels/linear_cross_entropy.py``). Nothing is added by
atomics: a row and an output tile of a GEMM have one owner each, so repeated runs give the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, no-check-untyped-defs
# No `from __future__ import annotations`: torch.library reads the operator's schema from the annotations.
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from bivec.kernels.attention_tiles import LOG2E, tanh
from bivec.kernels.gemm import multiplies_halves, multiply_
from bivec.kernels.launch import architecture, launch
from bivec.kernels.linear_cross_entropy_torch import chunking
from bivec.kernels.tuning import config_for

ROW_ALIGNMENT = 32  # fp32 logits: 128 bytes
GRADIENT_SCALE = {torch.float16: 2.0**15}  # what dz is stored times; 1 in the other dtypes
NEVER = tl.constexpr(-1e38)  # below every logit and finite: -inf minus itself would be NaN


@triton.jit
def capped(logits, softcap, HAS_SOFTCAP: tl.constexpr):
    """The logits that the loss is of."""
    if HAS_SOFTCAP:
        return tanh(logits / softcap) * softcap
    else:
        return logits


@triton.jit
def add_block(peak, total, logits):
    """One block more in the running maxima and sums ``[BLOCK_V]``, with one exponential an element."""
    distance = logits - peak
    fade = tl.exp2(-tl.abs(distance) * LOG2E)
    total = tl.where(distance > 0.0, total * fade + 1.0, total + fade)
    return tl.maximum(peak, logits), total


@triton.jit
def gradient_block(logits, is_target, top, scale, target_gradient, softcap, HAS_SOFTCAP: tl.constexpr):
    """dz of one block, from its logits before the cap."""
    z = capped(logits, softcap, HAS_SOFTCAP)
    gradient = tl.where(is_target, target_gradient, tl.exp2((z - top) * LOG2E) * scale)
    if HAS_SOFTCAP:  # the slope of c tanh(x / c) is 1 - tanh²
        t = z / softcap
        gradient *= 1.0 - t * t
    return gradient


@triton.jit(do_not_specialize_on_alignment=["targets_ptr", "row_scale_ptr", "losses_ptr", "lse_ptr", "correct_ptr"])
def cross_entropy_rows(
    logits_ptr,
    gradient_ptr,
    targets_ptr,
    row_scale_ptr,
    losses_ptr,
    lse_ptr,
    correct_ptr,
    logits_stride,
    gradient_stride,
    vocab,
    ignore_index,
    softcap,
    gradient_scale,
    BLOCK_V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    WANT_GRADIENT: tl.constexpr,
):
    """Grid: rows. ``gradient_ptr`` is the memory of ``logits_ptr`` in the operands' dtype."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    gradient_ptr += row * gradient_stride
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK_V)  # [BLOCK_V]
    whole = vocab // BLOCK_V * BLOCK_V  # logits in blocks that need no mask
    in_tail = whole + columns < vocab
    dtype = gradient_ptr.dtype.element_ty

    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(correct_ptr + row, False)
        if WANT_GRADIENT:
            nothing = tl.zeros([BLOCK_V], dtype)
            for first in range(0, whole, BLOCK_V):
                tl.store(gradient_ptr + first + columns, nothing)
            tl.store(gradient_ptr + whole + columns, nothing, mask=in_tail)
    else:
        # A target outside the vocabulary, which no host has looked at on a GPU, makes its row NaN.
        exists = (target >= 0) & (target < vocab)
        aim = capped(tl.load(logits_ptr + target, mask=exists, other=float("nan")), softcap, HAS_SOFTCAP)
        own = target.to(tl.int32)  # its column

        peak = tl.full([BLOCK_V], NEVER, tl.float32)
        total = tl.zeros([BLOCK_V], tl.float32)
        for first in range(0, whole, BLOCK_V):
            z = capped(tl.load(logits_ptr + first + columns), softcap, HAS_SOFTCAP)  # [BLOCK_V]
            peak, total = add_block(peak, total, tl.where(first + columns == own, float("-inf"), z))
        if whole < vocab:
            z = capped(tl.load(logits_ptr + whole + columns, mask=in_tail, other=0.0), softcap, HAS_SOFTCAP)
            other = in_tail & (whole + columns != own)
            peak, total = add_block(peak, total, tl.where(other, z, float("-inf")))

        rival = tl.max(peak, 0)  # the largest logit that is not the target's
        top = tl.maximum(rival, aim)
        q = tl.sum(total * tl.exp2((peak - rival) * LOG2E), 0) * tl.exp2((rival - top) * LOG2E)
        p = tl.exp2((aim - top) * LOG2E)
        log_sum = tl.where(q < 0.0078125, q * (1.0 - q * (0.5 - q * 0.3333333333333333)), tl.log(p + q))  # q < 1: p = 1
        tl.store(losses_ptr + row, top - aim + log_sum)
        tl.store(lse_ptr + row, top + log_sum)
        tl.store(correct_ptr + row, rival <= aim)

        if WANT_GRADIENT:
            scale = gradient_scale / (p + q)
            if HAS_ROW_SCALE:
                scale *= tl.load(row_scale_ptr + row)
            for first in range(0, whole, BLOCK_V):
                logits = tl.load(logits_ptr + first + columns)
                is_target = first + columns == own
                gradient = gradient_block(logits, is_target, top, scale, -q * scale, softcap, HAS_SOFTCAP)
                tl.debug_barrier()
                tl.store(gradient_ptr + first + columns, gradient.to(dtype))
            if whole < vocab:
                logits = tl.load(logits_ptr + whole + columns, mask=in_tail, other=float("-inf"))
                is_target = whole + columns == own
                gradient = gradient_block(logits, is_target, top, scale, -q * scale, softcap, HAS_SOFTCAP)
                tl.debug_barrier()
                tl.store(gradient_ptr + whole + columns, gradient.to(dtype), mask=in_tail)


def cross_entropy_pass(
    logits: Tensor,
    gradient: Tensor,
    targets: Tensor,
    losses: Tensor,
    lse: Tensor,
    correct: Tensor,
    *,
    ignore_index: int,
    softcap: float | None,
    want_gradient: bool,
    row_scale: Tensor | None = None,
) -> None:
    """Fills ``losses``, ``lse`` and ``correct`` ``[n]``, and writes dz over the logits.

    Args:
        logits: ``[n, V]`` fp32, columns contiguous.
        gradient: ``[n, V]``, a view of the same memory in the operands' dtype: row i begins where that of ``logits``
            does. Holds afterwards ``row_scale * dz``, in fp16 times ``GRADIENT_SCALE``, where ``want_gradient``.
        targets: ``[n]`` int64.
        losses: ``[n]`` fp32, filled.
        lse: ``[n]`` fp32, filled.
        correct: ``[n]`` bool, filled.
        ignore_index: rows with this target have no loss and no gradient.
        softcap: c of ``c * tanh(logits / c)``, or None.
        want_gradient: False leaves dz out.
        row_scale: ``[n]`` fp32, at most 1 in magnitude, or None.
    """
    config = config_for("cross_entropy", "cross_entropy_rows", architecture(logits.device))
    arguments = {
        "logits_ptr": logits,
        "gradient_ptr": gradient,
        "targets_ptr": targets,
        "row_scale_ptr": row_scale,
        "losses_ptr": losses,
        "lse_ptr": lse,
        "correct_ptr": correct,
        "logits_stride": logits.stride(0),
        "gradient_stride": gradient.stride(0),
        "vocab": logits.shape[1],
        "ignore_index": ignore_index,
        "softcap": 1.0 if softcap is None else softcap,
        "gradient_scale": GRADIENT_SCALE.get(gradient.dtype, 1.0),
        "HAS_SOFTCAP": softcap is not None,
        "HAS_ROW_SCALE": row_scale is not None,
        "WANT_GRADIENT": want_gradient,
        **config.blocks,
    }
    launch(
        cross_entropy_rows,
        (logits.shape[0],),
        arguments,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What dz is stored in: the operands' dtype, or fp32 where they differ or the GEMMs take nothing less."""
    dtype, device = hidden.dtype, hidden.device
    if dtype != weight.dtype or architecture(device).startswith("gfx"):
        return torch.float32
    emulated = device.type != "cuda"  # by the interpreter, or compiled ahead of time: as on an NVIDIA GPU
    return dtype if emulated or multiplies_halves(dtype, device) else torch.float32


def sweep(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    index: Tensor | None,
    row_scale: Tensor | None,
    *,
    ignore_index: int,
    softcap: float | None,
    workspace_bytes: int | None,
    want_rows: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The chunk loop: losses, lse, correct ``[N]``, and the gradients of the selected rows and of the weight.

    ``row_scale`` ``[N]`` fp32, at most 1 in magnitude, multiplies the rows' dz. The gradients are those of the sum of
    the losses, ``[N, D]`` in hidden's dtype and ``[V, D]`` fp32; ``[0, D]`` where not wanted.
    """
    device, num_rows, (vocab, width) = hidden.device, targets.shape[0], weight.shape
    dtype = operand_dtype(hidden, weight)
    stride = -(-vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT
    upcast = weight.dtype != torch.float32 and not (dtype == weight.dtype and multiplies_halves(dtype, device))
    chunk, tile = chunking(
        vocab,
        num_rows,
        row_bytes=4 * stride,
        tile_row_bytes=4 * width if upcast else 0,
        workspace_bytes=workspace_bytes,
        device=device,
    )
    tiles = [slice(v, min(v + tile, vocab)) for v in range(0, vocab, tile)]
    losses, lse = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(2))
    correct = torch.empty(num_rows, dtype=torch.bool, device=device)
    grad_rows = hidden.new_empty(num_rows if want_rows else 0, width)
    grad_weight = torch.zeros(vocab if want_weight else 0, width, dtype=torch.float32, device=device)
    workspace = torch.empty(min(chunk, num_rows), stride, dtype=torch.float32, device=device)
    products = torch.empty(min(chunk, num_rows) if want_rows else 0, width, dtype=torch.float32, device=device)
    unscale = 1.0 / GRADIENT_SCALE.get(dtype, 1.0)

    for start in range(0, num_rows, chunk):
        span = slice(start, min(start + chunk, num_rows))
        rows = hidden[span] if index is None else hidden.index_select(0, index[span])  # [n, D]
        logits = workspace[: rows.shape[0], :vocab]  # [n, V]
        gradient = workspace.view(dtype)[: rows.shape[0], :vocab]  # [n, V], over the logits
        for v in tiles:
            multiply_(logits[:, v], rows, weight[v].t(), add=False)
        cross_entropy_pass(
            logits,
            gradient,
            targets[span],
            losses[span],
            lse[span],
            correct[span],
            ignore_index=ignore_index,
            softcap=softcap,
            want_gradient=want_rows or want_weight,
            row_scale=None if row_scale is None else row_scale[span],
        )
        if want_rows:
            grad = products[: rows.shape[0]]
            for v in tiles:
                multiply_(grad, gradient[:, v], weight[v], add=v.start > 0, alpha=unscale)
            grad_rows[span] = grad
        if want_weight:
            rows = rows.masked_fill(targets[span, None] == ignore_index, 0.0)  # their dz is 0, and 0 * NaN is NaN
            for v in tiles:
                multiply_(grad_weight[v], gradient[:, v].t(), rows, add=True, alpha=unscale)
    return losses, lse, correct, grad_rows, grad_weight


@torch.library.custom_op("bivec::linear_cross_entropy", mutates_args=())
def cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    index: Tensor | None,
    factor: Tensor | None,
    row_scale: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    workspace_bytes: int | None,
    want_rows: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and what :func:`sweep` returns besides.

    The loss is the sum times ``factor``, 0-dim, or without a factor the losses ``[N]``.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        losses, lse, correct, grad_rows, grad_weight = sweep(
            hidden,
            weight,
            targets.contiguous(),
            index,
            row_scale,
            ignore_index=ignore_index,
            softcap=softcap,
            workspace_bytes=workspace_bytes,
            want_rows=want_rows,
            want_weight=want_weight,
        )
    loss = losses if factor is None else losses.sum() * factor
    return loss, lse, correct, grad_rows, grad_weight


@cross_entropy_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, _index: Tensor | None, factor: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    want_rows, want_weight = others[-2:]
    num_rows, (vocab, width) = targets.shape[0], weight.shape
    losses, lse = (hidden.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    return (
        losses if factor is None else losses.new_empty(()),
        lse,
        hidden.new_empty(num_rows, dtype=torch.bool),
        hidden.new_empty(num_rows if want_rows else 0, width),
        hidden.new_empty(vocab if want_weight else 0, width, dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, weight, targets, index, factor, _, *ctx.options, _, _ = inputs
    grad_rows, grad_weight = output[3:]
    ctx.wanted = ctx.needs_input_grad[:2]
    recompute = ctx.wanted[1] and factor is None
    operands = (hidden, weight, targets) if recompute else (None, None, None)
    ctx.save_for_backward(grad_rows, grad_weight, index, factor, *operands)
    ctx.hidden_shape, ctx.weight_dtype = hidden.shape, weight.dtype
    ctx.set_materialize_grads(False)


@once_differentiable
def _differentiate(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """Scales what the forward formed. The other outputs have no gradient: they are handed out detached."""
    nothing = (None,) * 9
    if d_loss is None:
        return None, None, *nothing
    grad_rows, grad_weight, index, factor, hidden, weight, targets = ctx.saved_tensors
    scale = d_loss if factor is None else d_loss * factor  # [N] or 0-dim
    d_hidden = d_weight = None
    if ctx.wanted[0]:
        # [N, 1] or [1, 1]: a factor without dimensions would be rounded to hidden's dtype first
        d_hidden = torch.mul(grad_rows, scale.reshape(-1, 1), out=torch.empty_like(grad_rows))
        if index is not None:  # rows are unique: nothing to add up, so no atomics
            d_hidden = d_hidden.new_zeros(ctx.hidden_shape).index_copy_(0, index, d_hidden)
    if ctx.wanted[1] and factor is None:
        top = scale.abs().amax().clamp_min(1e-30) if scale.numel() else scale.new_ones(())
        *_, grad_weight = cross_entropy_op(
            hidden, weight, targets, index, None, scale / top, *ctx.options, want_rows=False, want_weight=True
        )
        scale = top
    if ctx.wanted[1]:
        d_weight = torch.mul(grad_weight, scale, out=torch.empty_like(grad_weight, dtype=ctx.weight_dtype))
    return d_hidden, d_weight, *nothing


cross_entropy_op.register_autograd(_differentiate, setup_context=_save)
