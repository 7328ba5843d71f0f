"""Chooses the tiles, warps and stages of the kernels, and writes them to the tables kernels/tuning/*.json.

    python benchmarks/tune.py --compiled   # no GPU: the first candidate without a spill, for all architectures
    python benchmarks/tune.py --timed      # on a GPU: the fastest candidate without a spill, for its architecture

Candidates are listed by preference, larger tiles first: they read K and V less often. A candidate counts as not
spilling when no option of the kernel spills, alone or with all others, in any dtype that the row serves, and its
shared memory fits. ``--timed`` measures forward and backward, attention's on batches of real lengths, every candidate
in turn, and the table says where. The candidates of the other kernels are in ``tune_rows.py``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from itertools import islice, product
from typing import Any

import torch
import tune_rows
from timing import GpuMeter, Meter, interleaved

from bivec.kernels import aot, aot_cases, tuning
from bivec.kernels.attention_short import LENGTHS
from bivec.kernels.attention_tiles import Problem
from bivec.kernels.launch import Launch, architecture, recording
from bivec.kernels.tuning import ARCHITECTURES, Config, has_config, overriding

# (BLOCK_M, BLOCK_N, num_warps, num_stages), by itemsize and head_dim
LONG_CANDIDATES = {
    "attention_forward": {
        (2, 64): [(128, 128, 8, 2), (128, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 1)],
        (2, 128): [(128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1)],
        (2, 256): [(128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1)],
        (4, 64): [(64, 32, 4, 2), (32, 32, 4, 1), (32, 16, 4, 1)],
        (4, 128): [(32, 16, 4, 1), (16, 16, 4, 1)],
        (4, 256): [(16, 16, 8, 1), (16, 16, 4, 1)],
    },
    "attention_backward_q": {
        (2, 64): [(128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 1)],
        (2, 128): [(128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1)],
        (2, 256): [(128, 32, 8, 1), (64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)],
        (4, 64): [(32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)],
        (4, 128): [(16, 16, 4, 1), (16, 16, 8, 1)],
        (4, 256): [(16, 16, 8, 1), (16, 16, 4, 1)],
    },
    "attention_backward_kv": {
        (2, 64): [(64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 1), (32, 32, 4, 1)],
        (2, 128): [(32, 128, 8, 2), (32, 128, 8, 1), (64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 4, 1), (32, 32, 4, 1)],
        (2, 256): [(32, 32, 8, 2), (32, 32, 8, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)],
        (4, 64): [(32, 32, 8, 1), (32, 32, 4, 1), (16, 16, 4, 1)],
        (4, 128): [(16, 16, 4, 1), (16, 16, 8, 1)],
        (4, 256): [(16, 16, 8, 1), (16, 16, 4, 1)],
    },
}
# (BLOCK_M, num_warps, num_stages), by itemsize and the elements of the tile: length * head_dim.
SHORT_CANDIDATES = {
    "attention_short_forward": {
        (2, 4096): [(64, 4, 2), (64, 4, 1), (32, 4, 1)],
        (2, 8192): [(64, 4, 2), (64, 4, 1), (32, 4, 1), (32, 8, 1)],
        (2, 16384): [(64, 4, 2), (64, 8, 2), (64, 8, 1), (32, 4, 1), (32, 8, 1), (16, 4, 1)],
    },
    "attention_short_backward": {
        (2, 4096): [(64, 4, 2), (32, 4, 2), (32, 4, 1), (16, 4, 1)],
        (2, 8192): [(64, 8, 2), (32, 4, 2), (32, 4, 1), (32, 8, 1), (16, 4, 1)],
        (2, 16384): [(32, 8, 1), (16, 8, 1), (32, 4, 1), (16, 4, 1)],
    },
}


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the table: what is looked up, and the configurations that it may name."""

    kernel: str
    arch: str
    head_dim: int
    itemsize: int
    length: int | None  # of the short path's tile
    candidates: tuple[Config, ...]
    table: str = "attention"

    @property
    def may_lack(self) -> bool:
        """Whether the table can do without: what the short path lacks, the long one serves."""
        return self.length is not None

    @property
    def matmul(self) -> bool:
        """Whether it must use tensor cores."""
        return self.itemsize == 2

    @property
    def key(self) -> dict[str, int]:
        """What the table is looked up by."""
        key = {"head_dim": self.head_dim, "itemsize": self.itemsize}
        return key if self.length is None else key | {"length": self.length}

    def launches(self, config: Config, options: Container[str] = tuple(aot_cases.OPTIONS)) -> list[Launch]:
        """This kernel with every option that the row serves, or with some of them."""
        problems = []
        for _, dtype, option, passes in aot_cases.variants(self.itemsize):
            if option in options and any(name in self.kernel for name in passes):
                problems.append(aot_cases.attention_problem(dtype, self.head_dim, **aot_cases.OPTIONS[option]))
        if "all" in options and self.head_dim == 128 and self.length in (None, 64):
            problems += aot_cases.other_shapes(self.itemsize)
        found = []
        for problem in problems:
            with recording(self.arch) as launches:
                self.run(problem, config)
            found += [launch for launch in launches if launch.kernel.__name__ == self.kernel]
        return found

    def problem(self, device: torch.device) -> Problem:
        """The call that is timed."""
        return timing_problem(self, device)

    def run(self, problem: Problem, config: Config) -> None:
        """All kernels of the path: this one with ``config``, and so those for which the table has no row."""
        path = LONG_CANDIDATES if self.length is None else SHORT_CANDIDATES
        lacking = [kernel for kernel in path if not has_config("attention", kernel, self.arch, **self.key)]
        with overriding(dict.fromkeys([*lacking, self.kernel], config)):
            if self.length is None:
                aot_cases.run_long(problem)
            else:
                aot_cases.run_short(problem, self.length)


