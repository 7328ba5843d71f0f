"""The supervised objective of LLM2Vec: queries against their positives and hard negatives, in one packed forward.

A step's texts are the B queries with their instructions, the B positives and all hard negatives, which are candidates
of every query (METHOD 5.6). Cosines and their scale are fp32 whatever the model's dtype. What answers a query
is no negative of it, wherever else in the batch it stands: the positives of other rows with the same query, documents
with the id or the text of one of them, and copies of the query. (Numbers are equal or not, so this is closed under
"same as": on batches of 512 triples of SICK it takes one hard negative in 300 from its query.) With a margin, negatives
that score higher than the positive - margin are left out too. By gradient caching (``grad_cache.py``) the batch size is
free of the memory.

Sources: BehnamGhader et al. 2024 (LLM2Vec, appendix G; METHOD 5); Gao et al. 2021 (GradCache).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from bivec.engine.distributed import ALONE, World
from bivec.engine.errors import DataError
from bivec.engine.grad_cache import Embedder, StepRows, cached_losses, less_memory, loss_workspace, memory_setting
from bivec.engine.lora import Adapter
from bivec.engine.micro_loss import MicroLoss
from bivec.engine.text_format import Row, SpanError, TextFormat, training_head
from bivec.engine.triple_batches import TripleBatches
from bivec.engine.triples import Triple
from bivec.kernels import info_nce

STEP_BITS = 20  # sequences of a step that have ids of their own: a million


@dataclass(frozen=True)
class DocumentIds:
    """Numbers for the documents of a step. Those that answer one query, or repeat it, share a number."""

    positives: Tensor  # [B] int64; of the queries too
    negatives: Tensor  # [M] int64

    @classmethod
    def of(cls, triples: Sequence[Triple], device: torch.device | str) -> DocumentIds:
        """A document is known by its id and by its text: two with one of them in common are the same."""
        groups = _Groups()
        for triple in triples:
            groups.join(("text", triple.query), ("text", triple.positive))
            groups.join(("text", triple.positive), _name(triple.positive_id, triple.positive))
            for i, text in enumerate(triple.negatives):
                groups.join(("text", text), _name(triple.negative_ids[i] if triple.negative_ids else None, text))
        numbers: dict[tuple[str, str], int] = {}

        def number(texts: Iterable[str]) -> Tensor:
            found = [groups.find(("text", text)) for text in texts]
            return torch.tensor([numbers.setdefault(x, len(numbers)) for x in found], dtype=torch.int64).to(device)

        return cls(
            number(triple.positive for triple in triples),
            number(text for triple in triples for text in triple.negatives),
        )


class _Groups:
    """Union-find over names."""

    def __init__(self) -> None:
        self.parents: dict[tuple[str, str], tuple[str, str]] = {}

    def find(self, name: tuple[str, str]) -> tuple[str, str]:
        while (parent := self.parents.setdefault(name, name)) != name:
            self.parents[name] = self.parents[parent]  # parents of parents are there: they were asked for before
            name = parent
        return name

    def join(self, one: tuple[str, str], other: tuple[str, str]) -> None:
        self.parents[self.find(one)] = self.find(other)


def _name(identity: str | None, text: str) -> tuple[str, str]:
    return ("text", text) if identity is None else ("id", identity)


@dataclass(frozen=True)
class TripleRows:
    """Triples as sequences: which of them a step has, and how their texts become tokens."""

    batches: TripleBatches
    text_format: TextFormat
    symmetric_instruction: bool = True  # documents of symmetric sets have their query's instruction too (METHOD 13)
    vocab_size: int | None = None  # of the model, to tell a tokenizer of another one

    def of(self, step: int, triples: Sequence[Triple] | None = None, world: World = ALONE) -> StepRows:
        """A step's queries, positives and negatives, in this order, of this rank's share of the triples.

        Args:
            step: 0, 1, 2, …
            triples: all those of the step, if they have been read already.
            world: the ranks that share the step.

        Raises:
            DataError: a text of which nothing is left to pool (names the data set, the row and the field), or ids
                outside the model's vocabulary.
        """
        triples = self.batches.triples(step) if triples is None else triples
        batch_size, mine = len(triples), world.share(len(triples))
        before = sum(len(triple.negatives) for triple in triples[: mine.start])
        triples = triples[mine.start : mine.stop]
        heads = [training_head(triple.instruction) for triple in triples]
        both_sides = [self.symmetric_instruction and triple.symmetric for triple in triples]
        fronts = [head if both else "" for head, both in zip(heads, both_sides, strict=True)]  # of documents
        negatives = [(place, text) for place, triple in enumerate(triples) for text in triple.negatives]
        rows = [
            *self._texts(step, "query", heads, [triple.query for triple in triples], mine),
            *self._texts(step, "positive", fronts, [triple.positive for triple in triples], mine),
            *self._texts(
                step,
                "negative",
                [fronts[place] for place, _ in negatives],
                [text for _, text in negatives],
                [mine[place] for place, _ in negatives],
            ),
        ]
        # as if one rank had all: the queries, the positives, the negatives of the whole batch
        numbers = [np.array(mine), batch_size + np.array(mine), 2 * batch_size + before + np.arange(len(negatives))]
        largest = max((max(row.input_ids) for row in rows), default=0)
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise DataError(
                f"the tokenizer gives the id {largest}, the model's vocabulary ends at {self.vocab_size - 1}; they do "
                "not belong together: look for the tokenizer that came with the model"
            )
        return StepRows(
            [row.input_ids for row in rows],
            np.array([(row.start, row.end) for row in rows], dtype=np.int64),
            (step << STEP_BITS) + np.concatenate(numbers),
        )

    def _texts(
        self, step: int, field: str, heads: Sequence[str], texts: Sequence[str], owners: Sequence[int]
    ) -> list[Row]:
        """The rows of one field of all triples; ``owners`` says which triple of the batch a text is of."""
        try:
            return self.text_format.rows(heads, texts)
        except SpanError as error:
            which, numbers = self.batches.rows(step)
            row = numbers[owners[error.index]]
            raise DataError(f"{self.batches.sets[which].name}, row {row} (from 0), {field}: {error}") from error


@dataclass(frozen=True)
class SupervisedObjective:
    """Feeds ``info_nce`` with a batch of triples a step, all of one data set.

    Of several ranks each takes its share of the triples; the documents of all of them are every query's candidates.
    """

    model: nn.Module
    adapter: Adapter | None
    rows: TripleRows
    seed: int
    device: torch.device | str = "cpu"
    scale: float = 50.0
    pooling: str = "mean"  # mode of ``segment_pool``
    causal: bool = False  # the decoder's own mask: the Uni baseline, with pooling "weighted_mean"
    attention_dropout: float = 0.0
    filter_same: bool = True  # False: the original's loss, in which a positive may be another query's negative
    margin: float | None = None  # leaves out negatives with a cosine above the positive's - margin
    matryoshka_dims: tuple[int, ...] | None = None
    micro_batch_tokens: int | None = None  # None = all texts of the step in one packed forward
    recompute: str = "none"
    backend: str | None = None
    world: World = ALONE

    def micro_losses(self, step: int) -> Iterator[MicroLoss]:
        """The losses of this rank's micro-batches of a step; see :func:`cached_losses`."""
        triples = self.rows.batches.triples(step)
        ids = DocumentIds.of(triples, self.device) if self.filter_same else None
        loss_of = partial(self.loss_of, counts=[len(triple.negatives) for triple in triples], ids=ids)
        rows = self.rows.of(step, triples, self.world)
        return cached_losses(Embedder.of(self), rows, loss_of, self.micro_batch_tokens, self.world)

    def loss_of(self, embeddings: Tensor, counts: Sequence[int], ids: DocumentIds | None) -> Tensor:
        """0-dim share of the step's loss.

        Args:
            embeddings: [2n + m, D]: of this rank's n queries, positives and m negatives.
            counts: how many negatives each triple of the whole step has.
            ids: of the documents of the whole step; None = no two of them are the same.
        """
        batch_size, mine = len(counts), self.world.share(len(counts))
        # split, not slices: the gradient is put together once
        queries, positives, negatives = embeddings.split([len(mine), len(mine), len(embeddings) - 2 * len(mine)])
        shares = self.world.shares(batch_size)
        ends = np.cumsum(shares)
        owned = [sum(counts[end - share : end]) for end, share in zip(ends, shares, strict=True)]
        has_negatives = sum(owned) > 0
        summed = info_nce(
            queries,
            self.world.gather(positives, shares),
            torch.arange(mine.start, mine.stop, device=queries.device),
            scale=self.scale,
            hard_negatives=self.world.gather(negatives, owned) if has_negatives else None,
            margin=None if self.margin is None else -self.margin,
            matryoshka_dims=self.matryoshka_dims,
            reduction="sum",
            query_ids=None if ids is None else ids.positives[mine.start : mine.stop],
            candidate_ids=None if ids is None else ids.positives,
            hard_negative_ids=ids.negatives if ids is not None and has_negatives else None,
            workspace_bytes=loss_workspace(queries.device),
            backend=self.backend,
        )
        return summed / batch_size

    def with_less_memory(self) -> SupervisedObjective | None:
        """The same step with more recomputation, then in smaller micro-batches; None = no way left."""
        return less_memory(self, self.rows.of(0, world=self.world).lengths)

    def memory_setting(self) -> str:
        """What :meth:`with_less_memory` changes, in words."""
        return memory_setting(self)
