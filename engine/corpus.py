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

import hashlib
import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bivec.engine.corpus_files import STATE, CorpusFiles, full_disk_explained
from bivec.engine.distributed import ALONE, World
from bivec.engine.encoder import Encoder
from bivec.engine.encoder_inputs import progress_bar
from bivec.engine.errors import BivecError, ConfigError, DataError, RunError
from bivec.engine.fingerprint import model_checksum, tokenizer_checksum

SLICE_TEXTS = 16384
SUFFIXES = (".npy", ".parquet")
DTYPES = ("float32", "float16")
PATIENCE_SECONDS = 10  # until a network file system shows what rank 0 has made


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
    job = CorpusFiles(path, len(texts), encoder.dimension, dtype, slice_texts, ids)
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
    with progress_bar(done + job.texts(mine), show, done=done, label=label) as advance, full_disk_explained(job):
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
        with full_disk_explained(job):
            job.finish()
    world.barrier()  # the file is there
    return path


def _opened(job: CorpusFiles, fingerprint: dict[str, Any], overwrite: bool, world: World) -> list[int] | None:
    """See :meth:`CorpusFiles.open`; on every rank, with rank 0's error on all of them."""
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
