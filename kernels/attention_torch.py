"""The torch backend of ``flash_attention`` (``kernels/attention.py`` has the formulas and the public function).

Sequences of one length are one batch of matrices, so no row is padded. Two ways through it:

* :func:`fused_attention`: torch's fused kernel on every length group, on strided views (no K or V is repeated); rows
  are permuted only where the batch is not in order of length already.
* :func:`explicit_attention`: rows are brought once into the order (sequence by length, kv head, position, query head
  of the group), in which the scores of a length group are one contiguous batched product ``[cells, L*G, L]`` that the
  G query heads of a kv head share. Scores are worked through in chunks of a bounded size, in fp32 (float64 for
  float64 operands). A dropped probability is kept with its sign bit set: ``relu`` of that buffer multiplies V and
  ``abs`` of it is the softmax, so the backward needs no mask, and short sequences save the buffer instead of
  computing it again.

The fused kernel cannot drop by our bits, cap scores or return the lse. Where both can run, :func:`prefers_explicit`
decides by what was measured (EPYC, one thread, fp32, H=9, Hkv=3, Dh=64; forward + backward, ms; the last column has
dropout 0.3):

    =========================  ======  ======  ========  =======
    lengths                    tokens   fused  explicit  dropped
    =========================  ======  ======  ========  =======
    6 … 60, mean 21, 19 kinds    1374    14.1      10.4     11.9
    25                           2000    16.0      13.8     15.0
    48                           2016    18.7      17.0     19.4
    64                           2048    22.2      25.1     31.3
    128                          2048    36.1      44.1     54.2
    512                          2048   129.0     165.8    218.8
    =========================  ======  ======  ========  =======
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bivec.kernels.attention_layout import Layout, LengthGroups, Options, Piece
from bivec.kernels.backend import autocast_kind
from bivec.kernels.dropout import attention_row_keys, draw_dropped_

# Below the width of a vector torch's CPU softmax goes value by value: 6.7 ms for 262,144 scores in rows of 12, where
# exp, sum and division take 0.43 ms; in rows of 16 0.37 ms against 0.33, of 32 0.25 against 0.29 (EPYC, one thread).
_NARROW = 16
_SAFE_SUMS = (1e-20, 1e20)  # of exponentials of scores that are not shifted: nothing that counts is lost in between


def prefers_explicit(groups: LengthGroups, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether the probabilities take at most half of the memory of q, k and v (L = 53 at H=9, Hkv=3, Dh=64).

    Then the explicit path saves them for its backward, and is the faster one.
    """
    scores = sum(heads * count * length * length for length, count in groups.sizes)
    tokens = sum(count * length for length, count in groups.sizes)
    return 2 * scores <= tokens * (heads + 2 * kv_heads) * head_dim


def _accurate(x: Tensor) -> Tensor:
    """fp32, or float64 where it is so: half types are slow on a CPU and too coarse for scores."""
    return x if x.dtype == torch.float64 else x.float()


class _Permute(torch.autograd.Function):
    """Rows in another order; the backward is a gather too, where index_select's own would add row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.order, ctx.places = order, places
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Permute.apply(grad, ctx.places, ctx.order), None, None


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, groups: LengthGroups, options: Options, hidden: dict[int, Tensor | None]
) -> Tensor:
    """Attention without dropout and softcap: q ``[T, H, Dh]``, k and v ``[T, Hkv, Dh]`` -> like q. T is not 0."""
    dtype = q.dtype
    q, k, v = _accurate(q), _accurate(k), _accurate(v)
    if groups.order is not None:
        q, k, v = (_Permute.apply(x, groups.order, groups.places) for x in (q, k, v))
    tokens = [length * count for length, count in groups.sizes]
    outputs = []
    for (length, count), *parts in zip(groups.sizes, q.split(tokens), k.split(tokens), v.split(tokens), strict=True):
        q_g, k_g, v_g = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in parts)  # [n, H or Hkv, L, Dh]
        plainly_causal = options.causal and options.window is None  # needs no mask in memory
        unseen = None if plainly_causal else hidden[length]
        mask = None if unseen is None else ~unseen
        with torch.autocast(autocast_kind(q), enabled=False):  # which would lower the precision
            out = F.scaled_dot_product_attention(
                q_g, k_g, v_g, attn_mask=mask, is_causal=plainly_causal, scale=options.scale, enable_gqa=True
            )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    if groups.order is not None:
        out = _Permute.apply(out, groups.places, groups.order)
    return out.to(dtype)


def _to_layout(x: Tensor, rows: Tensor) -> Tensor:
    """``[T, H, Dh]`` -> ``[T*H, Dh]`` in the layout's order."""
    return _accurate(x).reshape(-1, x.shape[-1]).index_select(0, rows)


