"""Which triples make which batch: every batch from one data set only (METHOD 5.5).

Texts of one set are of one kind, so that the other triples of a batch are hard to tell apart, and one instruction
reigns in it. Inside each set the rows are shuffled and cut into chunks of the global batch size; what is left over is
dropped; then the chunks of all sets are shuffled. Sets weigh by their size. All of it is a pure function of (sizes of
the sets, batch size, seed, epoch), so that any step can be had at once and a resumed run meets the same batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from bivec.engine.errors import DataError
from bivec.engine.packing import epoch_order
from bivec.engine.triples import Triple, TripleSet
from bivec.kernels import fold_seed

CHUNKS, ROWS = 0, 1  # folded into the seed: the order of the chunks, and of the rows of each set


class TripleBatches:
    """The batches of an endless sequence of epochs, each in an order of its own.

    Attributes:
        sets: the data sets.
        batch_size: triples of a step, over all processes.
        steps_per_epoch: batches of an epoch.
    """

    def __init__(self, sets: Sequence[TripleSet], batch_size: int, seed: int) -> None:
        """Of sets that were opened.

        Args:
            sets: see above; one with fewer triples than a batch contributes nothing, with a warning.
            batch_size: see above.
            seed: of the order.

        Raises:
            DataError: no set fills a batch.
            ValueError: a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.sets = list(sets)
        self.batch_size = batch_size
        self.seed = seed
        sizes = [len(triples) for triples in self.sets]
        _check_sizes([triples.name for triples in self.sets], sizes, batch_size)
        self._first_chunk = np.cumsum([0, *(size // batch_size for size in sizes)])  # [sets + 1] int64
        self.steps_per_epoch = int(self._first_chunk[-1])
        self._epoch = -1
        self._orders: dict[int, np.ndarray] = {}  # of the rows of a set in this epoch

    def rows(self, step: int) -> tuple[int, np.ndarray]:
        """The batch of a step.

        Args:
            step: 0, 1, 2, … counted over all epochs.

        Returns:
            The position of its set, and which rows of it: [batch_size] int64, all different; read-only.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        epoch, position = divmod(step, self.steps_per_epoch)
        chunk = int(epoch_order(self.steps_per_epoch, fold_seed(self.seed, CHUNKS), epoch)[position])
        which = int(np.searchsorted(self._first_chunk, chunk, side="right")) - 1
        start = (chunk - int(self._first_chunk[which])) * self.batch_size
        return which, self._order(which, epoch)[start : start + self.batch_size]

    def triples(self, step: int) -> list[Triple]:
        """The triples of a step, read from the disk, in the order of ``rows``."""
        which, rows = self.rows(step)
        return [self.sets[which][row] for row in rows]

    def _order(self, which: int, epoch: int) -> np.ndarray:
        """[rows of the set] int64: the order of a set; those of the epoch at hand are kept."""
        if epoch != self._epoch:
            self._epoch, self._orders = epoch, {}
        if which not in self._orders:
            self._orders[which] = epoch_order(len(self.sets[which]), fold_seed(self.seed, ROWS, which), epoch)
        return self._orders[which]


def _check_sizes(names: Sequence[str], sizes: Sequence[int], batch_size: int) -> None:
    """Warns of sets that do not fill a batch; if none does, there is nothing to train on."""
    small = [f"{name} ({size})" for name, size in zip(names, sizes, strict=True) if size < batch_size]
    if len(small) == len(sizes):
        largest = max(sizes, default=0)
        raise DataError(
            f"no data set fills one batch of {batch_size} triples: {', '.join(small) or 'there is none'}; batches come "
            f"from one set only: give more data{f', or a batch size of {largest} at most' if largest else ''}"
        )
    if small:
        warnings.warn(
            f"left out, with fewer triples than a batch of {batch_size}, which comes from one set: {', '.join(small)}",
            stacklevel=3,
        )