AnyRow = Row | tune_rows.RowsRow


def rows(architectures: tuple[str, ...]) -> Iterator[Row]:
    """All rows that attention looks up."""
    for arch, head_dim, itemsize in product(architectures, aot_cases.HEAD_DIMS, (2, 4)):
        for kernel, table in LONG_CANDIDATES.items():
            configs = [Config({"BLOCK_M": m, "BLOCK_N": n}, w, s) for m, n, w, s in table[itemsize, head_dim]]
            yield Row(kernel, arch, head_dim, itemsize, None, for_architecture(configs, arch))
        for kernel, length in product(SHORT_CANDIDATES, LENGTHS):
            configs = [
                Config({"BLOCK_M": m}, w, s)
                for m, w, s in SHORT_CANDIDATES[kernel].get((itemsize, length * head_dim), ())
            ]
            if configs:
                yield Row(kernel, arch, head_dim, itemsize, length, for_architecture(configs, arch))


def for_architecture(configs: list[Config], arch: str) -> tuple[Config, ...]:
    """Those that suit ``arch``.

    On AMD a thread has 512 registers with 4 wavefronts and 256 with 8, too few for the tiles here. And a pipelined loop
    is unrolled there, to twice the code and a fifth more registers; several wavefronts of a SIMD hide latency instead.
    """
    if not arch.startswith("gfx"):
        return tuple(configs)
    fitting = [replace(config, num_stages=1) for config in configs if config.num_warps <= 4]
    return tuple(config for index, config in enumerate(fitting) if config not in fitting[:index])


def compiled(row: AnyRow, reports: list[aot.Report | aot.Failure]) -> dict[str, Any] | None:
    """The worst figures over the options; None where one of them cannot be used."""
    limit = aot.SHARED_LIMITS[row.arch]
    for report in reports:
        failed = isinstance(report, aot.Failure) or report.shared > limit or report.spills
        if failed or (row.matmul and not report.instructions.tensor_core):
            return None
    figures = {
        "registers": max(r.registers for r in reports),
        "spills": max(r.spills for r in reports),
        "shared": max(r.shared for r in reports),
    }
    if row.table == "attention":
        figures["tensor_core"] = min(r.instructions.tensor_core for r in reports)
    return figures


def usable(
    attempts: list[tuple[AnyRow, Config]], jobs: int | None, options: Container[str] = tuple(aot_cases.OPTIONS)
) -> list[dict[str, Any] | None]:
    """For rows and configurations, the worst figures over ``options``; None where one of them cannot be used."""
    launches = [row.launches(config, options) for row, config in attempts]
    pairs = [(launch, row.arch) for (row, _), own in zip(attempts, launches, strict=True) for launch in own]
    outcomes = iter(aot.reports(pairs, jobs))
    return [compiled(row, list(islice(outcomes, len(own)))) for (row, _), own in zip(attempts, launches, strict=True)]


def choose_compiled(wanted: list[AnyRow], jobs: int | None) -> list[dict[str, Any]]:
    """Every row with its first usable candidate; a row that the table may lack and that has none is left out.

    Raises:
        RuntimeError: another row has none.
    """
    chosen: dict[AnyRow, dict[str, Any]] = {}
    for attempt in range(max(len(row.candidates) for row in wanted)):
        still = [
            (row, row.candidates[attempt]) for row in wanted if row not in chosen and attempt < len(row.candidates)
        ]
        first = usable(still, jobs, ("all",))  # the likeliest to spill, before the rest is compiled
        still = [pair for pair, figures in zip(still, first, strict=True) if figures is not None]
        for (row, config), figures in zip(still, usable(still, jobs), strict=True):
            if figures is not None:
                chosen[row] = entry(row, config, figures, "compiled")
        print(f"candidate {attempt + 1}: {len(chosen)} of {len(wanted)} rows have one that does not spill", flush=True)
    missing = [row for row in wanted if row not in chosen]
    for row in missing:
        print(f"every candidate spills or does not fit: {row.kernel} on {row.arch}, {row.key}")
    if not all(row.may_lack for row in missing):
        raise RuntimeError("each of these rows needs a configuration, but for those of the short path")
    return [chosen[row] for row in wanted if row in chosen]


