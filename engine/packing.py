"""Which samples make which batch: pure functions of their arguments, so that a resumed run meets the same batches.

Nothing here keeps a state. The order of an epoch follows from (n, seed, epoch), the batch of a step from (n, batch
size, seed, step), and the micro-batches of a batch from the lengths of its sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

ORDER_STREAM = 1  # the last word of the Philox counter: keeps these draws apart from those of masking.py


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits n samples.

    The raw 64-bit words of Philox are sorted, instead of asking numpy for a permutation: numpy promises the same words
    in every version, not the same permutation.

    Args:
        n: number of samples, 0 or more.
        seed: 0 … 2^64 - 1.
        epoch: 0, 1, 2, …

    Returns:
        [n] int64, a permutation of 0 … n-1; read-only, since it is cached between the steps of an epoch.

    Raises:
        ValueError: a negative argument.
    """
    if min(n, seed, epoch) < 0:
        raise ValueError(f"epoch_order needs n, seed and epoch of 0 or more, got {n}, {seed} and {epoch}")
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=[0, 0, 0, ORDER_STREAM])
    order = np.argsort(words.random_raw(n), kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def indices_for_step(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The samples of one step in an endless sequence of epochs; what is left over at an epoch's end is dropped.

    Args:
        n: number of samples.
        batch_size: samples of a step.
        seed: seed of the order.
        step: 0, 1, 2, … counted over all epochs.

    Returns:
        [batch_size] int64, all different.

    Raises:
        ValueError: fewer samples than one batch needs, or a batch size or step out of range.
    """
    if batch_size < 1 or step < 0:
        raise ValueError(f"batch_size must be at least 1 and step at least 0, got {batch_size} and {step}")
    if n < batch_size:
        raise ValueError(f"{n} samples do not fill one batch of {batch_size}: give more data or a smaller batch")
    epoch, position = divmod(step, n // batch_size)
    return epoch_order(n, seed, epoch)[position * batch_size : (position + 1) * batch_size]


def token_budget_batches(
    lengths: Sequence[int] | np.ndarray, tokens_per_batch: int, max_sequences: int | None = None
) -> list[list[int]]:
    """Groups sequences so that no batch holds more tokens than a budget.

    The sequences are taken longest first, so that neighbours have similar lengths and the batch that may not fit the
    memory, if any, comes first.

    Args:
        lengths: tokens of each sequence.
        tokens_per_batch: the budget. A sequence longer than it makes a batch of its own.
        max_sequences: at most so many sequences in a batch; no such limit when None.

    Returns:
        Lists of positions in ``lengths``: every position once, equal lengths in their given order.

    Raises:
        ValueError: a budget or a limit below 1.
    """
    if tokens_per_batch < 1 or (max_sequences is not None and max_sequences < 1):
        raise ValueError(
            f"tokens_per_batch and max_sequences must be at least 1, got {tokens_per_batch} and {max_sequences}"
        )
    sizes = np.asarray(lengths, dtype=np.int64)
    batches: list[list[int]] = []
    used = 0
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        full = not batches or used + size > tokens_per_batch or len(batches[-1]) == max_sequences
        if full:
            batches.append([])
            used = 0
        batches[-1].append(index)
        used += size
    return batches