def _from_layout(rows: Tensor, places: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    return rows.index_select(0, places).view(-1, heads, rows.shape[-1]).to(dtype)


class _Chunk:
    """The pieces of one chunk as views: of a flat buffer of scores, of rows in q's layout, of rows in k's layout."""

    def __init__(self, pieces: tuple[Piece, ...], group: int):
        self.pieces = pieces
        self.group = group
        self.sizes = [p.cells * group * p.length * p.length for p in pieces]

    def matrices(self, flat: Tensor) -> list[Tensor]:
        """``[cells, L*G, L]``."""
        return [x.view(p.cells, -1, p.length) for x, p in zip(flat.split(self.sizes), self.pieces, strict=True)]

    def queries(self, rows: Tensor) -> list[Tensor]:
        """``[cells, L*G, Dh]``."""
        g = self.group
        return [rows[p.row * g : (p.row + p.cells * p.length) * g].view(p.cells, p.length * g, -1) for p in self.pieces]

    def keys(self, rows: Tensor) -> list[Tensor]:
        """``[cells, L, Dh]``."""
        return [rows[p.row : p.row + p.cells * p.length].view(p.cells, p.length, -1) for p in self.pieces]


def _product(a: Tensor, b: Tensor, factor: float, out: Tensor) -> None:
    torch.baddbmm(out, a, b, beta=0, alpha=factor, out=out)


def _scores(chunk: _Chunk, q: Tensor, k: Tensor, options: Options, hidden: dict[int, Tensor | None]) -> Tensor:
    """Scaled and capped scores, flat; -inf where a key is hidden."""
    flat = q.new_empty(sum(chunk.sizes))
    scores = chunk.matrices(flat)
    for s, q_piece, k_piece in zip(scores, chunk.queries(q), chunk.keys(k), strict=True):
        _product(q_piece, k_piece.transpose(1, 2), options.scale, out=s)
    if options.softcap is not None:
        flat.div_(options.softcap).tanh_().mul_(options.softcap)
    for s, piece in zip(scores, chunk.pieces, strict=True):
        unseen = hidden[piece.length]
        if unseen is not None:
            by_head = s.view(piece.cells, piece.length, chunk.group, -1)
            by_head.masked_fill_(unseen[:, None, :], -math.inf)
    return flat


def _narrow_softmax(chunk: _Chunk, scores: Tensor, flat: Tensor) -> int:
    """The softmax of narrow rows, which come first, into ``flat``; returns how many pieces have them.

    The scores are not shifted by their maximum. 0 where a sum shows that they had to be, and away from the CPU, where
    reading it would stall.
    """
    count = sum(piece.length < _NARROW for piece in chunk.pieces)
    if not count or scores.device.type != "cpu" or torch.compiler.is_compiling():
        return 0
    end = sum(chunk.sizes[:count])
    torch.exp(scores[:end], out=flat[:end])
    pieces = chunk.matrices(flat)[:count]
    sums = [p.sum(dim=-1, keepdim=True) for p in pieces]
    smallest, largest = torch.cat([s.flatten() for s in sums]).aminmax()
    if not (smallest > _SAFE_SUMS[0] and largest < _SAFE_SUMS[1]):  # NaN too
        return 0
    for p, s in zip(pieces, sums, strict=True):
        p.div_(s)
    return count


def _probabilities(chunk: _Chunk, scores: Tensor, row_keys: Tensor | None, offsets: Tensor, dropout_p: float) -> Tensor:
    """Softmax of the scores, flat; the sign bit is set where a probability is dropped."""
    flat = torch.empty_like(scores)
    done = _narrow_softmax(chunk, scores, flat)
    for s, p in zip(chunk.matrices(scores)[done:], chunk.matrices(flat)[done:], strict=True):
        torch.softmax(s, dim=-1, out=p)
    if row_keys is not None:
        states = torch.empty_like(flat, dtype=torch.int32)
        for x, keys, piece in zip(chunk.matrices(states), chunk.queries(row_keys), chunk.pieces, strict=True):
            torch.add(keys, offsets[: piece.length], out=x)
        sign = draw_dropped_(states, dropout_p).mul_(-(1 << 31))
        sign = sign if flat.dtype == torch.float32 else sign.long() << 32
        flat.view(sign.dtype).bitwise_or_(sign)
    return flat


class _ExplicitAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        row_keys: Tensor | None,
        layout: Layout,
        options: Options,
        hidden: dict[int, Tensor | None],
        keep: bool,
        want_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rows_q = _to_layout(q, layout.q_rows)
        rows_k, rows_v = _to_layout(k, layout.kv_rows), _to_layout(v, layout.kv_rows)
        rows_o = torch.empty_like(rows_q)
        lse = rows_q.new_empty(rows_q.shape[0]) if want_lse else None
        kept = []
        for pieces in layout.chunks:
            chunk = _Chunk(pieces, layout.group)
            scores = _scores(chunk, rows_q, rows_k, options, hidden)
            if lse is not None:
                for s, target in zip(chunk.matrices(scores), chunk.queries(lse), strict=True):
                    target.copy_(torch.logsumexp(s, dim=-1, keepdim=True))
            signed = _probabilities(chunk, scores, row_keys, layout.offsets, options.dropout_p)
            if keep:
                kept.append(signed)
            used = signed if row_keys is None else torch.relu(signed)
            o_pieces = chunk.queries(rows_o)
            for p, v_piece, o_piece in zip(chunk.matrices(used), chunk.keys(rows_v), o_pieces, strict=True):
                _product(p, v_piece, 1.0 / (1.0 - options.dropout_p), out=o_piece)
        ctx.layout, ctx.options, ctx.hidden = layout, options, hidden
        ctx.heads, ctx.kv_heads, ctx.dtype = q.shape[1], k.shape[1], q.dtype
        ctx.save_for_backward(rows_q, rows_k, rows_v, None if keep else row_keys, *kept)
        out = _from_layout(rows_o, layout.q_places, q.shape[1], q.dtype)
        if lse is not None:
            lse = lse.index_select(0, layout.q_places).view(q.shape[:2]).t().to(torch.float32).contiguous()
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        rows_q, rows_k, rows_v, row_keys, *kept = ctx.saved_tensors
        layout, options, hidden = ctx.layout, ctx.options, ctx.hidden
        rows_do = _to_layout(d_out, layout.q_rows)
        rows_dq, rows_dk, rows_dv = torch.empty_like(rows_q), torch.empty_like(rows_k), torch.empty_like(rows_v)
        inverse_keep = 1.0 / (1.0 - options.dropout_p)
        for i, pieces in enumerate(layout.chunks):
            chunk = _Chunk(pieces, layout.group)
            slope = None
            if kept:
                signed = kept[i]
            else:
                scores = _scores(chunk, rows_q, rows_k, options, hidden)
                if options.softcap is not None:  # d tanh; a hidden key's score is -inf and has none
                    slope = (scores / options.softcap).square_().neg_().add_(1.0).clamp_min_(0.0)
                signed = _probabilities(chunk, scores, row_keys, layout.offsets, options.dropout_p)
            used = torch.relu(signed)
            d_flat = torch.empty_like(used)
            d_scores = chunk.matrices(d_flat)
            do_pieces = chunk.queries(rows_do)
            for dp, do_piece, v_piece in zip(d_scores, do_pieces, chunk.keys(rows_v), strict=True):
                _product(do_piece, v_piece.transpose(1, 2), inverse_keep, out=dp)
            for p, do_piece, dv_piece in zip(chunk.matrices(used), do_pieces, chunk.keys(rows_dv), strict=True):
                _product(p.transpose(1, 2), do_piece, inverse_keep, out=dv_piece)
            d_flat.mul_(used)
            for ds, p in zip(d_scores, chunk.matrices(torch.abs(signed, out=used)), strict=True):
                ds.addcmul_(p, ds.sum(dim=-1, keepdim=True), value=-1.0)  # dS = P (dP - delta), delta = sum_j P dP
            if slope is not None:
                d_flat.mul_(slope)
            for ds, k_piece, dq_piece in zip(d_scores, chunk.keys(rows_k), chunk.queries(rows_dq), strict=True):
                _product(ds, k_piece, options.scale, out=dq_piece)
            for ds, q_piece, dk_piece in zip(d_scores, chunk.queries(rows_q), chunk.keys(rows_dk), strict=True):
                _product(ds.transpose(1, 2), q_piece, options.scale, out=dk_piece)
        dq = _from_layout(rows_dq, layout.q_places, ctx.heads, ctx.dtype)
        dk = _from_layout(rows_dk, layout.kv_places, ctx.kv_heads, ctx.dtype)
        dv = _from_layout(rows_dv, layout.kv_places, ctx.kv_heads, ctx.dtype)
        return dq, dk, dv, None, None, None, None, None, None


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    options: Options,
    hidden: dict[int, Tensor | None],
    *,
    keep: bool,
    want_lse: bool,
    seed: int | Tensor | None,
    sample_ids: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention with every option: q ``[T, H, Dh]``, k, v ``[T, Hkv, Dh]`` -> like q, and if wanted lse ``[H, T]``.

    ``keep`` saves the probabilities for the backward; with a softcap they are computed again in any case.
    """
    row_keys = None
    if seed is not None and sample_ids is not None and options.dropout_p > 0.0:
        row_keys = attention_row_keys(seed, sample_ids, layout.sample_of_row, layout.head_row)
    keep = keep and options.softcap is None
    out, lse = _ExplicitAttention.apply(q, k, v, row_keys, layout, options, hidden, keep, want_lse)
    return out, lse
