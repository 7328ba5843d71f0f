"""The two unsupervised objectives of LLM2Vec on packed batches: MNTP and SimCSE.

Each has a pure loss function of one batch, and an objective for training: given a step number, it yields the losses of
the step's micro-batches, whose sum is the loss of the step. Data order, masks and dropout are functions of (seed, step)
alone, so a resumed run repeats an uninterrupted one bit for bit.

Sources: BehnamGhader et al. 2024 (LLM2Vec; METHOD 3 and 4); Gao et al. 2021 (SimCSE).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bivec.engine.data import BlockDataset, SentenceDataset
from bivec.engine.distributed import ALONE, World, is_sharded, sync_gradients
from bivec.engine.grad_cache import Embedder, StepRows, cached_losses, less_memory, loss_workspace, memory_setting
from bivec.engine.lora import Adapter
from bivec.engine.masking import MaskingConfig, MntpBatch, mask_batch
from bivec.engine.micro_loss import ATTENTION_SITE, MicroLoss, lora_noise, with_more_recomputation
from bivec.engine.packing import indices_for_step
from bivec.kernels import fold_seed, info_nce, linear_cross_entropy, segment_pool
from bivec.models import Llama, PackedBatch


def mntp_loss(
    model: nn.Module,
    lm_head_weight: Tensor | Callable[[], Tensor],
    batch: MntpBatch,
    *,
    normalizer: Tensor | float | None = None,
    softcap: float | None = None,
    attention_dropout: float = 0.0,
    seed: int | Tensor | None = None,
    recompute: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Masked next-token prediction: the label of a masked token is scored from the row before it (METHOD 3.3).

    Args:
        model: a decoder, run bidirectionally.
        lm_head_weight: [V, D], or what gives it after the forward: a sharded one is whole only then.
        batch: masked tokens, rows to score, labels.
        normalizer: number of labels of the whole step, under gradient accumulation; None = of this batch.
        softcap: of the scores, the model's ``config.final_logit_softcapping`` (Gemma 2); None = none.
        attention_dropout: the paper trains MNTP without.
        seed: of the attention dropout.
        recompute: of the model's forward: "none", "selective" or "layer".
        backend: None, "torch" or "triton".

    Returns:
        0-dim loss, mean over the labels (or the sum over ``normalizer``).
    """
    hidden = model(batch.batch, attention_dropout=attention_dropout, seed=seed, recompute=recompute, backend=backend)
    return linear_cross_entropy(
        hidden,
        lm_head_weight() if callable(lm_head_weight) else lm_head_weight,
        batch.targets,
        batch.index,
        normalizer=normalizer,
        softcap=softcap,
        backend=backend,
    )


