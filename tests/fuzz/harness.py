"""What the readers under test have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mutants
from oracles import Unreadable, differing

LLAMA: list[Path] = []  # the decoder of encode_corpus; filled by the worker
MUTATED: list[bytes | None] = [None]  # the mutant at hand, for a reader that removes its file; None: it is not there


@dataclass(frozen=True)
class Reader:
    """One kind of file, or of folder."""

    name: str
    build: Callable[[Path, Path], None]  # (empty folder, tiny decoder): writes the valid files
    files: dict[str, mutants.Mutation]  # which are mutated, and how
    read: Callable[[Path], Any]
    check: Callable[[Path, Path, str, Any, Any], str | None]  # valid folder, mutant's, file, both values -> complaint
    weights: dict[str, float] = field(default_factory=dict)  # how often a file is chosen; 1 where it is not there
    names_file: bool = True  # an error must name a place inside the mutant's folder


def refused_or(check: Callable[..., str | None]) -> Callable[..., str | None]:
    """An oracle that cannot read the file says that nobody should."""

    def checked(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
        try:
            return check(source, case, name, valid, found)
        except Unreadable as error:
            return f"{name} was accepted: {error}"

    return checked


def each(read: Callable[[Path], Any], *names: str) -> Callable[[Path], dict[str, Any]]:
    """Reads every file of a folder, there or not."""
    return lambda folder: {name: read(folder / name) for name in names}


def others_as_before(name: str, valid: dict, found: dict) -> str | None:
    return differing({k: v for k, v in valid.items() if k != name}, {k: v for k, v in found.items() if k != name})


def by_second_reading(read: Callable[[Path], Any]) -> Callable[..., str | None]:
    """The mutated file's value is that of another reading of it, the other files' that of the valid ones."""

    def check(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
        expected = read(case / name)
        if expected != found[name]:
            at = next(
                (i for i, pair in enumerate(zip(expected, found[name], strict=False)) if pair[0] != pair[1]), None
            )
            if at is None:
                return f"{name}: {len(found[name])} rows instead of {len(expected)}"
            return f"{name}, row {at}: {str(found[name][at])[:100]!r} instead of {str(expected[at])[:100]!r}"
        return others_as_before(name, valid, found)

    return refused_or(check)
