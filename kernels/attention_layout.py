"""What a call of attention asks, and the row orders that the torch backend works in (``kernels/attention_torch.py``).

A plan of a batch (``AttentionPlan``) makes them once, and all its layers share them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bivec.kernels.dropout import column_offsets

# Scores held at a time. On a CPU 2^17 … 2^20 measured within 10 % of each other; a GPU wants few launches.
_CHUNK_ELEMENTS_CPU = 1 << 19
_CHUNK_ELEMENTS_GPU = 1 << 26


@dataclass(frozen=True)
class Options:
    """What a call asks of the scores."""

    scale: float
    softcap: float | None
    causal: bool
    window: tuple[int, int] | None
    dropout_p: float

    def edges(self, max_seqlen: int) -> tuple[int | None, int | None]:
        """How many keys a row sees to its left and its right; None = all that sequences up to ``max_seqlen`` have."""
        left, right = self.window if self.window is not None else (-1, -1)
        right = 0 if self.causal else right
        unbounded = min(max_seqlen - 1, 1 << 30)  # sequences are shorter; position + edge fits int32
        return left if 0 <= left < unbounded else None, right if 0 <= right < unbounded else None


@dataclass(frozen=True)
class LengthGroups:
    """The sequences of a batch, by length."""

    sizes: tuple[tuple[int, int], ...]  # (length, sequences), ascending, without empty sequences
    sequences: Tensor  # [sequences that are not empty] int64, in that order
    starts: Tensor  # [the same] int64: their first tokens
    order: Tensor | None  # [T] int64: the tokens in that order; None = the batch has it already
    places: Tensor | None  # [T] int64: the inverse of order


@dataclass(frozen=True)
class Piece:
    """Consecutive cells of one length; a cell is one kv head of one sequence."""

    length: int  # L
    cells: int
    row: int  # first row of k and v in the layout; q's is row * G


@dataclass(frozen=True)
class Layout:
    """The row order of the explicit path, for one number of heads. q has T*H rows in it, k and v T*Hkv."""

    group: int  # G, query heads of a kv head
    q_rows: Tensor  # [T*H] int64: the row of q.view(T*H, Dh) at each place
    kv_rows: Tensor  # [T*Hkv] int64
    q_places: Tensor  # [T*H] int64: the inverse of q_rows
    kv_places: Tensor  # [T*Hkv] int64
    sample_of_row: Tensor  # [T*H] int64: index into sample_ids
    head_row: Tensor  # [T*H] int64: head << 32 | position
    offsets: Tensor  # [longest] int32: column offsets of the dropout hash
    chunks: tuple[tuple[Piece, ...], ...]


def _inverse(permutation: Tensor) -> Tensor:
    return torch.empty_like(permutation).scatter_(
        0, permutation, torch.arange(permutation.numel(), device=permutation.device)
    )


def _joined(parts: list[Tensor], device: torch.device) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


def length_groups(lengths: tuple[int, ...], device: torch.device) -> LengthGroups:
    """Sorts the sequences of a batch, ``lengths [B]``, by length."""
    members: dict[int, list[int]] = {}
    starts, start = [], 0
    for sequence, length in enumerate(lengths):
        starts.append(start)
        start += length
        if length:
            members.setdefault(length, []).append(sequence)
    sequences = [s for length in sorted(members) for s in members[length]]
    order = places = None
    if sequences != sorted(sequences):
        order = torch.cat([torch.arange(starts[s], starts[s] + lengths[s]) for s in sequences]).to(device)
        places = _inverse(order)
    return LengthGroups(
        sizes=tuple((length, len(members[length])) for length in sorted(members)),
        sequences=torch.tensor(sequences, dtype=torch.int64, device=device),
        starts=torch.tensor([starts[s] for s in sequences], dtype=torch.int64, device=device),
        order=order,
        places=places,
    )


def hidden_keys(length: int, causal: bool, window: tuple[int, int] | None, device: torch.device) -> Tensor | None:
    """``[L, L]`` bool, True where a row does not see the key; None where every row sees every key."""
    left, right = window if window is not None else (-1, -1)
    right = 0 if causal else right
    if not (0 <= left < length - 1 or 0 <= right < length - 1):
        return None
    position = torch.arange(length, device=device)
    distance = position[None, :] - position[:, None]  # key - row
    hidden = torch.zeros(length, length, dtype=torch.bool, device=device)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    return hidden


def build_layout(groups: LengthGroups, heads: int, kv_heads: int) -> Layout:
    """The explicit path's row order for ``heads`` query heads and ``kv_heads`` kv heads."""
    device, group = groups.starts.device, heads // kv_heads
    kv_head = torch.arange(kv_heads, device=device)[:, None]  # [Hkv, 1]
    query_head = torch.arange(heads, device=device).view(kv_heads, 1, group)  # [Hkv, 1, G]
    q_rows, kv_rows, samples, head_rows, pieces = [], [], [], [], []
    first = row = 0
    for length, count in groups.sizes:
        position = torch.arange(length, device=device)  # [L]
        token = groups.starts[first : first + count, None, None] + position  # [n, 1, L]
        q_rows.append((token[..., None] * heads + query_head).flatten())  # [n, Hkv, L, G]
        kv_rows.append((token * kv_heads + kv_head).flatten())  # [n, Hkv, L]
        samples.append(groups.sequences[first : first + count].repeat_interleave(heads * length))
        head_rows.append(((query_head << 32) | position[:, None]).flatten().repeat(count))
        pieces.append(Piece(length, count * kv_heads, row))
        first, row = first + count, row + count * kv_heads * length
    q_index, kv_index = _joined(q_rows, device), _joined(kv_rows, device)
    return Layout(
        group=group,
        q_rows=q_index,
        kv_rows=kv_index,
        q_places=_inverse(q_index),
        kv_places=_inverse(kv_index),
        sample_of_row=_joined(samples, device),
        head_row=_joined(head_rows, device),
        offsets=column_offsets(max((length for length, _ in groups.sizes), default=0), device),
        chunks=tuple(_chunks(pieces, group, _CHUNK_ELEMENTS_CPU if device.type == "cpu" else _CHUNK_ELEMENTS_GPU)),
    )


def _chunks(pieces: list[Piece], group: int, budget: int) -> Iterator[tuple[Piece, ...]]:
    """Cuts and joins pieces so that a chunk has at most ``budget`` scores (or one cell, where a cell has more)."""
    chunk: list[Piece] = []
    room = budget
    for piece in pieces:
        cell = group * piece.length * piece.length
        left, row = piece.cells, piece.row
        while left:
            if chunk and room < cell:
                yield tuple(chunk)
                chunk, room = [], budget
            cells = min(left, max(room // cell, 1))
            chunk.append(Piece(piece.length, cells, row))
            room -= cells * cell
            left, row = left - cells, row + cells * piece.length
    if chunk:
        yield tuple(chunk)