def simcse_loss(
    model: nn.Module,
    views: PackedBatch,
    *,
    scale: float = 20.0,
    pooling: str = "mean",
    causal: bool = False,
    skip_prefix: int = 0,
    attention_dropout: float = 0.3,
    seed: int | Tensor | None = None,
    recompute: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Unsupervised SimCSE: two dropout views of every sentence, in-batch negatives, one direction (METHOD 4.4).

    Args:
        model: a decoder.
        views: 2B sequences, sentence i at i and at B + i; distinct ``sample_ids`` give the two views distinct dropout.
        scale: inverse temperature of the cosine.
        pooling: mode of ``segment_pool``.
        causal: keep the decoder's own mask (the paper's Uni+SimCSE).
        skip_prefix: tokens at the start of each sequence left out of the pooling (1 = without the BOS).
        attention_dropout: on the attention probabilities; with the LoRA dropout the only noise between the views.
        seed: of the attention dropout.
        recompute: of the model's forward: "none", "selective" or "layer".
        backend: None, "torch" or "triton".

    Returns:
        0-dim loss, mean over the B sentences.
    """
    options = {"attention_dropout": attention_dropout, "seed": seed, "recompute": recompute, "backend": backend}
    hidden = model(views, causal=causal, **options)
    spans = views.cu_seqlens.long()
    pooled = segment_pool(
        hidden,
        views.cu_seqlens,
        mode=pooling,
        span_starts=torch.minimum(spans[:-1] + skip_prefix, spans[1:]),
        span_ends=spans[1:],
        backend=backend,
    )
    first, second = pooled.chunk(2)
    return info_nce(first, second, scale=scale, backend=backend)


@dataclass(frozen=True)
class MntpObjective:
    """Feeds :func:`mntp_loss` with ``batch_size`` blocks a step, in micro-batches of at most ``micro_batch_tokens``.

    Of several ranks each takes its share of the blocks; its losses add up to its share of the step's loss.
    """

    model: nn.Module
    lm_head_weight: Tensor | Callable[[], Tensor]
    adapter: Adapter | None  # its dropout is keyed here; None for full-weight training
    blocks: BlockDataset
    masking: MaskingConfig
    batch_size: int
    seed: int
    micro_batch_tokens: int | None = None
    attention_dropout: float = 0.0
    recompute: str = "none"
    backend: str | None = None
    world: World = ALONE

    def micro_losses(self, step: int) -> Iterator[MicroLoss]:
        """The losses of this rank's micro-batches of a step."""
        device = next(self.model.parameters()).device
        model: Any = self.model
        trunk: Llama = getattr(model, "module", model)  # inside DistributedDataParallel
        mine = self.world.share(self.batch_size)
        rows = indices_for_step(len(self.blocks), self.batch_size, self.seed, step)[mine.start : mine.stop]
        # one id per block ever drawn: a block met again in the next epoch gets other masks and other dropout
        sample_ids = range(step * self.batch_size + mine.start, step * self.batch_size + mine.stop)
        per_micro = self._blocks_per_micro_batch()
        micro_batches = [
            mask_batch(
                self.blocks.input_ids[rows[i : i + per_micro]],
                self.blocks.special_mask[rows[i : i + per_micro]],
                self.masking,
                seed=self.seed,
                sample_ids=sample_ids[i : i + per_micro],
            )
            for i in range(0, len(rows), per_micro)
        ]
        (labels,) = self.world.sums(sum(len(micro.index) for micro in micro_batches))
        own = len(micro_batches)
        if is_sharded(self.model):  # what others have more of is run here too, for nothing
            micro_batches += micro_batches[-1:] * (self.world.max(own) - own)
        for number, on_host in enumerate(micro_batches, start=1):
            micro = on_host.to(device)
            sync_gradients(self.model, last=number == len(micro_batches))
            with lora_noise(self.adapter, self.seed, micro.batch):
                loss = mntp_loss(
                    self.model,
                    self.lm_head_weight,
                    micro,
                    normalizer=float(max(1, labels)),
                    softcap=trunk.config.final_logit_softcapping,
                    attention_dropout=self.attention_dropout,
                    seed=fold_seed(self.seed, ATTENTION_SITE),
                    recompute=self.recompute,
                    backend=self.backend,
                )
                yield MicroLoss(loss, micro.batch.num_tokens) if number <= own else MicroLoss(0 * loss, 0)

    def _blocks_per_micro_batch(self) -> int:
        share = len(self.world.share(self.batch_size))
        return max(1, min(share, (self.micro_batch_tokens or 1 << 62) // self.blocks.block_size))

    def with_less_memory(self) -> MntpObjective | None:
        """The same step in micro-batches of half the size; at one block with more recomputation; None = no way left."""
        blocks = self._blocks_per_micro_batch()
        if blocks > 1:
            return replace(self, micro_batch_tokens=blocks // 2 * self.blocks.block_size)
        return with_more_recomputation(self)

    def memory_setting(self) -> str:
        """What :meth:`with_less_memory` changes, in words."""
        tokens = self._blocks_per_micro_batch() * self.blocks.block_size
        return f"micro-batches of {tokens:,} tokens, recomputation {self.recompute!r}"


@dataclass(frozen=True)
class SimcseObjective:
    """Steps of ``batch_size`` sentences, with loss and gradients of :func:`simcse_loss`, by gradient caching.

    Of several ranks each takes its share of the sentences; the views of all of them are everyone's negatives.
    """

    model: nn.Module
    adapter: Adapter | None
    sentences: SentenceDataset | Sequence[Sequence[int]]  # token ids, special tokens included
    batch_size: int
    seed: int
    device: torch.device | str = "cpu"
    scale: float = 20.0
    pooling: str = "mean"
    causal: bool = False
    skip_prefix: int = 0
    attention_dropout: float = 0.3
    micro_batch_tokens: int | None = None  # None = both views of all sentences in one packed forward
    recompute: str = "none"
    backend: str | None = None
    world: World = ALONE

    def rows(self, step: int) -> StepRows:
        """Both views of this rank's n sentences of the step: sentence i at i and at n + i."""
        mine = self.world.share(self.batch_size)
        chosen = indices_for_step(len(self.sentences), self.batch_size, self.seed, step)[mine.start : mine.stop]
        views = [self.sentences[row] for row in chosen] * 2
        lengths = np.array([len(view) for view in views], dtype=np.int64)
        spans = np.stack([np.minimum(self.skip_prefix, lengths), lengths], axis=1)
        first = np.array(mine) + step * 2 * self.batch_size
        return StepRows(views, spans, np.concatenate([first, first + self.batch_size]))

    def micro_losses(self, step: int) -> Iterator[MicroLoss]:
        """The losses of this rank's micro-batches of a step; see :func:`cached_losses`."""
        return cached_losses(Embedder.of(self), self.rows(step), self.loss_of, self.micro_batch_tokens, self.world)

    def loss_of(self, embeddings: Tensor) -> Tensor:
        """0-dim share of the step's loss, of both views of this rank's n sentences [2n, D]."""
        first, second = embeddings.chunk(2)
        mine = self.world.share(self.batch_size)
        targets = torch.arange(mine.start, mine.stop, device=first.device)
        everyones = self.world.gather(second, self.world.shares(self.batch_size))
        summed = info_nce(
            first,
            everyones,
            targets,
            scale=self.scale,
            reduction="sum",
            workspace_bytes=loss_workspace(first.device),
            backend=self.backend,
        )
        return summed / self.batch_size

    def with_less_memory(self) -> SimcseObjective | None:
        """The same step with more recomputation, then in micro-batches of half the size; None = no way left."""
        return less_memory(self, self.rows(0).lengths)

    def memory_setting(self) -> str:
        """What :meth:`with_less_memory` changes, in words."""
        return memory_setting(self)
