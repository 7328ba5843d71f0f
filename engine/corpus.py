"""A large corpus into one file of embeddings: restartable, and by several processes.

The corpus is cut into slices of consecutive texts. Those of a slice are read and tokenised by a thread while the slice
before is encoded, sorted by length, packed by a token budget and pooled (``Encoder.embed_slices``). Of several
processes (torchrun, one a GPU), which live as long as the corpus lasts, each takes every so many-th slice.

Until it is whole the output is a hidden folder beside its final name, ``.NAME.partial``:

* ``vectors.npy``: all rows, its space reserved at the start. A slice is written to its place and forced to the disk.
* ``done``: a byte for every slice, 1 once its rows are on the disk. No write of one byte is ever half done.
* ``state.json``: checksums of texts, weights and tokenizer, and the settings; written last, so with it the folder is
  whole. Whoever goes on must agree with all of it: the rows of two models or corpora are never mixed.

At the end ``vectors.npy`` is renamed (or made into Parquet, a row group a slice), and ``NAME.json`` keeps what was in
``state.json``. Rows are written, not stored through a memory map: where a disk is full a write is an error, a map kills
the process, and two machines would overwrite each other's part of a page. The file is for ``np.load(mmap_mode="r")``.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bivec.engine.distributed import ALONE, World
from bivec.engine.encoder import Encoder
from bivec.engine.encoder_inputs import progress_bar
from bivec.engine.errors import BivecError, ConfigError, DataError, RunError
from bivec.engine.fingerprint import model_checksum, tokenizer_checksum
from bivec.engine.recipe import differences
from bivec.models.files import write_text_atomic
from bivec.models.plain_json import parse_json

SLICE_TEXTS = 16384
SUFFIXES = (".npy", ".parquet")
DTYPES = ("float32", "float16")
RESERVE_BYTES = 16 * 2**20  # left free for everything else on the disk
PATIENCE_SECONDS = 10  # until a network file system shows what rank 0 has made
ANEW = "damaged, or changed by somebody: begin anew (--overwrite)"
STATE, VECTORS, DONE = "state.json", "vectors.npy", "done"


def encode_corpus(
    encoder: Encoder,
    texts: Sequence[str],
    path: str | Path,
    *,
    ids: Sequence[str] | None = None,
    instruction: str | None = None,
    prompt: str | None = None,
    tokens_per_batch: int | None = None,
    max_text_length: int | None = None,
    normalize_embeddings: bool | None = None,
    dtype: str = "float32",
    slice_texts: int = SLICE_TEXTS,
    overwrite: bool = False,
    world: World = ALONE,
    show_progress_bar: bool | None = None,
) -> Path:
    """Embeds a corpus into a file. A call that was stopped, even by a kill, is repeated to go on where it was.

    The file is then, byte for byte, that of a call that nobody stopped, and that of any number of processes, on the
    same kind of machine. A call whose file is there already does nothing.

    Args:
        encoder: the same one in every process.
        texts: anything with a length and slices: a list, or what ``load_texts`` returns, which reads tables lazily.
        path: a new ``.npy``, or ``.parquet`` with the column ``embedding``, a list of D float32.
        ids: names of the texts, the column ``id``; for ``.parquet``.
        instruction: put before every text, not pooled.
        prompt: in place of an instruction, to the letter (see :meth:`bivec.engine.encoder.Encoder.encode`).
        tokens_per_batch: tokens a batch, 4096 by default; may be another when a stopped call is repeated.
        max_text_length: tokens of a text alone, see :meth:`Encoder.encode`.
        normalize_embeddings: to unit length; None = as the encoder's settings say.
        dtype: "float32" or, in an .npy, "float16".
        slice_texts: texts of a slice: at most so many are encoded again after a kill.
        overwrite: start anew, whatever there is of ``path``; a whole file is replaced only by a whole one.
        world: the processes, of ``launched``, inside ``process_group``; all see the same file system.
        show_progress_bar: None = only for more than 1,000 texts.

    Returns:
        ``path``: [N, D], row i the embedding of text i.

    Raises:
        BivecError: before any work: bad texts or settings, another output under this name, a disk that is too small.
            Later: a disk that has become full, an embedding that is not finite.
    """
    path, head = Path(path), encoder.text_head(instruction, prompt)
    sizes = {"slice_texts": slice_texts, "tokens_per_batch": tokens_per_batch, "max_text_length": max_text_length}
    _check(path, texts, ids, dtype, sizes)
    job = _Job(path, len(texts), encoder.dimension, dtype, slice_texts, ids)
    fingerprint = _fingerprint(encoder, texts, ids, slice_texts)
    fingerprint["settings"] = {
        "instruction": instruction or "",
        "prompt": prompt,
        "max_text_length": max_text_length,
        "normalize_embeddings": encoder.config.normalize if normalize_embeddings is None else normalize_embeddings,
        "dtype": dtype,
        "slice_texts": slice_texts,
    }
    left = _opened(job, json.loads(json.dumps(fingerprint)), overwrite, world)
    if left is None:
        return path
    mine = left[world.rank :: world.size]
    pairs = ((k * slice_texts, [(head, text) for text in texts[job.rows(k)]]) for k in mine)
    done = (len(texts) - job.texts(left)) // world.size
    label = "encode" if world.size == 1 else f"encode, rank {world.rank} of {world.size}"
    show = show_progress_bar if world.is_main else False
    with progress_bar(done + job.texts(mine), show, done=done, label=label) as advance, _full_disk_explained(job):
        for first, vectors in encoder.embed_slices(
            pairs,
            tokens_per_batch=tokens_per_batch,
            max_text_length=max_text_length,
            normalize_embeddings=normalize_embeddings,
            advance=advance,
        ):
            job.write(first, vectors.numpy())
    world.barrier()  # all slices are on the disk
    if world.is_main:
        with _full_disk_explained(job):
            job.finish()
    world.barrier()  # the file is there
    return path


@dataclass(frozen=True)
class _Job:
    """The files of one corpus."""

    path: Path
    count: int  # texts
    dimension: int
    dtype: str
    slice_texts: int
    ids: Sequence[str] | None

    @property
    def folder(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")

    @property
    def record(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def num_slices(self) -> int:
        return -(-self.count // self.slice_texts)

    @property
    def row_bytes(self) -> int:
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
            with open(self.folder / VECTORS, "rb") as file:
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
        with open(self.folder / VECTORS, "rb") as file:
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
        state = _read_json(self.folder / STATE)
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
            if _read_json(self.record) == fingerprint:
                return None
            raise RunError(_other(self.path, "holds other embeddings", _read_json(self.record), fingerprint))
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
        with _full_disk_explained(self):
            with open(self.folder / VECTORS, "wb") as file:
                file.write(self._header())
                file.flush()
                _reserve(file.fileno(), file.tell() + self.count * self.row_bytes)
                os.fsync(file.fileno())
            (self.folder / DONE).write_bytes(bytes(self.num_slices))
            write_text_atomic(self.folder / STATE, json.dumps(fingerprint, indent=2) + "\n")

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
        os.replace(source, self.path)
        self._record()

    def _record(self) -> None:
        os.replace(self.folder / STATE, self.record)
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
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def _opened(job: _Job, fingerprint: dict[str, Any], overwrite: bool, world: World) -> list[int] | None:
    """See :meth:`_Job.open`; on every rank, with rank 0's error on all of them."""
    if any(world.sums(float(world.from_main(fingerprint) != fingerprint))):
        raise RunError(f"{job.path}: the processes read different texts or models; give all of them the same")
    left: list[int] | None = None
    problem: str | None = None
    if world.is_main:
        try:
            left = job.open(fingerprint, overwrite)
        except (BivecError, OSError) as error:
            problem = str(error)
    left, problem = world.from_main((left, problem))
    if problem is not None:
        raise RunError(problem)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while left is not None and not (job.folder / STATE).exists():
        if time.monotonic() > deadline:
            raise RunError(
                f"{job.folder}: rank {world.rank} does not see what rank 0 has made there; give a path on a file "
                "system that all machines share"
            )
        time.sleep(0.2)
    return left


