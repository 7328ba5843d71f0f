"""The plain statement of every op: shortest possible, any dtype up to float64. Tests use it as the oracle.

Nothing here is fast or saves memory; gradients are autograd's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    keep_masks: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every sequence by itself: ``q [T, H, Dh]``, ``k, v [T, Hkv, Dh]`` -> output as q and lse ``[H, T]``.

    ``keep_masks`` holds one ``[H, L, L]`` bool per sequence (``attention_dropout_mask``).
    A row without a visible key gives zeros and -inf.
    """
    group = q.shape[1] // k.shape[1]
    scale = softmax_scale if softmax_scale is not None else q.shape[-1] ** -0.5
    left, right = window if window is not None else (-1, -1)
    outputs, lses = [q[:0]], [q.new_empty(q.shape[1], 0)]
    bounds = cu_seqlens.tolist()
    for b, (start, end) in enumerate(pairwise(bounds)):
        q_b = q[start:end].transpose(0, 1)  # [H, L, Dh]
        k_b = k[start:end].repeat_interleave(group, dim=1).transpose(0, 1)
        v_b = v[start:end].repeat_interleave(group, dim=1).transpose(0, 1)
        scores = scale * (q_b @ k_b.transpose(1, 2))  # [H, L, L]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(end - start, device=q.device)
        distance = position[None, :] - position[:, None]  # key - row
        seen = torch.ones_like(distance, dtype=torch.bool)
        if causal:
            seen &= distance <= 0
        if left >= 0:
            seen &= distance >= -left
        if right >= 0:
            seen &= distance <= right
        scores = scores.masked_fill(~seen, -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)  # [H, L]
        probabilities = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
        if keep_masks is not None:
            probabilities = probabilities * keep_masks[b] / (1.0 - dropout_p)
        outputs.append((probabilities @ v_b).transpose(0, 1))
        lses.append(lse)
    return torch.cat(outputs), torch.cat(lses, dim=1)


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
) -> Tensor:
    """Cross-entropy of ``hidden[index] @ weight.T``, all logits at once."""
    rows = hidden if index is None else hidden[index]
    logits = rows @ weight.T  # [N, V]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        return losses
    count = (targets != ignore_index).sum() if normalizer is None else torch.as_tensor(normalizer)
    return losses.sum() if reduction == "sum" else losses.sum() / torch.where(count == 0, 1, count)


def info_nce(  # noqa: C901 - the definition in one piece
    queries: Tensor,
    candidates: Tensor,
    targets: Tensor | None = None,
    *,
    scale: float | Tensor = 20.0,
    normalize: bool = True,
    symmetric: bool = False,
    hard_negatives: Tensor | None = None,
    query_ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    hard_negative_ids: Tensor | None = None,
    margin: float | None = None,
    include_query_query: bool = False,
    matryoshka_dims: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE over the whole similarity matrix: the columns side by side, -inf where masked, log(1 + e^gap)."""
    if matryoshka_dims is not None:
        weights = [1.0] * len(matryoshka_dims) if matryoshka_weights is None else matryoshka_weights
        options: dict[str, Any] = {"scale": scale, "normalize": normalize, "symmetric": symmetric}
        options |= {"query_ids": query_ids, "candidate_ids": candidate_ids, "hard_negative_ids": hard_negative_ids}
        options |= {"margin": margin, "include_query_query": include_query_query, "reduction": reduction}
        parts = []
        for dim, weight in zip(matryoshka_dims, weights, strict=True):
            hard = None if hard_negatives is None else hard_negatives[..., :dim]
            part = info_nce(queries[:, :dim], candidates[:, :dim], targets, hard_negatives=hard, **options)
            parts.append(weight * part)
        return torch.stack(parts).sum(0) / sum(weights)

    def unit(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.where(norm > 1e-12, 1 / norm.clamp_min(1e-12), 0.0) if normalize else x

    q, c = unit(queries), unit(candidates)
    target = torch.arange(q.shape[0]) if targets is None else targets
    similarity, banned = [q @ c.T], [torch.zeros(q.shape[0], c.shape[0], dtype=torch.bool)]
    if query_ids is not None and candidate_ids is not None:
        banned[0] = query_ids[:, None] == candidate_ids
    if hard_negatives is not None:
        hard = unit(hard_negatives)
        similarity.append(q @ hard.T if hard.dim() == 2 else torch.einsum("bd,bkd->bk", q, hard))
        banned.append(torch.zeros_like(similarity[-1]).bool())
        if query_ids is not None and hard_negative_ids is not None:
            banned[-1] = query_ids[:, None] == hard_negative_ids
    if include_query_query:
        similarity.append(q @ q.T)
        same = torch.eye(q.shape[0], dtype=torch.bool)
        banned.append(same if query_ids is None else same | (query_ids[:, None] == query_ids))
    s, mask = torch.cat(similarity, 1), torch.cat(banned, 1)
    positive = s.gather(1, target[:, None])
    if margin is not None:
        mask = mask | (s > positive + margin)
    negatives = (s * scale).masked_fill(mask.scatter(1, target[:, None], True), -torch.inf)
    gap = negatives.logsumexp(1) - positive[:, 0] * scale  # over the negatives only: even float64 would saturate
    losses = torch.logaddexp(gap, torch.zeros_like(gap))
    if symmetric:
        swapped: dict[str, Any] = {"scale": scale, "normalize": normalize, "margin": margin, "reduction": "none"}
        if candidate_ids is not None:
            swapped |= {"query_ids": candidate_ids, "candidate_ids": query_ids}
        back = info_nce(candidates, queries, **swapped)
        losses = (losses + back) / 2
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / max(len(losses), 1)}[reduction]


def segment_pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    *,
    mode: str = "mean",
    span_starts: Tensor | None = None,
    span_ends: Tensor | None = None,
) -> Tensor:
    """Pools one span after the other."""
    starts = cu_seqlens[:-1] if span_starts is None else span_starts
    ends = cu_seqlens[1:] if span_ends is None else span_ends
    rows = [hidden.new_zeros(0, hidden.shape[1])]
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        span = hidden[start:end]  # [n, D]
        weights = {
            "mean": torch.ones(end - start),
            "weighted_mean": torch.arange(1.0, end - start + 1),
            "first": torch.arange(end - start) == 0,
            "last": torch.arange(end - start) == end - start - 1,
        }[mode].to(hidden.dtype)[:, None]
        rows.append((span * weights).sum(0, keepdim=True) / weights.sum().clamp_min(1))
    return torch.cat(rows)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, weight_offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x²) + eps) * (weight_offset + weight)`` over the last dimension."""
    total = x if residual is None else x + residual
    y = total / torch.sqrt(total.square().mean(-1, keepdim=True) + eps) * (weight_offset + weight)
    return y if residual is None else (y, total)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The pair (x[i], x[i + Dh/2]) turned by the angle i of the position."""
    cos, sin = cos[position_ids].to(q.dtype)[:, None], sin[position_ids].to(q.dtype)[:, None]  # [T, 1, Dh/2]

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return rotated(q), rotated(k)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu_tanh(gate) * up``."""
    return F.gelu(gate, approximate="tanh") * up


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    keep_mask: Tensor | None = None,
) -> Tensor:
    """``x Wᵀ + bias + scaling (dropout(x) Aᵀ) Bᵀ``; ``keep_mask [T, in]`` bool (``linear_keep_mask``)."""
    dropped = x if keep_mask is None else x * keep_mask / (1.0 - dropout_p)
    return F.linear(x, weight, bias) + scaling * (dropped @ lora_a.T) @ lora_b.T
