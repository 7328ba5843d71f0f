"""Cross-entropy of a linear head over selected rows, without ever holding the [rows, vocabulary] logits.

    z_i = hidden[index_i] @ weight^T                  (z_i := c * tanh(z_i / c) with ``softcap=c``)
    loss_i = logsumexp(z_i) - z_i[target_i]
    dz_i = softmax(z_i) - onehot(target_i)
    dhidden[index_i] = dz_i @ weight                  dweight = sum_i dz_i^T hidden[index_i]

Algorithm. The selected rows are cut into chunks whose fp32 logits fit ``workspace_bytes``. Per chunk: one GEMM writes
the logits into the workspace, one softmax overwrites them in place, and the gradient GEMMs consume them before the next
chunk reuses the memory. LSE and top-1 come from the same pass: with m = max z, the softmax of the largest logit is
exp(m - LSE), at least 1/V, so LSE = m - log(max softmax) without a second exponential.

Saved for backward: the gradient of the selected rows [N, D], not yet divided by the count (so that fp16 does not
underflow), and with a trainable head the fp32 dweight [V, D]. The backward only scales and scatters them. With
``reduction="none"`` a head's gradient cannot be rescaled per row afterwards, so it is computed again in the backward.

Cost: 2NVD FLOP for the logits, 2NVD for dhidden, 2NVD for dweight where it is wanted (plus 2NVD to recompute the logits
with ``reduction="none"``). Memory beyond inputs and gradients: the workspace. Half-precision operands are multiplied in
fp32, tile by tile of the vocabulary inside the same workspace.

The idea of forming the gradient in the forward pass, chunk by chunk, is that of Liger-Kernel (Hsu et al. 2024,
arXiv:2410.10989); Wijmans et al. 2024 (arXiv:2411.09009) is the recomputing alternative, which costs one more GEMM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bivec.kernels.backend import resolve

# Rows a chunk at V = 49152: 682 on a CPU, where N=350 took 244 ms in one chunk of 69 MB and 283 ms in two of 34 MB (two
# cores, D = 576: every chunk reads the whole weight again). GPUs want about 2,000 rows to fill a GEMM at V = 32000.
DEFAULT_WORKSPACE_BYTES = {"cpu": 128 * 2**20}
DEFAULT_WORKSPACE_BYTES_ACCELERATOR = 256 * 2**20


@dataclass(frozen=True)
class CrossEntropyStats:
    """What the loss pass knows anyway. Nothing here carries a gradient."""

    lse: Tensor  # [N] fp32 (fp64 for fp64 operands), natural log; 0 for an ignored row
    correct: Tensor  # [N] bool: no logit is larger than the target's; False for an ignored row
    count: Tensor  # 0-dim int64: the rows that are not ignored


@dataclass(frozen=True)
class _Options:
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


def _accumulation_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _chunking(hidden: Tensor, weight: Tensor, num_rows: int, options: _Options) -> tuple[int, int]:
    """Returns (rows a chunk, vocabulary rows a tile) that keep logits and upcast tile inside the workspace."""
    dtype = _accumulation_dtype(hidden, weight)
    vocab, width = weight.shape
    row_bytes = vocab * dtype.itemsize * (1 if options.softcap is None else 2)  # softcap keeps tanh beside the softmax
    tile_row_bytes = 0 if weight.dtype == dtype else width * dtype.itemsize
    budget, minimum = options.workspace_bytes, row_bytes + tile_row_bytes
    if budget is None:
        default = DEFAULT_WORKSPACE_BYTES.get(hidden.device.type, DEFAULT_WORKSPACE_BYTES_ACCELERATOR)
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
    return max(
        1, -(-num_rows // num_chunks)
    ), tile  # equal chunks: a sliver at the end would read the weight for nothing


def _softmax_rows(logits: Tensor, target: Tensor, softcap: float | None, spare: Tensor | None, grad: bool):
    """Overwrites the chunk's ``logits`` [n, V]; returns (losses [n], lse [n], correct [n], dlogits [n, V])."""
    probs = logits
    if softcap is not None:
        logits.div_(softcap).tanh_()
        probs = torch.mul(logits, softcap, out=spare)
    picks = (torch.arange(target.shape[0], device=target.device), target)
    peak, picked = probs.amax(-1), probs[picks]  # [n], [n]
    torch.softmax(probs, -1, out=probs)
    lse = peak - probs.amax(-1).log()
    if grad:
        probs[picks] = probs[picks] - 1.0
        if softcap is not None:  # d(c tanh(x/c))/dx = 1 - tanh^2
            probs.mul_(logits.square_().neg_().add_(1.0))
    return lse - picked, lse, picked == peak, probs


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    index: Tensor | None,
    options: _Options,
    *,
    want_rows: bool,
    want_weight: bool,
    row_scale: Tensor | None = None,
) -> _Sweep:
    """One pass over the chunks. ``row_scale`` [N] multiplies the rows' share of the weight gradient."""
    dtype = _accumulation_dtype(hidden, weight)
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
        losses[span], lse[span], correct[span], dlogits = _softmax_rows(
            logits, safe[span], options.softcap, buffer, want_rows or want_weight
        )
        keep = valid[span, None]  # [n, 1]
        if grad_rows is not None:
            grad = torch.zeros_like(rows)
            for v in tiles:
                grad.addmm_(dlogits[:, v : v + tile], weight[v : v + tile].to(dtype))
            grad_rows[span] = grad.masked_fill_(~keep, 0.0)
        if grad_weight is not None:
            scale = keep.to(dtype) if row_scale is None else keep * row_scale[span, None]
            grad_weight.addmm_(dlogits.t(), rows * scale)
    losses.masked_fill_(~valid, 0.0)
    lse.masked_fill_(~valid, 0.0)
    return _Sweep(losses, lse, correct.logical_and_(valid), grad_rows, grad_weight)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, index, factor, options):
        want_rows, want_weight = ctx.needs_input_grad[:2]
        ctx.recompute_weight = want_weight and options.reduction == "none"
        kept = None
        if (
            hidden.device.type == "cpu"
        ):  # a CPU can drop the ignored rows before the GEMM; a GPU would have to synchronise
            valid = targets != options.ignore_index
            if not valid.all():
                kept = valid.nonzero().squeeze(-1)  # [kept rows]
        num_targets = targets.shape[0]
        if kept is not None:
            index = kept if index is None else index[kept]
            targets = targets[kept]
        with torch.autocast(hidden.device.type, enabled=False):
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
    def backward(ctx, grad_loss, _grad_lse, _grad_correct):
        if grad_loss is None:
            return None, None, None, None, None, None
        grad_rows, grad_weight, index, kept, factor, hidden, weight, targets = ctx.saved_tensors
        per_row = ctx.options.reduction == "none"
        scale = grad_loss if per_row else grad_loss * factor  # [N] or 0-dim
        if per_row and kept is not None:
            scale = scale[kept]  # [kept rows]
        grad_hidden = None
        if grad_rows is not None:
            grad_hidden = (grad_rows * (scale[:, None] if per_row else scale)).to(grad_rows.dtype)  # [rows, D]
            if index is not None:
                zeros = grad_hidden.new_zeros(ctx.hidden_shape)
                grad_hidden = zeros.index_add_(0, index, grad_hidden)
        if ctx.recompute_weight:
            with torch.autocast(grad_loss.device.type, enabled=False):
                grad_weight = _sweep(
                    hidden,
                    weight,
                    targets,
                    index,
                    ctx.options,
                    want_rows=False,
                    want_weight=True,
                    row_scale=scale,
                ).grad_weight.to(ctx.weight_dtype)
        elif grad_weight is not None:
            out = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = torch.mul(
                grad_weight, scale, out=out
            )  # scales and rounds in one pass, keeps the saved tensor
        return grad_hidden, grad_weight, None, None, None, None


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, index: Tensor | None, options: _Options) -> None:
    name = "linear_cross_entropy"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}: hidden [T, D] and weight [V, D] must share D; got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"{name}: hidden and weight must be floating point; got {hidden.dtype} and {weight.dtype}")
    if index is not None and (index.dim() != 1 or index.dtype != torch.int64):
        raise ValueError(f"{name}: index must be [N] int64; got {tuple(index.shape)} {index.dtype}")
    expected = hidden.shape[0] if index is None else index.shape[0]
    if targets.dtype != torch.int64 or targets.shape != (expected,):
        raise ValueError(
            f"{name}: targets must be [{expected}] int64, one per "
            f"{'row of hidden' if index is None else 'entry of index'}; got {tuple(targets.shape)} {targets.dtype}"
        )
    for label, tensor in (("weight", weight), ("targets", targets), ("index", index)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: {label} is on {tensor.device}, hidden on {hidden.device}; move them together")
    if options.reduction not in ("none", "mean", "sum"):
        raise ValueError(f'{name}: reduction must be "none", "mean" or "sum"; got {options.reduction!r}')
    if options.softcap is not None and not 0 < options.softcap < float("inf"):
        raise ValueError(f"{name}: softcap must be a positive finite number or None; got {options.softcap!r}")
    if hidden.device.type == "cpu" and expected:  # value checks: they would synchronise a GPU
        scored = targets[targets != options.ignore_index]
        if scored.numel() and not 0 <= int(scored.min()) <= int(scored.max()) < weight.shape[0]:
            raise ValueError(
                f"{name}: targets must lie in [0, {weight.shape[0]}) or equal ignore_index={options.ignore_index}; "
                f"found {int(scored.min())} … {int(scored.max())}"
            )
        if index is not None and not 0 <= int(index.min()) <= int(index.max()) < hidden.shape[0]:
            raise ValueError(
                f"{name}: index must hold row numbers in [0, {hidden.shape[0]}); "
                f"found {int(index.min())} … {int(index.max())}"
            )


def _factor(hidden: Tensor, weight: Tensor, reduction: str, count: Tensor, normalizer: Tensor | float | None) -> Tensor:
    """What the summed loss is multiplied by, a 0-dim tensor on the device; 0 for a divisor of 0."""
    dtype, device = _accumulation_dtype(hidden, weight), hidden.device
    if reduction == "sum":
        return torch.ones((), dtype=dtype, device=device)
    divisor = count if normalizer is None else normalizer
    if not isinstance(divisor, Tensor):  # filled there: a copy from the host would synchronise
        divisor = torch.full((), divisor, dtype=dtype, device=device)
    if divisor.numel() != 1:
        raise ValueError(f"linear_cross_entropy: normalizer must hold one number; got {tuple(divisor.shape)}")
    divisor = divisor.detach().reshape(()).to(device, dtype)
    return torch.where(divisor == 0, 0.0, divisor.reciprocal())


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    index: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    softcap: float | None = None,
    workspace_bytes: int | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """Cross-entropy of ``hidden[index] @ weight.T`` against ``targets``; only the selected rows are scored.

    The caller shifts: for MNTP, ``index`` holds the row *before* each masked token (LLM2Vec, section 2.1).

    Args:
        hidden: [T, D] final hidden states; fp16, bf16, fp32 or fp64.
        weight: [V, D] head matrix. Its gradient is formed only when it requires one.
        targets: [N] int64 token ids, one per entry of ``index`` (per row of ``hidden`` when ``index`` is None).
        index: [N] int64, unique row numbers of ``hidden``; None scores all T rows.
        ignore_index: rows with this target have no loss, no gradient and no part in the count.
        reduction: "mean" (over the rows not ignored), "sum", or "none" (one loss a row, 0 where ignored).
        normalizer: what "mean" divides by instead of the count, a number or 0-dim tensor without gradient: the count of
            the whole optimiser step under gradient accumulation or data parallelism. 0 gives loss 0 and gradients 0.
        softcap: c of ``c * tanh(logits / c)`` (Gemma 2), or None.
        workspace_bytes: upper bound on the chunk's logits (and upcast weight tile); None = 128 MiB on a CPU, 256 MiB
            on an accelerator, never less than one row. Any value gives the same result up to rounding.
        return_stats: also return :class:`CrossEntropyStats`.
        backend: None, "torch" or "triton".

    Returns:
        The loss, fp32 (fp64 for fp64 operands), 0-dim or [N] with reduction="none"; with ``return_stats`` the pair
        (loss, stats). Without a valid row the loss and all gradients are 0.

    Raises:
        ValueError: shapes, dtypes or options that do not fit; on CPU tensors also targets outside the vocabulary or
            rows outside ``hidden``; a workspace too small for one row (the message says the minimum).

    Source:
        LLM2Vec (BehnamGhader et al. 2024, arXiv:2404.05961), section 2.1, for the shifted MNTP loss.
    """
    resolve(backend, "linear_cross_entropy")
    options = _Options(ignore_index, reduction, softcap, workspace_bytes)
    _check(hidden, weight, targets, index, options)
    if normalizer is not None and reduction != "mean":
        raise ValueError(f'linear_cross_entropy: normalizer needs reduction="mean"; got {reduction!r}')
    count = (targets != ignore_index).sum()
    factor = None if reduction == "none" else _factor(hidden, weight, reduction, count, normalizer)
    if not torch.is_grad_enabled():  # an evaluation pays for the loss alone
        hidden, weight = hidden.detach(), weight.detach()
    loss, lse, correct = _LinearCrossEntropy.apply(hidden, weight, targets, index, factor, options)
    return (loss, CrossEntropyStats(lse, correct, count)) if return_stats else loss
