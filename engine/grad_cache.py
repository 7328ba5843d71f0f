"""Gradient caching: a contrastive step of any batch size in the memory of one micro-batch.

A loss over in-batch negatives needs the embeddings of all sequences at once; a backward needs the activations only of
what it walks through. So a step

1. embeds every micro-batch without a graph (of one, a full one, the graph is kept),
2. takes the loss of all embeddings and its gradient with respect to them,
3. embeds every micro-batch again, with a graph, and walks it back from its rows of that gradient.

Dropout is keyed by sample ids, so both forwards of a sequence meet the same masks, and the gradients are those of one
forward of the whole batch. The price is a second forward of all micro-batches but that one. Memory beyond a
micro-batch's: the embeddings [S, D] and their gradients.

Source: Gao et al. 2021 (GradCache, arXiv:2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from bivec.engine.distributed import ALONE, World, is_sharded, sync_gradients
from bivec.engine.lora import Adapter
from bivec.engine.micro_loss import ATTENTION_SITE, AnyObjective, MicroLoss, lora_noise, with_more_recomputation
from bivec.engine.packing import token_budget_batches
from bivec.kernels import fold_seed, segment_pool
from bivec.models import PackedBatch

if TYPE_CHECKING:
    from bivec.engine.objectives import SimcseObjective
    from bivec.engine.supervised import SupervisedObjective


@dataclass(frozen=True)
class StepRows:
    """The S sequences of a step, or of this rank's share of it."""

    input_ids: Sequence[Sequence[int]]
    spans: np.ndarray  # [S, 2] int64: the first pooled token of each, and the one behind the last
    sample_ids: np.ndarray  # [S] int64: key the dropout, so no two of them are equal, on any rank

    @property
    def lengths(self) -> np.ndarray:
        """[S] int64: tokens of every sequence."""
        return np.fromiter(map(len, self.input_ids), dtype=np.int64, count=len(self.input_ids))


@dataclass(frozen=True)
class PackedRows:
    """Some rows of a step, n of them, as one forward takes them."""

    places: Tensor  # [n] int64: which rows
    batch: PackedBatch
    spans: Tensor  # [n, 2] int64, in the packed batch

    @classmethod
    def of(cls, rows: StepRows, places: Sequence[int]) -> PackedRows:
        """The rows at these places, on the CPU."""
        chosen = np.asarray(places, dtype=np.int64)
        batch = PackedBatch.from_sequences(
            [rows.input_ids[place] for place in chosen], rows.sample_ids[chosen].tolist()
        )
        spans = torch.from_numpy(rows.spans[chosen]) + batch.cu_seqlens[:-1, None]
        return cls(torch.from_numpy(chosen), batch, spans)

    def to(self, device: torch.device | str) -> PackedRows:
        """The same on another device, which is not waited for."""
        background = torch.device(device).type != "cpu"
        return PackedRows(
            self.places.to(device, non_blocking=background),
            self.batch.to(device),
            self.spans.to(device, non_blocking=background),
        )


@dataclass(frozen=True)
class Embedder:
    """How sequences become embeddings in training."""

    model: nn.Module
    adapter: Adapter | None  # its dropout is keyed here; None for full-weight training
    seed: int  # of both dropouts
    device: torch.device | str = "cpu"
    pooling: str = "mean"  # mode of ``segment_pool``
    causal: bool = False
    attention_dropout: float = 0.0
    recompute: str = "none"
    backend: str | None = None

    @classmethod
    def of(cls, objective: SimcseObjective | SupervisedObjective) -> Embedder:
        """As a contrastive objective is set."""
        return cls(**{field.name: getattr(objective, field.name) for field in fields(cls)})

    @contextmanager
    def embed(self, rows: PackedRows) -> Iterator[tuple[Tensor, Tensor]]:
        """The n rows: their embeddings [n, D] and their places in the step [n], on the device.

        The dropout of LoRA is keyed until the block ends: a backward belongs inside.
        """
        rows = rows.to(self.device)
        batch = rows.batch
        with lora_noise(self.adapter, self.seed, batch):
            hidden = self.model(
                batch,
                causal=self.causal,
                attention_dropout=self.attention_dropout,
                seed=fold_seed(self.seed, ATTENTION_SITE),
                recompute=self.recompute,
                backend=self.backend,
            )
            pooled = segment_pool(
                hidden,
                batch.cu_seqlens,
                mode=self.pooling,
                span_starts=rows.spans[:, 0],
                span_ends=rows.spans[:, 1],
                backend=self.backend,
            )
            yield pooled, rows.places


