"""The kernels of losses, pooling and layers, as ``tune.py`` tunes them: candidates, and a call to time.

Their rows are those that the tables have. A candidate is compiled with every call that ``kernels/aot.py`` checks.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bivec.kernels import (
    aot_cases_cross_entropy,
    aot_cases_info_nce,
    aot_cases_layers,
    aot_cases_lora,
    aot_cases_segment_pool,
    apply_rotary,
    info_nce,
    linear_cross_entropy,
    lora_linears,
    rms_norm,
    segment_pool,
    swiglu,
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


def _products(inner: str, *candidates: tuple[int, int, int, int]) -> tuple[Config, ...]:
    """(BLOCK_T, the other block, num_warps, num_stages)."""
    return tuple(
        Config({"BLOCK_T": tokens, inner: other}, warps, stages) for tokens, other, warps, stages in candidates
    )


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
    ("rms_norm_forward", 2): _configs("BLOCK_TILE", (2048, 4), (4096, 4), (2048, 2), (1024, 4)),
    ("rms_norm_forward", 4): _configs("BLOCK_TILE", (2048, 4), (1024, 4), (2048, 2)),
    ("rms_norm_backward", 2): _configs("BLOCK_TILE", (2048, 4), (1024, 4), (4096, 4), (2048, 2)),
    ("rms_norm_backward", 4): _configs("BLOCK_TILE", (2048, 4), (1024, 4), (2048, 2)),
    ("rotary", 2): _configs("BLOCK_TILE", (2048, 4), (1024, 4), (4096, 4), (1024, 2)),
    ("rotary", 4): _configs("BLOCK_TILE", (1024, 4), (2048, 4), (512, 4)),
    ("gated_unit_forward", 2): _configs("BLOCK_N", (1024, 4), (2048, 4), (2048, 8), (512, 2)),
    ("gated_unit_forward", 4): _configs("BLOCK_N", (1024, 4), (512, 4), (2048, 8)),
    ("gated_unit_backward", 2): _configs("BLOCK_N", (1024, 4), (2048, 4), (2048, 8), (512, 2)),
    ("gated_unit_backward", 4): _configs("BLOCK_N", (1024, 4), (512, 4), (2048, 8)),
    ("lora_project", 2): _products("BLOCK_K", (64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
    ("lora_project", 4): _products("BLOCK_K", (64, 32, 4, 3), (64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
    ("lora_update", 2): _products("BLOCK_N", (64, 64, 4, 1), (64, 128, 8, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
    ("lora_update", 4): _products("BLOCK_N", (64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
    ("lora_gradient", 2): _products("BLOCK_N", (64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
    ("lora_gradient", 4): _products("BLOCK_N", (32, 64, 4, 3), (32, 64, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
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


def _rms_norm(dtype: torch.dtype, device: torch.device) -> Run:
    """With a residual and a frozen weight, as wide as Mistral."""
    x, residual = (torch.randn(16384, 4096, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.ones(4096, device=device, dtype=dtype)

    def run() -> Tensor:
        y, total = rms_norm(x, weight, 1e-5, residual=residual, backend="triton")
        return y.sum() + total.sum()

    return run


def _rotary(dtype: torch.dtype, device: torch.device) -> Run:
    """Mistral's heads."""
    q, k = (torch.randn(16384, heads, 128, device=device, dtype=dtype, requires_grad=True) for heads in (32, 8))
    angles = torch.rand(4096, 64, device=device)
    cos, sin, position_ids = angles.cos(), angles.sin(), torch.arange(16384, device=device) % 512

    def run() -> Tensor:
        turned_q, turned_k = apply_rotary(q, k, cos, sin, position_ids, backend="triton")
        return turned_q.sum() + turned_k.sum()

    return run


def _swiglu(dtype: torch.dtype, device: torch.device) -> Run:
    """Mistral's feed-forward block."""
    gate, up = (torch.randn(8192, 14336, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    return lambda: swiglu(gate, up, backend="triton").sum()


def _lora_linears(dtype: torch.dtype, lora_dtype: torch.dtype, device: torch.device) -> Run:
    """q, k and v of Mistral, with dropout."""
    x = torch.randn(16384, 4096, device=device, dtype=dtype, requires_grad=True)
    weights = [torch.randn(out, 4096, device=device, dtype=dtype) for out in (4096, 1024, 1024)]
    lora_as = [torch.randn(16, 4096, device=device, dtype=lora_dtype, requires_grad=True) for _ in weights]
    lora_bs = [torch.randn(len(w), 16, device=device, dtype=lora_dtype, requires_grad=True) for w in weights]
    options = {"dropout_p": 0.05, "seed": 1, "backend": "triton"}
    return lambda: sum(y.sum() for y in lora_linears(x, weights, lora_as, lora_bs, 2.0, **options))


@dataclass(frozen=True)
class Table:
    """A table, the calls that its kernels are checked with, and those that they are timed with."""

    name: str  # of kernels/tuning/NAME.json
    cases: Callable[[], list[Case]]
    timed: dict[str, Callable[..., Run]]  # by kernel; takes the dtypes of the row's key, and a device


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
    Table("rms_norm", aot_cases_layers.cases, {"rms_norm_forward": _rms_norm, "rms_norm_backward": _rms_norm}),
    Table("rotary", aot_cases_layers.cases, {"rotary": _rotary}),
    Table("swiglu", aot_cases_layers.cases, {"gated_unit_forward": _swiglu, "gated_unit_backward": _swiglu}),
    Table(
        "lora",
        aot_cases_lora.all_cases,
        dict.fromkeys(("lora_project", "lora_update", "lora_gradient"), _lora_linears),
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
        """The file's name."""
        return self.source.name

    def launches(self, config: Config, options: Container[str] = ()) -> list[Launch]:
        """This kernel in every case of the row's itemsizes; ``options`` are attention's."""
        found = []
        for case in self.source.cases():
            # a label begins with the dtypes, in the order of the key's itemsizes
            if all(ITEMSIZES[word] == size for word, size in zip(case.label.split(), self.key.values(), strict=False)):
                with recording(self.arch) as launches, overriding({self.kernel: config}):
                    case.call()
                found += [launch for launch in launches if launch.kernel.__name__ == self.kernel]
        return found

    def problem(self, device: torch.device) -> Run:
        """The call that is timed."""
        dtypes = [DTYPES[itemsize] for itemsize in self.key.values() or (2,)]
        return self.source.timed[self.kernel](*dtypes, device)

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
                if row["arch"].startswith("gfx"):  # where a pipelined loop is unrolled, to twice the code
                    flat = [replace(config, num_stages=1) for config in candidates]
                    candidates = tuple(config for index, config in enumerate(flat) if config not in flat[:index])
                yield RowsRow(table, row["kernel"], row["arch"], row["key"], candidates)
