"""The torch backend of ``linear_cross_entropy``: the chunk loop in plain torch, on every device and in every dtype.

The softmax that overwrites the logits is that of all but the target's (``_softmax_rows``); their LSE and top-1 come
from it too: with m their maximum, the softmax of the largest is exp(m - LSE), at least 1/V, so LSE = m - log(max
softmax) without a second exponential. Half-precision operands are multiplied in fp32, tile by tile of the vocabulary
inside the same workspace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bivec.kernels.backend import autocast_kind

# Rows a chunk at V = 49152: 682 on a CPU, where N=350 took 244 ms in one chunk of 69 MB and 283 ms in two of 34 MB (two
# cores, D = 576: every chunk reads the whole weight again). GPUs want about 2,000 rows to fill a GEMM at V = 32000.
DEFAULT_WORKSPACE_BYTES = {"cpu": 128 * 2**20}
DEFAULT_WORKSPACE_BYTES_ACCELERATOR = 256 * 2**20


@dataclass(frozen=True)
class Options:
    """What a call asks for, the tensors aside."""

    ignore_index: int
    reduction: str
    softcap: float | None
    workspace_bytes: int | None


@dataclass(frozen=True)
class _Sweep:
    losses: Tensor  # [N]
    lse: Tensor  # [N]
    correct: Tensor  # [N] bool
    grad_rows: Tensor | None  # [N, D] in hidden's dtype
    grad_weight: Tensor | None  # [V, D] in the accumulation dtype


def accumulation_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """That of logits, sums and the weight's gradient: fp32, or fp64 where an operand is."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def chunking(
    vocab: int,
    num_rows: int,
    *,
    row_bytes: int,
    tile_row_bytes: int,
    workspace_bytes: int | None,
    device: torch.device,
) -> tuple[int, int]:
    """Returns (rows a chunk, vocabulary rows a tile) that keep logits and upcast tile inside the workspace.

    Args:
        vocab: V.
        num_rows: N, the rows to score.
        row_bytes: what the logits of one row take.
        tile_row_bytes: what one row of the weight takes when it is upcast; 0 where it is not.
        workspace_bytes: the bound; None = the default of the device.
        device: where the workspace will be.

    Raises:
        ValueError: a workspace too small for one row of each.
    """
    budget, minimum = workspace_bytes, row_bytes + tile_row_bytes
    if budget is None:
        default = DEFAULT_WORKSPACE_BYTES.get(device.type, DEFAULT_WORKSPACE_BYTES_ACCELERATOR)
        budget = max(default, minimum)
    if budget < minimum:
        raise ValueError(
            f"linear_cross_entropy: workspace_bytes={budget} cannot hold the logits of one row; "
            f"a vocabulary of {vocab} needs at least {minimum} bytes"
        )
    tile = vocab
    if tile_row_bytes:
        tile = min(vocab, max(1, min(budget // 4, budget - row_bytes) // tile_row_bytes))
    limit = max(1, (budget - tile * tile_row_bytes) // row_bytes)
    num_chunks = -(-num_rows // limit) or 1
    # equal chunks: a sliver at the end would read the weight for nothing
    return max(1, -(-num_rows // num_chunks)), tile


def _chunking(hidden: Tensor, weight: Tensor, num_rows: int, options: Options) -> tuple[int, int]:
    dtype = accumulation_dtype(hidden, weight)
    vocab, width = weight.shape
    return chunking(
        vocab,
        num_rows,
        row_bytes=vocab * dtype.itemsize * (1 if options.softcap is None else 2),  # it keeps tanh beside the softmax
        tile_row_bytes=0 if weight.dtype == dtype else width * dtype.itemsize,
        workspace_bytes=options.workspace_bytes,
        device=hidden.device,
    )


def _softmax_rows(
    logits: Tensor, target: Tensor, softcap: float | None, spare: Tensor | None, grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Overwrites the chunk's ``logits`` [n, V]; returns (losses [n], lse [n], correct [n], slopes [n, V], factor [n]).

    dlogits is ``factor`` times ``slopes``. The softmax is that of the logits other than the target's: with L their
    LSE the loss is softplus(L - z_target) and the target's gradient -sigmoid(L - z_target), which keep their digits
    where 1 - softmax(z)_target has none.
    """
    probs = logits
    if softcap is not None:
        logits.div_(softcap).tanh_()
        probs = torch.mul(logits, softcap, out=spare)
    picks = (torch.arange(target.shape[0], device=target.device), target)
    picked = probs[picks]  # [n]
    probs[picks] = torch.finfo(probs.dtype).min / 2  # finite: a vocabulary of one token has loss and gradient 0
    peak = probs.amax(-1)  # [n]
    torch.softmax(probs, -1, out=probs)
    gap = peak - probs.amax(-1).log() - picked  # [n] L - z_target
    losses = torch.logaddexp(gap, torch.zeros_like(gap))
    if grad:
        probs[picks] = -1.0
        if softcap is not None:  # d(c tanh(x/c))/dx = 1 - tanh^2
            probs.mul_(logits.square_().neg_().add_(1.0))
    return losses, losses + picked, peak <= picked, probs, gap.sigmoid()


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    index: Tensor | None,
    options: Options,
    *,
    want_rows: bool,
    want_weight: bool,
    row_scale: Tensor | None = None,
) -> _Sweep:
    """One pass over the chunks. ``row_scale`` [N] multiplies the rows' share of the weight gradient."""
    dtype = accumulation_dtype(hidden, weight)
    num_rows, (vocab, width) = targets.shape[0], weight.shape
    chunk, tile = _chunking(hidden, weight, num_rows, options)
    valid = targets != options.ignore_index
    safe = targets.masked_fill(~valid, 0)
    losses, lse = (torch.zeros(num_rows, dtype=dtype, device=hidden.device) for _ in range(2))
    correct = torch.zeros(num_rows, dtype=torch.bool, device=hidden.device)
    grad_rows = hidden.new_empty(num_rows, width) if want_rows else None
    grad_weight = torch.zeros(vocab, width, dtype=dtype, device=hidden.device) if want_weight else None
    workspace = torch.empty(min(chunk, num_rows), vocab, dtype=dtype, device=hidden.device)
    spare = None if options.softcap is None else torch.empty_like(workspace)
    tiles = range(0, vocab, tile)

    for start in range(0, num_rows, chunk):
        span = slice(start, min(start + chunk, num_rows))
        rows = (hidden[span] if index is None else hidden.index_select(0, index[span])).to(dtype)  # [n, D]
        logits = workspace[: rows.shape[0]]  # [n, V]
        for v in tiles:
            torch.mm(rows, weight[v : v + tile].to(dtype).t(), out=logits[:, v : v + tile])
        buffer = None if spare is None else spare[: rows.shape[0]]
        losses[span], lse[span], correct[span], slopes, factor = _softmax_rows(
            logits, safe[span], options.softcap, buffer, want_rows or want_weight
        )
        factor = factor.masked_fill(~valid[span], 0.0)[:, None]  # [n, 1]
        if grad_rows is not None:
            grad = torch.zeros_like(rows)
            for v in tiles:
                grad.addmm_(slopes[:, v : v + tile], weight[v : v + tile].to(dtype))
            grad_rows[span] = grad.mul_(factor).masked_fill_(~valid[span, None], 0.0)
        if grad_weight is not None:
            scale = factor if row_scale is None else factor * row_scale[span, None]
            grad_weight.addmm_(slopes.t(), rows * scale)
    losses.masked_fill_(~valid, 0.0)
    lse.masked_fill_(~valid, 0.0)
    return _Sweep(losses, lse, correct.logical_and_(valid), grad_rows, grad_weight)


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight, targets, index, factor, options) -> loss, lse, correct; forms the gradients in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        index: Tensor | None,
        factor: Tensor,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The chunk loop. ``factor``, 0-dim, multiplies the summed loss."""
        want_rows, want_weight = ctx.needs_input_grad[:2]
        ctx.recompute_weight = want_weight and options.reduction == "none"
        kept = None
        if hidden.device.type == "cpu":  # drops the ignored rows before the GEMM; a GPU would have to synchronise
            valid = targets != options.ignore_index
            if not valid.all():
                kept = valid.nonzero().squeeze(-1)  # [kept rows]
        num_targets = targets.shape[0]
        if kept is not None:
            index = kept if index is None else index[kept]
            targets = targets[kept]
        with torch.autocast(autocast_kind(hidden), enabled=False):
            sweep = _sweep(
                hidden,
                weight,
                targets,
                index,
                options,
                want_rows=want_rows,
                want_weight=want_weight and not ctx.recompute_weight,
            )
        losses, lse, correct = sweep.losses, sweep.lse, sweep.correct
        if kept is not None:
            losses, lse, correct = (x.new_zeros(num_targets).index_copy_(0, kept, x) for x in (losses, lse, correct))
        inputs = (hidden, weight, targets) if ctx.recompute_weight else (None, None, None)
        ctx.save_for_backward(sweep.grad_rows, sweep.grad_weight, index, kept, factor, *inputs)
        ctx.options, ctx.hidden_shape, ctx.weight_dtype = options, hidden.shape, weight.dtype
        ctx.mark_non_differentiable(lse, correct)
        ctx.set_materialize_grads(False)
        return (losses if options.reduction == "none" else losses.sum() * factor), lse, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scales what the forward formed; with a trainable weight and a loss a row, forms its gradient again."""
        if grad_loss is None:
            return None, None, None, None, None, None
        grad_rows, grad_weight, index, kept, factor, hidden, weight, targets = ctx.saved_tensors
        per_row = ctx.options.reduction == "none"
        scale = grad_loss if per_row else grad_loss * factor  # [N] or 0-dim
        if per_row and kept is not None:
            scale = scale[kept]  # [kept rows]
        grad_hidden = None
        if grad_rows is not None:
            # a factor without dimensions would be rounded to hidden's dtype first
            grad_hidden = torch.mul(grad_rows, scale.reshape(-1, 1), out=torch.empty_like(grad_rows))  # [rows, D]
            if index is not None:  # rows are unique: nothing to add up, so no atomics
                grad_hidden = grad_hidden.new_zeros(ctx.hidden_shape).index_copy_(0, index, grad_hidden)
        if ctx.recompute_weight:
            with torch.autocast(autocast_kind(grad_loss), enabled=False):
                wanted = {"want_rows": False, "want_weight": True}
                again = _sweep(hidden, weight, targets, index, ctx.options, **wanted, row_scale=scale).grad_weight
            grad_weight = None if again is None else again.to(ctx.weight_dtype)
        elif grad_weight is not None:
            out = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = torch.mul(
                grad_weight, scale, out=out
            )  # scales and rounds in one pass, keeps the saved tensor
        return grad_hidden, grad_weight, None, None, None, None
