"""Masking for masked next-token prediction (MNTP).

Some tokens of a text are hidden; the model, which now sees both sides, must name them. As in the decoder's own
pretraining, the token at position i is read from the output at position i - 1, so the rows to score are those in front
of the hidden tokens, and a hidden token at position 0 of a sequence has no row and no loss (it is still hidden).

Two styles. ``bert``: of the selected tokens 80 % become the mask token, 10 % a random token of the vocabulary, 10 %
stay as they are. ``all_mask``: all become the mask token. Either way every selected token is in the loss.

The draws of a sample depend on (seed, sample id) alone: another batch size, another micro-batch or a resumed run hides
the same tokens. For another mask in another epoch the samples are numbered on: step * batch_size + 0, 1, 2, …
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bivec.models.batch import PackedBatch

MaskStyle = Literal["bert", "all_mask"]

MASK_STREAM = 2  # the last word of the Philox counter: keeps these draws apart from those of packing.py
BERT_MASKED = 0.8  # shares of the selected tokens under the style "bert"; the rest stays as it is
BERT_RANDOM = 0.1


@dataclass(frozen=True)
class MaskingConfig:
    """Which tokens are hidden, and how.

    Raises:
        ValueError: a value out of range, or an unknown style.
    """

    mask_token_id: int
    vocab_size: int
    probability: float = 0.2  # share of the candidates that is selected
    style: MaskStyle = "bert"

    def __post_init__(self) -> None:
        if not 0.0 < self.probability <= 1.0:
            raise ValueError(f"the masking probability must be above 0 and at most 1, got {self.probability}")
        if self.style not in ("bert", "all_mask"):
            raise ValueError(f"unknown masking style {self.style!r}: give 'bert' or 'all_mask'")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask token {self.mask_token_id} is not in a vocabulary of {self.vocab_size} tokens")


@dataclass(frozen=True)
class MntpBatch:
    """A packed batch with hidden tokens, and what to score in it."""

    batch: PackedBatch
    index: Tensor  # [N] int64, ascending: the rows of the packed batch that predict a hidden token
    targets: Tensor  # [N] int64: the hidden token of each

    def to(self, device: torch.device | str) -> MntpBatch:
        """The same batch on another device."""
        background = torch.device(device).type != "cpu"  # as of a PackedBatch
        return MntpBatch(
            self.batch.to(device),
            self.index.to(device, non_blocking=background),
            self.targets.to(device, non_blocking=background),
        )


def uniform_draws(seed: int, sample_id: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The random numbers of one sample: [2, length] float64 in [0, 1), and [length] uint64 words.

    The raw words of Philox are used, since numpy promises those in every version.
    """
    key = np.array([seed, sample_id], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=[0, 0, 0, MASK_STREAM]).random_raw(3 * length).reshape(3, length)
    return (words[:2] >> np.uint64(11)) * 2.0**-53, words[2]


def mask_batch(
    sequences: Sequence[Sequence[int]] | np.ndarray,
    special_mask: Sequence[Sequence[bool]] | np.ndarray,
    config: MaskingConfig,
    *,
    seed: int,
    sample_ids: Sequence[int] | np.ndarray,
) -> MntpBatch:
    """Hides tokens of the sequences, packs them and lists what to score.

    Args:
        sequences: B sequences of token ids, or an integer array [B, L].
        special_mask: the same shape, True for the special tokens, which are never selected.
        config: how many tokens are hidden, and how.
        seed: 0 … 2^64 - 1, one for the whole run.
        sample_ids: B integers; (seed, sample id) decides the draws, and they key the dropout of the packed batch.

    Returns:
        The packed batch on the CPU with the hidden tokens replaced, its rows to score and their targets.

    Raises:
        ValueError: the three inputs do not fit each other, or a seed or sample id is negative.
    """
    lengths = [len(sequence) for sequence in sequences]
    if [len(flags) for flags in special_mask] != lengths or len(sample_ids) != len(lengths):
        raise ValueError(
            f"special_mask must have the shape of sequences and sample_ids one entry for each: got {len(lengths)} "
            f"sequences of {sum(lengths)} tokens, {len(special_mask)} masks of {sum(map(len, special_mask))} and "
            f"{len(sample_ids)} sample ids"
        )
    samples = [int(sample) for sample in sample_ids]
    if min([seed, *samples]) < 0:
        raise ValueError(f"seed and sample ids must not be negative, got seed {seed} and sample ids {samples[:8]}")
    # plain lists of Python integers pack ten times faster than rows of an array
    rows = sequences.tolist() if isinstance(sequences, np.ndarray) else sequences
    original = PackedBatch.from_sequences(rows, samples)
    special = np.concatenate([np.empty(0, bool), *(np.asarray(flags, dtype=bool) for flags in special_mask)])  # [T]
    draws = [uniform_draws(seed, sample, length) for sample, length in zip(samples, lengths, strict=True)]
    uniforms = np.concatenate([np.empty((2, 0)), *(uniform for uniform, _ in draws)], axis=1)  # [2, T]
    words = np.concatenate([np.empty(0, np.uint64), *(word for _, word in draws)])  # [T]

    selected = (uniforms[0] < config.probability) & ~special
    masked_share = 1.0 if config.style == "all_mask" else BERT_MASKED
    masked = selected & (uniforms[1] < masked_share)
    randomised = selected & ~masked & (uniforms[1] < masked_share + BERT_RANDOM)

    targets = original.input_ids.numpy()
    hidden = np.where(masked, config.mask_token_id, targets)
    hidden = np.where(randomised, (words % np.uint64(config.vocab_size)).astype(np.int64), hidden)
    scored = np.flatnonzero(selected & (original.position_ids.numpy() > 0))
    batch = PackedBatch(
        torch.from_numpy(hidden),
        original.cu_seqlens,
        original.max_seqlen,
        original.position_ids,
        original.sample_ids,
    )
    return MntpBatch(batch, torch.from_numpy(scored - 1), torch.from_numpy(targets[scored]))
