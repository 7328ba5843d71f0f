"""The files of a corpus's embeddings while they are made: what is on the disk, what is left, and the last name.

``corpus.py`` says which files there are, and why they are written as they are.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bivec.engine.errors import RunError
from bivec.engine.json_files import json_or_none, json_text
from bivec.engine.recipe import differences
from bivec.models.files import write_text_atomic

RESERVE_BYTES = 16 * 2**20  # left free for everything else on the disk
ANEW = "damaged, or changed by somebody: begin anew (--overwrite)"
STATE, VECTORS, DONE = "state.json", "vectors.npy", "done"


@dataclass(frozen=True)
class CorpusFiles:
    """The files of one corpus."""

    path: Path
    count: int  # texts
    dimension: int
    dtype: str
    slice_texts: int
    ids: Sequence[str] | None

    @property
    def folder(self) -> Path:
        """Where they lie until they are whole."""
        return self.path.with_name(f".{self.path.name}.partial")

    @property
    def record(self) -> Path:
        """Beside the final file: by what it was made."""
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def num_slices(self) -> int:
        """Slices of the corpus; the last may be shorter."""
        return -(-self.count // self.slice_texts)

    @property
    def row_bytes(self) -> int:
        """Bytes of an embedding in the file."""
        return self.dimension * np.dtype(self.dtype).itemsize

    def rows(self, number: int) -> slice:
        """The texts of a slice."""
        return slice(number * self.slice_texts, min((number + 1) * self.slice_texts, self.count))

    def texts(self, slices: Sequence[int]) -> int:
        """How many texts these slices have."""
        return sum(self.rows(k).stop - self.rows(k).start for k in slices)

    def left(self, *, trust_marks: bool = False) -> list[int]:
        """The slices that are not on the disk: not marked, or, unless marks are trusted, without their last row.

        Raises:
            RunError: the folder's files are not as :meth:`_begin` and :meth:`write` leave them.
        """
        try:
            done = np.fromfile(self.folder / DONE, np.uint8)
            with (self.folder / VECTORS).open("rb") as file:
                head = file.read(len(self._header()))
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise RunError(f"{self.folder}: {error.filename} cannot be read ({error.strerror}); {ANEW}") from error
        if len(done) != self.num_slices or done.max(initial=0) > 1:
            raise RunError(f"{self.folder / DONE}: not a 0 or 1 for each of {self.num_slices} slices; {ANEW}")
        if head != self._header() or size != len(head) + self.count * self.row_bytes:
            raise RunError(
                f"{self.folder / VECTORS}: not an array [{self.count}, {self.dimension}] {self.dtype}; {ANEW}"
            )
        return [k for k in range(self.num_slices) if not done[k] or (not self._is_written(k) and not trust_marks)]

    def _is_written(self, number: int) -> bool:
        """Whether the last row of a slice is more than the zeros that were reserved; a mark may be damaged."""
        left_behind = self.count - self.rows(number).stop + 1
        with (self.folder / VECTORS).open("rb") as file:
            file.seek(-left_behind * self.row_bytes, os.SEEK_END)
            return any(file.read(self.row_bytes))

    def _header(self) -> bytes:
        """Of ``vectors.npy``."""
        file = io.BytesIO()
        header = {"descr": np.dtype(self.dtype).str, "fortran_order": False, "shape": (self.count, self.dimension)}
        np.lib.format.write_array_header_1_0(file, header)
        return file.getvalue()

    def open(self, fingerprint: dict[str, Any], overwrite: bool) -> list[int] | None:
        """Goes on or begins: the slices that are left; None where the file is whole. For one process of all."""
        state = json_or_none(self.folder / STATE)
        if overwrite or state is None:
            shutil.rmtree(self.folder, ignore_errors=True)  # without its state: killed while it was made
        elif state != fingerprint:
            raise RunError(_other(self.folder, "holds the beginning of other embeddings", state, fingerprint))
        elif (self.folder / VECTORS).exists():
            return self.left()
        elif self.path.exists():  # killed behind the renaming
            self._record()
            return None
        if self.path.exists() and not overwrite:
            if json_or_none(self.record) == fingerprint:
                return None
            raise RunError(_other(self.path, "holds other embeddings", json_or_none(self.record), fingerprint))
        self._begin(fingerprint)
        return self.left()

    def _begin(self, fingerprint: dict[str, Any]) -> None:
        needed = self.count * self.row_bytes * (2 if self.path.suffix == ".parquet" else 1)
        free = shutil.disk_usage(self.path.parent).free
        if free < needed + RESERVE_BYTES:
            raise RunError(
                f"{self.path}: {self.count} embeddings take {needed / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are "
                "free; choose another disk, or dtype float16"
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        with full_disk_explained(self):
            with (self.folder / VECTORS).open("wb") as file:
                file.write(self._header())
                file.flush()
                _reserve(file.fileno(), file.tell() + self.count * self.row_bytes)
                os.fsync(file.fileno())
            (self.folder / DONE).write_bytes(bytes(self.num_slices))
            write_text_atomic(self.folder / STATE, json_text(fingerprint))

    def write(self, first: int, vectors: np.ndarray) -> None:
        """The rows of a slice [n, D], then the mark that they are there."""
        with np.errstate(over="ignore"):
            rows = vectors.astype(self.dtype)
        bad = ~np.isfinite(rows).all(axis=1)
        if bad.any():
            index = int(np.argmax(bad))
            finite = np.isfinite(vectors[index]).all()
            why = "is too large for float16: choose float32" if finite else "is NaN or infinite"
            raise RunError(f"{self.path}: text {first + index}: its embedding {why}")
        size = (self.folder / VECTORS).stat().st_size
        _write_at(self.folder / VECTORS, size - (self.count - first) * self.row_bytes, rows.tobytes())
        _write_at(self.folder / DONE, first // self.slice_texts, b"\1")

    def finish(self) -> None:
        """Gives the file its name."""
        if left := self.left(trust_marks=True):
            raise RunError(f"{self.path}: {len(left)} slices are missing; repeat the command")
        source = self.folder / VECTORS
        if self.path.suffix == ".parquet":
            source = self.folder / "vectors.parquet"
            self._write_parquet(source)
        self.record.unlink(missing_ok=True)  # of what is replaced now
        source.replace(self.path)
        self._record()

    def _record(self) -> None:
        (self.folder / STATE).replace(self.record)
        shutil.rmtree(self.folder)

    def _write_parquet(self, target: Path) -> None:
        """A row group a slice."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        vectors = np.load(self.folder / VECTORS, mmap_mode="r")
        fields = [pa.field("embedding", pa.list_(pa.float32(), self.dimension), nullable=False)]
        schema = pa.schema(fields if self.ids is None else [pa.field("id", pa.string()), *fields])
        with pq.ParquetWriter(target, schema, use_dictionary=False, compression="none") as writer:
            for number in range(self.num_slices):
                flat = pa.array(np.array(vectors[self.rows(number)]).reshape(-1))
                columns = [pa.FixedSizeListArray.from_arrays(flat, type=fields[0].type)]
                if self.ids is not None:
                    columns.insert(0, pa.array(list(self.ids[self.rows(number)]), pa.string()))
                writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=self.slice_texts)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def _other(place: Path, holds: str, before: Any, now: dict[str, Any]) -> str:
    changed = "made by something else" if not isinstance(before, dict) else "; ".join(differences(before, now)[:6])
    return f"{place}: {holds} ({changed}); give another output, or overwrite what is there (--overwrite)"


def _reserve(descriptor: int, size: int) -> None:
    """Makes the file so large, with its space on the disk where the file system can promise it."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
        else:
            return
    os.ftruncate(descriptor, size)


def _write_at(file: Path, position: int, data: bytes) -> None:
    with file.open("r+b") as handle:
        handle.seek(position)
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


@contextmanager
def full_disk_explained(job: CorpusFiles) -> Iterator[None]:
    """Turns a full disk into an error that says what is kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"{job.path}: the disk is full; what has been encoded is kept. Free some space and repeat the command"
        ) from error
