"""Readers that are bad on purpose: the worker must find each of them out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutants
from harness import Reader

VALID = b"valid"


def build(folder: Path, llama: Path) -> None:
    (folder / "file").write_bytes(VALID)


def bad(harm: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Does no harm to the valid file."""
    return lambda folder: harm(folder) if (folder / "file").read_bytes() != VALID else None


def hang(folder: Path) -> None:
    while True:
        pass


def write(folder: Path) -> None:
    (folder.parents[1] / "outside").write_text("x", encoding="utf-8")


def raise_key_error(folder: Path) -> None:
    raise KeyError("of no kind of ours")


def say_wrong(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    return None if found == valid else "another value"


HARMS = {
    "crash": raise_key_error,
    "exit": lambda folder: os.kill(os.getpid(), 11),
    "hang": hang,
    "memory": lambda folder: len(bytearray(8 * 2**30)),
    "write": write,
    "wrong": lambda folder: 1,
}
CANARIES = {
    f"bad_{kind}": Reader(f"bad_{kind}", build, {"file": mutants.extend}, bad(harm), say_wrong)
    for kind, harm in HARMS.items()
}
