"""Triples for supervised contrastive training: a query, what answers it, and what only seems to (METHOD 5.1).

The general format is one JSON object a line (``.jsonl``), or the same columns in a ``.parquet`` file or a data set of
the hub:

    {"query": "…", "positive": "…", "negatives": ["…", "…"]}

``negatives`` may be empty or missing; ``negative`` holds a single one as a string. Optional are ``instruction`` (of the
query, without a separator), ``positive_id`` and ``negative_ids`` (or ``negative_id``): a string or an integer a
document, by which the loss knows false negatives; and ``symmetric``, true where query and documents are of one kind, so
that the instruction is put before both. Other fields are ignored. A folder is one data set a file. The public
replica of the E5 mix, ``echo-data``, is such a folder; its rows have no instruction of their own, and
``ECHO_INSTRUCTIONS`` gives them the paper's by the name of the file (source: METHOD 5.1, paper G.1 and Table 8).

That replica has 1.5 M triples in 3.6 GB of text: nothing of it is tokenised ahead or held. Opening a JSONL file reads
it once through, so that the one bad line in 100,000 is found before any work, and keeps 8 bytes a row: where it starts.
Parquet and hub data are memory mapped by ``datasets``.
"""

from __future__ import annotations

import json
import operator
import os
import re
import warnings
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bivec.engine.data_files import data_suffix, load_hub, load_table
from bivec.engine.errors import DataError
from bivec.engine.triple_records import FIELDS, REQUIRED, BadRowError, Triple, parse_line, parse_record

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ECHO_INSTRUCTIONS", "JsonLines", "OnBadLine", "Source", "Triple", "TripleSet", "load_triples"]

WIKIPEDIA_PASSAGES = "Given a question, retrieve Wikipedia passages that answer the question"
CHINESE_PASSAGES = "Given a Chinese search query, retrieve web passages that answer the question"
ECHO_INSTRUCTIONS: dict[str, tuple[str, ...]] = {  # file stem -> of all its rows, or of the even and of the odd ones
    "allnli": (
        "Given a premise, retrieve a hypothesis that is entailed by the premise",
        "Retrieve semantically similar text",
    ),
    "dureader": (CHINESE_PASSAGES,),
    "eli5_question_answer": ("Provided a user question, retrieve the highest voted answers on Reddit ELI5 forum",),
    "fever": ("Given a claim, retrieve documents that support or refute the claim",),
    "hotpot_qa": ("Given a multi-hop question, retrieve documents that can help answer the question",),
    "miracl": (WIKIPEDIA_PASSAGES,),
    "mrtydi": (WIKIPEDIA_PASSAGES,),
    "msmarco_passage": ("Given a web search query, retrieve relevant passages that answer the query",),
    "msmarco_document": ("Given a web search query, retrieve relevant documents that answer the query",),
    "nq": (WIKIPEDIA_PASSAGES,),
    "quora_duplicates": (
        "Given a question, retrieve questions that are semantically equivalent to the given question",
        "Find questions that have the same meaning as the input question",
    ),
    "squad": ("Retrieve Wikipedia passages that answer the question",),
    "t2ranking": (CHINESE_PASSAGES,),
    "trivia_qa": ("Retrieve Wikipedia passages that answer the question",),
}
SYMMETRIC_SETS = ("allnli", "quora_duplicates")
ECHO_PART = re.compile(r"(allnli|quora_duplicates)_split\d")  # their rows a second time, for an older loader
SUFFIXES = (".jsonl", ".parquet")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
FIX = "correct it, or leave such rows out with --on-bad-line skip"
SCAN_ROWS = 1000  # rows of a table that are looked at in one go

OnBadLine = Literal["error", "skip"]


@dataclass(frozen=True)
class Source:
    """Where the rows of a set come from."""

    name: str  # of the set
    place: str  # the path or the hub id, for error messages
    instructions: tuple[str, ...] = ("",)  # for rows without their own: all, or the even and the odd ones
    symmetric: bool = False


class JsonLines:
    """The rows of a JSONL file, found again by the byte they start at; blank lines are no rows.

    Reads name their position (``pread``), so that threads and forked processes share the file without disturbing each
    other. It is opened at the first read of a process, and is not part of a pickled copy.
    """

    def __init__(self, path: Path, offsets: np.ndarray, size: int) -> None:
        self.path = path
        self.offsets = offsets  # [rows + 1] int64: the start of every row, and the end of the last
        self.size = size  # of the file, in bytes
        self._file: FileIO | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> Any:
        start, end = self.offsets[number : number + 2].tolist()
        try:
            if self._file is None:
                self._file = self.path.open("rb", buffering=0)  # kept open for the next rows
            size = os.fstat(self._file.fileno()).st_size
            line = os.pread(self._file.fileno(), end - start, start)
        except OSError as error:
            raise DataError(f"{self.path}: can no longer be read ({error.strerror}): put the file back") from error
        if size != self.size:
            raise BadRowError(f"{size} bytes instead of {self.size}")
        return parse_line(line)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


