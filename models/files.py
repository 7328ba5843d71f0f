"""Writing directories and files so that a kill or a full disk never leaves a half-written one under the final name."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bivec.models.errors import BivecError, CheckpointError

TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}\.tmp(\.\w+)?|\..+-\d{6,}\.old\.tmp")  # those below, and of old checkpoints


@contextmanager
def _readable_disk_errors(path: Path, error_class: type[BivecError]) -> Iterator[None]:
    """Turns a full disk into an error that says so; safetensors reports it as text, hence the second test."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            raise error_class(
                f"{path}: the disk is full; what was there before is unchanged. "
                "Free some space or choose another directory"
            ) from error
        raise


@contextmanager
def atomic_directory(path: str | Path, *, stale: Sequence[str] = (), last: str | None = None) -> Iterator[Path]:
    """Yields a temporary directory whose files appear under ``path`` when the block ends without an error.

    A directory that does not exist yet gets its name in one step. Into one that exists the new files are moved one by
    one: they replace their namesakes, and every other file stays, so that saving into a folder never deletes what
    somebody else put there. An error removes the temporary directory and leaves ``path`` as it was.

    Args:
        path: the directory; parents are made.
        stale: patterns of files directly in ``path`` that go although they have no new namesake (the shards of an
            earlier save).
        last: the file without which nobody loads the directory. In a directory that exists it goes first and comes
            last, so that a kill between the moves leaves something that is refused, not a mixture that loads.

    Raises:
        CheckpointError: the disk is full, or ``path`` is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; give a directory")
    existed = path.is_dir()
    # inside a directory that exists: on its file system even where it is a mount point or a symbolic link
    parent = path if existed else path.parent
    temporary = parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with _readable_disk_errors(path, CheckpointError):
            temporary.mkdir(parents=True)
            yield temporary
            _sync(temporary)
            if existed:
                _move_files(temporary, path, stale, last)
            else:
                temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_files(source: Path, target: Path, stale: Sequence[str], last: str | None) -> None:
    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    if last is not None:
        (target / last).unlink(missing_ok=True)
    for old in {file for pattern in stale for file in target.glob(pattern)}:
        if old.relative_to(target) not in files:
            old.unlink()
    for file in sorted(files, key=lambda file: (str(file) == last, file)):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).replace(target / file)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Writes a UTF-8 file through a temporary name.

    Raises:
        BivecError: the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _readable_disk_errors(path, BivecError):
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary file of the same ending, which gets its name when the block ends without an error.

    Raises:
        CheckpointError: the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        with _readable_disk_errors(path, CheckpointError):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned(directory: str | Path) -> None:
    """Deletes what killed processes have left under temporary names; no other process may be writing there."""
    for path in Path(directory).glob(".*.tmp*"):
        if not TEMPORARY.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(directory: Path) -> None:
    """Forces the files of the directory to the disk before it gets its final name."""
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