def entry(row: AnyRow, config: Config, figures: dict[str, Any], chosen_by: str) -> dict[str, Any]:
    """A row of the table."""
    settings = config.blocks | {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return {
        "kernel": row.kernel,
        "arch": row.arch,
        "key": row.key,
        "config": settings,
        "compiled": figures,
        "chosen_by": chosen_by,
    }


def timing_problem(row: Row, device: torch.device) -> Problem:
    """About 16k tokens in sequences of mixed lengths: up to the tile on the short path, up to 1,024 on the long one."""
    generator = torch.Generator().manual_seed(0)
    longest = row.length or 1024
    lengths = torch.randint(max(longest // 4, 1), longest + 1, (16384 // (longest * 5 // 8),), generator=generator)
    lengths = lengths.sort(descending=True).values
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int().to(device)
    dtype = torch.bfloat16 if row.itemsize == 2 else torch.float32
    tokens, kv_heads, group = int(lengths.sum()), 8, 4
    q, k, v = (
        torch.randn(tokens, heads, row.head_dim, device=device, dtype=dtype)
        for heads in (kv_heads * group, kv_heads, kv_heads)
    )
    order = torch.arange(len(lengths), dtype=torch.int32, device=device)
    none: dict[str, Any] = {"softcap": None, "left": None, "right": None, "seed": None, "sample_ids": None}
    return Problem(q, k, v, cu_seqlens, cu_seqlens, order, softmax_scale=row.head_dim**-0.5, dropout_p=0.0, **none)


def choose_timed(wanted: list[AnyRow], device: torch.device, where: str, meter: Meter) -> list[dict[str, Any]]:
    """Every row with the fastest of its usable candidates, run in turns: forward and backward of the row's path."""
    found = []
    for row in wanted:
        attempts = [(row, config) for config in row.candidates]
        runnable = {
            str(config): (config, figures)
            for (_, config), figures in zip(attempts, usable(attempts, None), strict=True)
            if figures is not None
        }
        problem = row.problem(device)
        if not runnable:
            print(f"{row.kernel} {row.key}: no candidate can be used, the table's row stays")
            continue
        runs = {name: partial(row.run, problem, config) for name, (config, _) in runnable.items()}
        timings = interleaved(meter, runs, budget_ms=50.0, max_repeats=20)
        best = min(timings, key=lambda name: timings[name].ms)
        times = ", ".join(f"{timing.ms:.3f}" for timing in timings.values())
        print(f"{row.kernel} {row.key}: {best}, {timings[best].ms:.3f} ms of {times}", flush=True)
        found.append(entry(row, *runnable[best], f"timed on {where}, {datetime.now(timezone.utc).date().isoformat()}"))
    return found


def write(table: str, entries: list[dict[str, Any]], wanted: list[AnyRow]) -> None:
    """Replaces the rows ``wanted`` of the table by ``entries``; one line a row."""
    path = tuning.FOLDER / f"{table}.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    replaced = [(row.kernel, row.arch, row.key) for row in wanted]
    kept = [row for row in old if (row["kernel"], row["arch"], row["key"]) not in replaced]
    lines = ",\n".join(json.dumps(row) for row in sorted(kept + entries, key=place))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    temporary.replace(path)


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row stands in the table."""
    return ARCHITECTURES.index(row["arch"]), row["kernel"], *row["key"].values()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--compiled", action="store_true", help="by compiling, without a GPU")
    how.add_argument("--timed", action="store_true", help="by timing, on this GPU")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="with --compiled; default: all")
    parser.add_argument("--kernel", action="append", help="only these kernels")
    parser.add_argument("--jobs", type=int, help="processes that compile; default: one for each CPU")
    options = parser.parse_args()
    begin = time.perf_counter()
    if options.timed:
        if not torch.cuda.is_available():
            parser.error("--timed needs a GPU; --compiled does not")
        device = torch.device("cuda")
        architectures = (tuning.table_architecture(architecture(device)),)
    else:
        architectures = tuple(options.arch or ARCHITECTURES)
    all_rows: list[AnyRow] = [*rows(architectures), *tune_rows.rows(architectures)]
    chosen = [row for row in all_rows if not options.kernel or row.kernel in options.kernel]
    for table in dict.fromkeys(row.table for row in chosen):
        wanted = [row for row in chosen if row.table == table]
        if options.timed:
            entries = choose_timed(wanted, device, torch.cuda.get_device_name(), GpuMeter(device))
            timed = [(entry["kernel"], entry["key"]) for entry in entries]
            wanted = [row for row in wanted if (row.kernel, row.key) in timed]
        else:
            entries = choose_compiled(wanted, options.jobs)
        write(table, entries, wanted)
        print(f"{len(entries)} rows of {table} written to {tuning.FOLDER} in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