def _check(
    path: Path, texts: Sequence[str], ids: Sequence[str] | None, dtype: str, sizes: dict[str, int | None]
) -> None:
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: embeddings are written as {' or '.join(SUFFIXES)}; give such a name")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the name of a file")
    is_parquet = path.suffix == ".parquet"
    if dtype not in DTYPES or (is_parquet and dtype != "float32"):
        raise ConfigError(f"dtype {dtype}: expected float32, or float16 in an .npy file")
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1")
    _check_texts(texts, ids, is_parquet=is_parquet)
    if is_parquet and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"{path}: Parquet needs the package pyarrow: pip install pyarrow, or give .npy")


def _check_texts(texts: Sequence[str], ids: Sequence[str] | None, *, is_parquet: bool) -> None:
    if isinstance(texts, str) or not (hasattr(texts, "__len__") and hasattr(texts, "__getitem__")):
        raise DataError(f"the corpus is {type(texts).__name__}, expected a list of texts, or what load_texts returns")
    if len(texts) == 0:
        raise DataError("the corpus holds no texts")
    if ids is not None and not (is_parquet and len(ids) == len(texts)):
        raise DataError(f"{len(ids)} ids for {len(texts)} texts: as many are needed, and a .parquet file to hold them")


def _fingerprint(encoder: Encoder, texts: Sequence[str], ids: Sequence[str] | None, slice_texts: int) -> dict[str, Any]:
    """What the vectors follow from, beside the settings of the call."""
    return {
        "texts": {"count": len(texts), "blake2b": _checksum(texts, "text", slice_texts)},
        "ids": None if ids is None else _checksum(ids, "id", slice_texts),
        "model": {
            "dimension": encoder.dimension,
            "model_crc32": model_checksum(encoder.model),
            "tokenizer_crc32": tokenizer_checksum(encoder.tokenizer),
            "encoder": asdict(encoder.config),
        },
    }


def _checksum(texts: Sequence[str], what: str, slice_texts: int) -> str:
    """Of all texts and their bounds; one that is none is found here."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(texts), slice_texts):
        for index, text in enumerate(texts[start : start + slice_texts], start):
            if not isinstance(text, str):
                raise DataError(f"{what} {index} is {type(text).__name__}, expected a str")
            try:
                data = text.encode()
            except UnicodeEncodeError as error:
                half = text[error.start]
                raise DataError(f"{what} {index}: {half!r} is half of a surrogate pair; replace it") from None
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _other(place: Path, holds: str, before: Any, now: dict[str, Any]) -> str:
    changed = "made by something else" if not isinstance(before, dict) else "; ".join(differences(before, now)[:6])
    return f"{place}: {holds} ({changed}); give another output, or overwrite what is there (--overwrite)"


def _read_json(file: Path) -> Any:
    """Its content; None where there is none, or none that can be read."""
    try:
        return parse_json(file.read_bytes(), allow_nan=False)
    except (OSError, ValueError):
        return None


def _reserve(descriptor: int, size: int) -> None:
    """Makes the file so large, with its space on the disk where the file system can promise it."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, size)


def _write_at(file: Path, position: int, data: bytes) -> None:
    with open(file, "r+b") as handle:
        handle.seek(position)
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


@contextmanager
def _full_disk_explained(job: _Job) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"{job.path}: the disk is full; what has been encoded is kept. Free some space and repeat the command"
        ) from error
