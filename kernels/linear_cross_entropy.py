"""Cross-entropy of a linear head over selected rows, without ever holding the [rows, vocabulary] logits.

    z_i = hidden[index_i] @ weight^T                  (z_i := c * tanh(z_i / c) with ``softcap=c``)
    loss_i = logsumexp(z_i) - z_i[target_i]
    dz_i = softmax(z_i) - onehot(target_i)
    dhidden[index_i] = dz_i @ weight                  dweight = sum_i dz_i^T hidden[index_i]

Algorithm. The selected rows are cut into chunks whose fp32 logits fit ``workspace_bytes``. Per chunk: one GEMM writes
the logits into the workspace, one pass writes dz over them, and the gradient GEMMs consume it before the next chunk
reuses the memory. Loss, LSE and top-1 come from the same pass: a softmax and a few sweeps in
``kernels/linear_cross_entropy_torch.py``, one kernel in ``kernels/linear_cross_entropy_triton.py``.

Saved for backward: the gradient of the selected rows [N, D], not yet divided by the count (so that fp16 does not
underflow), and with a trainable head the fp32 dweight [V, D]. The backward only scales and scatters them. With
``reduction="none"`` a head's gradient cannot be rescaled per row afterwards, so it is computed again in the backward.

Cost: 2NVD FLOP for the logits, 2NVD for dhidden, 2NVD for dweight where it is wanted (plus 2NVD to recompute the logits
with ``reduction="none"``). Memory beyond inputs and gradients: the workspace, and up to three fp32 [chunk, D] (the
gathered rows and their product: 3 D / V of the workspace). Half-precision operands give fp32 logits: on NVIDIA GPUs
the Triton backend has cuBLAS multiply them as they are, with dz rounded to their dtype for the gradient GEMMs;
everywhere else they are multiplied in fp32, tile by tile of the vocabulary inside the same workspace.

The idea of forming the gradient in the forward pass, chunk by chunk, is that of Liger-Kernel (Hsu et al. 2024,
arXiv:2410.10989); Wijmans et al. 2024 (arXiv:2411.09009) is the recomputing alternative, which costs one more GEMM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from bivec.kernels.backend import check_triton_dtypes, checks_values, resolve
from bivec.kernels.linear_cross_entropy_torch import LinearCrossEntropy, Options, accumulation_dtype


@dataclass(frozen=True)
class CrossEntropyStats:
    """What the loss pass knows anyway. Nothing here carries a gradient."""

    lse: Tensor  # [N] fp32 (fp64 for fp64 operands), natural log; 0 for an ignored row
    correct: Tensor  # [N] bool: no logit is larger than the target's; False for an ignored row
    count: Tensor  # 0-dim int64: the rows that are not ignored


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, index: Tensor | None) -> None:
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


def _check_options(options: Options) -> None:
    name = "linear_cross_entropy"
    if options.reduction not in ("none", "mean", "sum"):
        raise ValueError(f'{name}: reduction must be "none", "mean" or "sum"; got {options.reduction!r}')
    if options.softcap is not None and not 0 < options.softcap < float("inf"):
        raise ValueError(f"{name}: softcap must be a positive finite number or None; got {options.softcap!r}")


def _check_values(hidden: Tensor, weight: Tensor, targets: Tensor, index: Tensor | None, ignore_index: int) -> None:
    name = "linear_cross_entropy"
    scored = targets[targets != ignore_index]
    if scored.numel() and not 0 <= int(scored.min()) <= int(scored.max()) < weight.shape[0]:
        raise ValueError(
            f"{name}: targets must lie in [0, {weight.shape[0]}) or equal ignore_index={ignore_index}; "
            f"found {int(scored.min())} … {int(scored.max())}"
        )
    if index is not None and not 0 <= int(index.min()) <= int(index.max()) < hidden.shape[0]:
        raise ValueError(
            f"{name}: index must hold row numbers in [0, {hidden.shape[0]}); "
            f"found {int(index.min())} … {int(index.max())}"
        )
    if index is not None and index.unique().numel() != index.numel():
        raise ValueError(f"{name}: index must not repeat a row: each is written once, not summed")


def _factor(hidden: Tensor, weight: Tensor, reduction: str, count: Tensor, normalizer: Tensor | float | None) -> Tensor:
    """What the summed loss is multiplied by, a 0-dim tensor on the device; 0 for a divisor of 0."""
    dtype, device = accumulation_dtype(hidden, weight), hidden.device
    if reduction == "sum":
        return torch.ones((), dtype=dtype, device=device)
    divisor = count if normalizer is None else normalizer
    if not isinstance(divisor, Tensor):  # filled there: a copy from the host would synchronise
        divisor = torch.full((), divisor, dtype=dtype, device=device)
    if divisor.numel() != 1:
        raise ValueError(f"linear_cross_entropy: normalizer must hold one number; got {tuple(divisor.shape)}")
    divisor = divisor.detach().reshape(()).to(device, dtype)
    return torch.where(divisor == 0, 0.0, divisor.reciprocal())


@overload
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
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
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
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, CrossEntropyStats]: ...
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
            on an accelerator, never less than one row. Any value gives the same result up to rounding. A row takes 4 V
            bytes; with the torch backend 8 V under a softcap, with Triton V rounded up to a multiple of 32.
        return_stats: also return :class:`CrossEntropyStats`.
        backend: None, "torch" or "triton". Triton takes no fp64.

    Returns:
        The loss, fp32 (fp64 for fp64 operands), 0-dim or [N] with reduction="none"; with ``return_stats`` the pair
        (loss, stats). Without a valid row the loss and all gradients are 0.

    Raises:
        ValueError: shapes, dtypes or options that do not fit; on CPU tensors, and with BIVEC_CHECK=1 on a GPU, also
            targets outside the vocabulary or rows outside ``hidden`` (unchecked, Triton gives such a target the loss
            NaN); a workspace too small for one row (the message says the minimum).
        BackendError: the backend cannot run on these tensors.

    Source:
        LLM2Vec (BehnamGhader et al. 2024, arXiv:2404.05961), section 2.1, for the shifted MNTP loss.
    """
    chosen = resolve(backend, "linear_cross_entropy", hidden.device)
    options = Options(ignore_index, reduction, softcap, workspace_bytes)
    _check(hidden, weight, targets, index)
    _check_options(options)
    if checks_values(hidden.device) and targets.numel():
        _check_values(hidden, weight, targets, index, ignore_index)
    if normalizer is not None and reduction != "mean":
        raise ValueError(f'linear_cross_entropy: normalizer needs reduction="mean"; got {reduction!r}')
    count = (targets != ignore_index).sum()
    factor = None if reduction == "none" else _factor(hidden, weight, reduction, count, normalizer)
    if not torch.is_grad_enabled():  # an evaluation pays for the loss alone
        hidden, weight = hidden.detach(), weight.detach()
    function = _triton if chosen == "triton" else LinearCrossEntropy.apply
    loss, lse, correct = function(hidden, weight, targets, index, factor, options)
    return (loss, CrossEntropyStats(lse, correct, count)) if return_stats else loss


def _triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, index: Tensor | None, factor: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    from bivec.kernels import linear_cross_entropy_triton as backend  # triton is an optional dependency

    check_triton_dtypes("linear_cross_entropy", hidden=hidden, weight=weight)
    loss, lse, correct, *_ = backend.cross_entropy_op(
        hidden,
        weight,
        targets,
        index,
        factor,
        None,
        options.ignore_index,
        options.softcap,
        options.workspace_bytes,
        want_rows=hidden.requires_grad,
        want_weight=weight.requires_grad and factor is not None,  # without a factor, the backward forms it
    )
    return loss, lse.detach(), correct