class TripleSet(Sequence[Triple]):
    """The triples of one file or hub data set, read from the disk when they are asked for. See ``load_triples``.

    Attributes:
        name: the file's stem, or the hub id.
        bad_lines: how many rows were skipped because something is wrong with them.
    """

    def __init__(self, source: Source, records: JsonLines | Dataset, skipped: Sequence[int], checksum: int) -> None:
        """Of a source that was checked.

        Args:
            source: where the rows come from.
            records: all rows of the source.
            skipped: which of them are left out, ascending.
            checksum: of the source.
        """
        self.name = source.name
        self.bad_lines = len(skipped)
        self._source = source
        self._records = records
        self._kept_before = np.asarray(skipped, np.int64) - np.arange(len(skipped))  # [bad_lines] int64
        self._checksum = checksum

    def __len__(self) -> int:
        return len(self._records) - self.bad_lines

    # one row at a time: a slice of a million triples would read all of them
    def __getitem__(self, row: int) -> Triple:  # type: ignore[override]
        row = operator.index(row)
        if not 0 <= row < len(self):
            raise IndexError(f"triple {row} of {len(self)} of {self.name}")
        number = row + int(np.searchsorted(self._kept_before, row, side="right"))  # in the source
        instructions = self._source.instructions
        try:
            instruction = instructions[number % len(instructions)]
            return parse_record(self._records[number], instruction, self._source.symmetric)
        except BadRowError as error:
            raise DataError(
                f"{self._source.place} has changed since it was opened (row {number} from 0, blank lines not counted: "
                f"{error}): put the old file back, or start anew"
            ) from error

    def fingerprint(self) -> str:
        """Rows and checksum: a resumed run must meet the same data."""
        return f"{len(self)} triples, crc32 {self._checksum:08x}"


def load_triples(
    source: str | Path,
    *,
    on_bad_line: OnBadLine = "error",
    limit: int | None = None,
    split: str = "train",
    argument: str = "--data",
) -> list[TripleSet]:
    """Opens triples in the format of the module docstring; all of them are checked, none is held.

    Files are read in place by their byte offsets, which a compressed file does not have: a ``.jsonl.gz`` is refused.

    Args:
        source: a ``.jsonl`` or ``.parquet`` file; a folder, of which each such file becomes a set, in the order of
            their names (other and hidden files are ignored); or a hub id, with ``:config`` or ``:file`` behind it where
            the data set needs one. Files named as in ``ECHO_INSTRUCTIONS`` get that instruction where a row has none.
        on_bad_line: whether a row that is no JSON, not UTF-8, or lacks, leaves blank or mistypes a field is an error,
            or is skipped and counted in ``bad_lines``.
        limit: no more than so many triples of each set; what comes after them is not looked at.
        split: which split of a hub data set; files are taken whole.
        argument: how the user names ``source``, for error messages.

    Returns:
        The sets, none of them empty.

    Raises:
        DataError: a missing, compressed, unreadable or empty source, or a bad row (file, line, field).
        ValueError: an unknown ``on_bad_line``, or a ``limit`` below 1.
    """
    if on_bad_line not in ("error", "skip") or (limit is not None and limit < 1):
        raise ValueError(f"on_bad_line is 'error' or 'skip' and limit at least 1, got {on_bad_line!r} and {limit}")
    path = Path(source).expanduser()
    hint = f"give {argument} a .jsonl or .parquet file of triples, a folder of such files, or the id of a hub data set"
    if path.is_dir():
        return [_load_file(file, on_bad_line, limit, hint) for file in _data_files(path, hint)]
    if path.exists():
        return [_load_file(path, on_bad_line, limit, hint)]
    hub = Source(str(source), str(source))
    return [_load_table(hub, load_hub(str(source), split, hint), on_bad_line, limit)]


