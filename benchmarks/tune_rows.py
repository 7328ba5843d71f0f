"""The kernels that walk over rows (losses, pooling), as ``tune.py`` tunes them: candidates, and a call to time.

Their rows are those that the tables have. A candidate is compiled with every call that ``kernels/aot.py`` checks.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bivec.kernels import (
    aot_cases_cross_entropy,
    aot_cases_info_nce,
    aot_cases_segment_pool,
    info_nce,
    linear_cross_entropy,
    segment_pool,
)
from bivec.kernels.aot import Case
from bivec.kernels.launch import Launch, recording
from bivec.kernels.tuning import Config, overriding, read_table

ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
DTYPES = {2: torch.bfloat16, 4: torch.float32}
Run = Callable[[], Tensor]


def _configs(name: str, *candidates: tuple[int, int]) -> tuple[Config, ...]:
    """Of a kernel with one block size: (block, num_warps)."""
    return tuple(Config({name: block}, warps, 1) for block, warps in candidates)


def _tiles(*candidates: tuple[int, int, int]) -> tuple[Config, ...]:
    """(BLOCK_T, BLOCK_D, num_warps)."""
    return tuple(Config({"BLOCK_T": tokens, "BLOCK_D": dims}, warps, 1) for tokens, dims, warps in candidates)


# The first is the one in the tables: by preference, as without a GPU there is nothing to choose by but spills.
CANDIDATES = {
    ("cross_entropy_rows", None): _configs("BLOCK_V", (2048, 8), (4096, 8), (4096, 16), (1024, 4), (2048, 4)),
    ("info_nce_scores", 2): _configs("BLOCK_N", (512, 4), (1024, 4), (1024, 8), (256, 4)),
    ("info_nce_scores", 4): _configs("BLOCK_N", (512, 4), (1024, 4), (1024, 8), (256, 4)),
    ("info_nce_project", 2): _configs("BLOCK_D", (1024, 4), (2048, 8), (512, 4)),
    ("info_nce_project", 4): _configs("BLOCK_D", (1024, 4), (2048, 8), (512, 4)),
    ("segment_pool_forward", 2): _tiles((32, 128, 4), (16, 256, 4), (64, 64, 4), (16, 128, 2)),
    ("segment_pool_forward", 4): _tiles((32, 64, 4), (16, 128, 4), (64, 64, 4), (16, 64, 2)),
    ("segment_pool_backward", 2): _tiles((16, 256, 4), (32, 128, 4), (8, 256, 4)),
    ("segment_pool_backward", 4): _tiles((16, 128, 4), (32, 64, 4), (8, 256, 4)),
}


def _cross_entropy(dtype: torch.dtype, device: torch.device) -> Run:
    """Rows of 32,000 logits, from products that cost little."""
    hidden = torch.randn(4096, 64, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(32000, 64, device=device, dtype=dtype)
    targets = torch.randint(32000, (4096,), device=device)
    return lambda: linear_cross_entropy(hidden, weight, targets, backend="triton")


def _info_nce(dim: int, dtype: torch.dtype, device: torch.device) -> Run:
    queries, candidates = (torch.randn(4096, dim, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    return lambda: info_nce(queries, candidates, backend="triton")


def _segment_pool(dtype: torch.dtype, device: torch.device) -> Run:
    """Sequences of 128 tokens, as wide as Mistral."""
    hidden = torch.randn(128 * 128, 4096, device=device, dtype=dtype, requires_grad=True)
    cu_seqlens = torch.arange(0, len(hidden) + 1, 128, device=device, dtype=torch.int32)
    return lambda: segment_pool(hidden, cu_seqlens, backend="triton").sum()


@dataclass(frozen=True)
class Table:
    """A table, the calls that its kernels are checked with, and those that they are timed with."""

    name: str  # of kernels/tuning/NAME.json
    cases: Callable[[], list[Case]]
    timed: dict[str, Callable[[torch.dtype, torch.device], Run]]  # by kernel


TABLES = (
    Table("cross_entropy", aot_cases_cross_entropy.cases, {"cross_entropy_rows": _cross_entropy}),
    Table(
        "info_nce",
        aot_cases_info_nce.cases,
        {"info_nce_scores": partial(_info_nce, 64), "info_nce_project": partial(_info_nce, 4096)},
    ),
    Table(
        "segment_pool",
        aot_cases_segment_pool.cases,
        {"segment_pool_forward": _segment_pool, "segment_pool_backward": _segment_pool},
    ),
)


@dataclass(frozen=True, eq=False)
class RowsRow:
    """A row of one of the tables; what ``tune.Row`` is for attention."""

    source: Table
    kernel: str
    arch: str
    key: dict[str, int]
    candidates: tuple[Config, ...]
    may_lack: bool = False
    matmul: bool = False

    @property
    def table(self) -> str:
        return self.source.name

    def launches(self, config: Config, options: Container[str] = ()) -> list[Launch]:
        """This kernel in every case of the row's itemsize; ``options`` are attention's."""
        found = []
        for case in self.source.cases():
            if self.key.get("itemsize") in (None, ITEMSIZES[case.label.split()[0]]):
                with recording(self.arch) as launches, overriding({self.kernel: config}):
                    case.call()
                found += [launch for launch in launches if launch.kernel.__name__ == self.kernel]
        return found

    def problem(self, device: torch.device) -> Run:
        """The call that is timed."""
        return self.source.timed[self.kernel](DTYPES[self.key.get("itemsize", 2)], device)

    def run(self, problem: Run, config: Config) -> None:
        """Forward and backward."""
        with overriding({self.kernel: config}):
            problem().backward()


def rows(architectures: tuple[str, ...]) -> Iterator[RowsRow]:
    """The rows that the tables have for ``architectures``."""
    for table in TABLES:
        for row in read_table(table.name):
            if row["arch"] in architectures:
                candidates = CANDIDATES[row["kernel"], row["key"].get("itemsize")]
                yield RowsRow(table, row["kernel"], row["arch"], row["key"], candidates)