def loss_workspace(device: torch.device | str) -> int | None:
    """Bytes that ``info_nce`` may take for logits while a micro-batch's activations are there; None = its default.

    On a CPU its 64 MiB would be what a step of thousands of queries needs most on top of a micro-batch.
    """
    return 16 << 20 if torch.device(device).type == "cpu" else None


def micro_batches(lengths: np.ndarray, micro_batch_tokens: int | None) -> list[list[int]]:
    """Which sequences are run together: all, or longest first up to the budget."""
    if micro_batch_tokens is None or lengths.sum() <= micro_batch_tokens:
        return [list(range(len(lengths)))]
    return token_budget_batches(lengths, micro_batch_tokens)


def cached_losses(
    embedder: Embedder,
    rows: StepRows,
    loss_of: Callable[[Tensor], Tensor],
    micro_batch_tokens: int | None = None,
    world: World = ALONE,
) -> Iterator[MicroLoss]:
    """The losses of a contrastive step's micro-batches; each must be walked back before the next is asked for.

    Args:
        embedder: model, pooling and dropout.
        rows: the S sequences of the step.
        loss_of: from all embeddings [S, D] to the 0-dim loss of the step, or this rank's share of it.
        micro_batch_tokens: of one forward and backward; a longer sequence makes a micro-batch of its own. None = all
            sequences at once.
        world: the ranks that share the step.

    Yields:
        Surrogates whose gradients are the step's; ``value`` is its loss in the first and 0 in the others.
    """
    groups = micro_batches(rows.lengths, micro_batch_tokens)
    kept, *cached = (PackedRows.of(rows, group) for group in groups)  # the first has the most tokens, or nearly so
    own = len(cached)
    if is_sharded(embedder.model):  # what others have more of is run here too, for nothing
        cached += [(cached or [kept])[-1]] * (world.max(own) - own)
    embeddings: Tensor | None = None
    with torch.no_grad():
        for group in cached:
            with embedder.embed(group) as (pooled, places):
                if embeddings is None:
                    embeddings = pooled.new_empty(len(rows.input_ids), pooled.shape[1])
                embeddings[places] = pooled
    sync_gradients(embedder.model, last=not cached)
    with embedder.embed(kept) as (pooled, places):
        if embeddings is None:
            embeddings = pooled.new_empty(len(rows.input_ids), pooled.shape[1])
        embeddings[places] = pooled.detach()
        embeddings.requires_grad_()
        loss = loss_of(embeddings)
        (gradients,) = torch.autograd.grad(loss, embeddings)
        yield MicroLoss((pooled * gradients[places]).sum(), kept.batch.num_tokens, value=loss.detach())
    for number, group in enumerate(cached, start=1):
        sync_gradients(embedder.model, last=number == len(cached))
        with embedder.embed(group) as (pooled, places):
            surrogate = (pooled * gradients[places]).sum()
            if number > own:
                yield MicroLoss(0 * surrogate, 0, value=0.0)
            else:
                yield MicroLoss(surrogate, group.batch.num_tokens, value=0.0)


def less_memory(objective: AnyObjective, lengths: np.ndarray) -> AnyObjective | None:
    """A contrastive objective with more recomputation, then in micro-batches of half the size.

    Args:
        objective: has ``recompute`` and ``micro_batch_tokens``.
        lengths: [S] int64: tokens of the sequences of a step.

    Returns:
        The same step in less memory; None = no way left: half would be less than its longest sequence.
    """
    tokens = int(lengths.sum())
    tokens = min(objective.micro_batch_tokens or tokens, tokens) // 2
    smaller = replace(objective, micro_batch_tokens=tokens) if tokens >= lengths.max() else None
    return with_more_recomputation(objective) or smaller


def memory_setting(objective: AnyObjective) -> str:
    """What :func:`less_memory` changes, in words."""
    recomputation = f"recomputation {objective.recompute!r}"
    if objective.micro_batch_tokens is None:
        return recomputation
    return f"micro-batches of {objective.micro_batch_tokens:,} tokens, {recomputation}"
