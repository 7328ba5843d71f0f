"""Writing directories and files so that a kill or a full disk never leaves a half-written one under the final name."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bivec.models.errors import BivecError


@contextmanager
def _readable_disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk into an error that says so; safetensors reports it as text, hence the second test."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            raise BivecError(
                f"{path}: the disk is full; what was there before is unchanged. Free some space or choose another directory"
            ) from error
        raise


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling directory that takes the name ``path`` when the block ends without an error.

    A directory that already has the name is replaced. An error removes the temporary directory and leaves the old one.

    Raises:
        BivecError: the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with _readable_disk_errors(path):
            temporary.mkdir()
            yield temporary
            _sync(temporary)
            if path.exists():
                retired = temporary.with_suffix(".old")
                os.rename(path, retired)
                os.rename(temporary, path)
                shutil.rmtree(retired)
            else:
                os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Writes a UTF-8 file through a temporary name.

    Raises:
        BivecError: the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _readable_disk_errors(path):
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    """Forces the files of the directory to the disk before it gets its final name."""
    for file in directory.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