def _data_files(folder: Path, hint: str) -> list[Path]:
    """The triple files of a folder by name."""
    visible = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    files = {file.name: file for file in visible if data_suffix(file) in SUFFIXES}
    for name in [name for name in files if name.lower().endswith(".gz") and name[:-3] in files]:
        del files[name]  # the unpacked file lies beside it
    if not files:
        raise DataError(f"{folder} holds no {' and no '.join(SUFFIXES)} file: {hint}")
    stems = Counter(file.stem for file in files.values())
    if twice := [name for name, file in files.items() if stems[file.stem] > 1]:
        raise DataError(f"{folder}: {' and '.join(twice)} would be sets of one name: rename or remove one of them")
    parts = [name for name, file in files.items() if (part := ECHO_PART.fullmatch(file.stem)) and part[1] in stems]
    if parts:
        warnings.warn(
            f"{folder}: left out {', '.join(parts)}, whose rows are also in the file without _split", stacklevel=3
        )
    return [file for name, file in files.items() if name not in parts]


def _load_file(path: Path, on_bad_line: OnBadLine, limit: int | None, hint: str) -> TripleSet:
    suffix = data_suffix(path)
    if suffix not in SUFFIXES:
        raise DataError(f"{path} is of a kind that is not read: {hint}")
    if path.suffix.lower() == ".gz":
        raise DataError(f"{path} is compressed, and its rows cannot be read one by one: unpack it (gunzip {path.name})")
    source = Source(path.stem, str(path), ECHO_INSTRUCTIONS.get(path.stem, ("",)), path.stem in SYMMETRIC_SETS)
    if suffix == ".parquet":
        return _load_table(source, load_table(path, suffix, hint), on_bad_line, limit)
    return _load_lines(source, path, on_bad_line, limit)


class _BadRows:
    """The rows that are skipped; or the first of them is an error."""

    def __init__(self, policy: OnBadLine) -> None:
        self.policy = policy
        self.numbers: list[int] = []
        self.first = ""

    def add(self, number: int, message: str) -> None:
        if self.policy == "error":
            raise DataError(f"{message}; {FIX}")
        self.numbers.append(number)
        self.first = self.first or message

    def check_left(self, rows: int, source: str) -> None:
        """Raises a DataError if no row is left."""
        if not rows:
            raise DataError(f"{source} holds no triples: every row is an object with {' and '.join(REQUIRED)}")
        if rows == len(self.numbers):
            raise DataError(f"{source} holds no triples: all its {rows} rows were skipped; the first: {self.first}")


def _load_lines(source: Source, path: Path, on_bad_line: OnBadLine, limit: int | None) -> TripleSet:
    """Reads a JSONL file once through: finds its rows and checks them."""
    from tqdm import tqdm

    bad, offsets, checksum, start = _BadRows(on_bad_line), array("q"), 0, 0
    size = path.stat().st_size
    options = {"unit": "B", "unit_scale": True, "delay": 2, "leave": False, "disable": None}
    with path.open("rb") as file, tqdm(total=size, desc=f"checking {path.name}", **options) as progress:
        for line_number, line in enumerate(file, start=1):
            content = line.removeprefix(BYTE_ORDER_MARK) if line_number == 1 else line
            if content.strip():
                offsets.append(start + len(line) - len(content))
                try:
                    parse_record(parse_line(content))
                except BadRowError as error:
                    bad.add(len(offsets) - 1, f"{path}, line {line_number}: {error}")
            start += len(line)
            checksum = zlib.crc32(line, checksum)
            progress.update(len(line))
            if len(offsets) - len(bad.numbers) == limit:
                break
    bad.check_left(len(offsets), source.place)
    offsets.append(start)
    return TripleSet(source, JsonLines(path.absolute(), np.array(offsets, np.int64), size), bad.numbers, checksum)


def _load_table(source: Source, dataset: Dataset, on_bad_line: OnBadLine, limit: int | None) -> TripleSet:
    """Checks all rows of a memory-mapped table."""
    columns = dataset.column_names
    missing = [field for field in REQUIRED if field not in columns]
    if missing:
        raise DataError(f"{source.place} has no column {' and no '.join(missing)}; it has {', '.join(columns)}")
    dataset = dataset.select_columns([field for field in FIELDS if field in columns])
    bad, rows, checksum = _BadRows(on_bad_line), 0, 0
    for record in _records(dataset):
        try:
            parse_record(record)
        except BadRowError as error:
            bad.add(rows, f"{source.place}, row {rows + 1}: {error}")
        rows += 1
        checksum = zlib.crc32(json.dumps(record, default=str).encode(), checksum)
        if rows - len(bad.numbers) == limit:
            break
    bad.check_left(rows, source.place)
    return TripleSet(source, dataset.select(range(rows)), bad.numbers, checksum)


def _records(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for columns in dataset.iter(batch_size=SCAN_ROWS):
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
