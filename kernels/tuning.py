"""Reads the tuning tables ``kernels/tuning/*.json``: tiles, warps and stages of every kernel, as data.

A row::

    {"kernel": "attention_forward", "arch": "sm_90", "key": {"head_dim": 128, "itemsize": 2},
     "config": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
     "compiled": {"registers": 168, "spills": 0, "shared": 65536}, "chosen_by": "compiled"}

``compiled`` is the worst over the kernel's options, from ``kernels/aot.py``; ``chosen_by`` is "compiled" (the first
candidate that does not spill) or names the device on which ``benchmarks/tune.py`` timed it. An architecture without
rows takes those of its nearest older relative.
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
    """The architecture whose rows serve ``architecture``: itself, or the newest older one of its maker."""
    if architecture in ARCHITECTURES:
        return architecture
    if architecture.startswith("gfx"):
        return "gfx942"
    capability = int(architecture.removeprefix("sm_"))
    older = [a for a in ARCHITECTURES if a.startswith("sm_") and int(a.removeprefix("sm_")) <= capability]
    return older[-1] if older else "sm_80"


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


def config_for(table: str, kernel: str, architecture: str, **key: int) -> Config:
    """The configuration of ``kernel`` on ``architecture`` for ``key`` (head_dim, itemsize, …).

    Raises:
        KeyError: the table has no such row.
    """
    override = _overrides.get().get(kernel)
    return override or _lookup(table)[kernel, table_architecture(architecture), _key(key)]
