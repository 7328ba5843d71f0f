"""Reads the tuning tables ``kernels/tuning/*.json``: tiles, warps and stages of every kernel, as data.

A row::

    {"kernel": "attention_forward", "arch": "sm_90", "key": {"head_dim": 128, "itemsize": 2},
     "config": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
     "compiled": {"registers": 168, "spills": 0, "shared": 65536}, "chosen_by": "compiled"}

``compiled`` is the worst over the kernel's options, from ``kernels/aot.py``; ``chosen_by`` is "compiled" (the first
candidate that does not spill) or names the device on which ``benchmarks/tune.py`` timed it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tuning"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")  # those the tables have rows for


@dataclass(frozen=True)
class Config:
    """How a kernel is launched."""

    blocks: dict[str, int]  # the constexprs that the table chooses: BLOCK_M, BLOCK_N, …
    num_warps: int
    num_stages: int


def table_architecture(architecture: str) -> str:
    """The architecture whose rows serve ``architecture``: its own, or those of a relative that it can run.

    The rows of sm_80 fit into 99 KB of shared memory, which is what sm_86, sm_89 and sm_120 have; the tensor memory
    that the rows of sm_100 count on is in sm_100 and sm_103 only.

    Raises:
        RuntimeError: a GPU older than sm_80.
    """
    if architecture.startswith("gfx"):
        return "gfx942"
    capability = int(architecture.removeprefix("sm_"))
    if capability < 80:
        raise RuntimeError(f'{architecture}: the Triton kernels need compute capability 8.0; use backend="torch"')
    return {9: "sm_90", 10: "sm_100"}.get(capability // 10, "sm_80")


@cache
def read_table(name: str) -> tuple[dict[str, Any], ...]:
    """The rows of ``kernels/tuning/{name}.json``."""
    return tuple(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


@cache
def _lookup(table: str) -> dict[tuple[Any, ...], Config]:
    return {(row["kernel"], row["arch"], _key(row["key"])): config_of(row) for row in read_table(table)}


def _key(key: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(key.items()))


def config_of(row: dict[str, Any]) -> Config:
    """The configuration in a row."""
    blocks = {name: value for name, value in row["config"].items() if name.startswith("BLOCK_")}
    return Config(blocks, row["config"]["num_warps"], row["config"]["num_stages"])


_overrides: ContextVar[dict[str, Config]] = ContextVar("bivec_tuning_overrides", default={})  # noqa: B039  never mutated


@contextmanager
def overriding(configs: dict[str, Config]) -> Iterator[None]:
    """Inside, the kernels named in ``configs`` are launched so, whatever the tables say: for tuning and for tests."""
    token = _overrides.set(_overrides.get() | configs)
    try:
        yield
    finally:
        _overrides.reset(token)


def has_config(table: str, kernel: str, architecture: str, **key: int) -> bool:
    """Whether :func:`config_for` finds a configuration."""
    return kernel in _overrides.get() or (kernel, table_architecture(architecture), _key(key)) in _lookup(table)


def config_for(table: str, kernel: str, architecture: str, **key: int) -> Config:
    """The configuration of ``kernel`` on ``architecture`` for ``key`` (head_dim, itemsize, …).

    Raises:
        KeyError: the table has no such row.
    """
    override = _overrides.get().get(kernel)
    return override or _lookup(table)[kernel, table_architecture(architecture), _key(key)]
