"""Files and data sets of the hub, opened: lines of text, rows of CSV, tables of ``datasets``.

What is wrong with a file is named with its line. The checks stand in front of libraries that would take a broken file
silently, or end the process with it.
"""

from __future__ import annotations

import csv
import glob
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bivec.engine.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_SUFFIX = ".txt"
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
HUB_ID = re.compile(
    r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?::([\w./-]+))?"
)  # the id, and the configuration or file behind a colon
MOST_COLUMNS = 10_000  # pandas and datasets take minutes for ten times as many
DEEPEST = 200
JSON_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')  # unrolled: no mark to come back to for each character
LONGEST_CELL = 2**31 - 1


def data_suffix(path: Path) -> str | None:
    """``.csv`` for ``pairs.csv`` and ``pairs.CSV.gz``; None for kinds that are not read."""
    name = path.name.lower()
    plain = Path(name.removesuffix(".gz")).suffix
    readable = plain in {TEXT_SUFFIX, *BUILDERS} and not name.endswith(".parquet.gz")  # parquet compresses by itself
    return plain if readable else None


def decoded_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, compressed or not, with their line ends; a byte-order mark is dropped."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8")
                if "\0" in text:
                    raise DataError(f"{path}, line {number}: a NUL character: no text, or UTF-16; save it as UTF-8")
                yield text.removeprefix("\ufeff") if number == 1 else text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not UTF-8 (byte {error.object[error.start]:#04x} at column {error.start + 1}): "
            "save the file as UTF-8"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip file after line {number} ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def csv_rows(path: Path, delimiter: str, *, quoted: bool = True) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file, each with the number of its (last) line; not ``quoted`` = quotes are part of the text."""
    if csv.field_size_limit() < LONGEST_CELL:  # a limit of the process; Python's own is less than an article
        csv.field_size_limit(LONGEST_CELL)
    lines = decoded_lines(path)
    reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not a CSV file ({error})") from error


def load_table(path: Path, suffix: str, hint: str) -> Dataset:
    """A JSON, CSV or Parquet file as a memory-mapped table."""
    delimiter = "\t" if suffix == ".tsv" else ","
    # a sum, not any(): all of the file is decoded before datasets sees it
    if suffix != ".parquet" and not sum(bool(line.strip()) for line in decoded_lines(path)):
        raise DataError(f"{path} is empty: {hint}")
    if BUILDERS[suffix] == "csv":
        _check_widths(path, delimiter)
    elif BUILDERS[suffix] == "json":
        _check_depth(path)
    datasets = _datasets()
    # keep_default_na: pandas would read the texts "None" and "NA" as missing
    options = {"sep": delimiter, "keep_default_na": False} if BUILDERS[suffix] == "csv" else {}
    try:
        file = glob.escape(str(path.resolve()))
        table = datasets.load_dataset(BUILDERS[suffix], data_files=file, split="train", **options)
        if suffix == ".parquet":
            table.data.table.validate(full=True)  # strings need not be UTF-8 there
    except Exception as error:  # datasets raises whatever its readers raise; the first cause says what is wrong
        raise DataError(f"{path} cannot be read as {suffix[1:]} ({_first_cause(error)}): {hint}") from error
    return table


def _check_widths(path: Path, delimiter: str) -> None:
    """Every row has a cell for each column, and no column is there twice: pandas would shift or drop cells silently."""
    header: list[str] = []
    for line, row in csv_rows(path, delimiter):
        if not header:
            header = row
            if len(header) > MOST_COLUMNS:
                raise DataError(
                    f"{path}, line {line}: {len(header)} columns, more than {MOST_COLUMNS}: no table of texts"
                )
            if twice := [name for name, count in Counter(header).items() if name and count > 1]:
                raise DataError(f"{path}, line {line}: the column {twice[0][:80]!r} is there twice: rename one of them")
        elif len(row) <= 1 < len(header) and not "".join(row).strip():
            continue  # a blank line, which pandas leaves out
        elif row and len(row) != len(header):
            raise DataError(
                f"{path}, line {line}: {len(row)} columns instead of {len(header)}: put a cell that holds the "
                "separator or a line end in double quotes"
            )


def _check_depth(path: Path) -> None:
    """No value lies deeper than ``DEEPEST``: pyarrow's parser runs out of its stack, which ends the process."""
    depth = 0
    for number, line in enumerate(decoded_lines(path), start=1):
        brackets = JSON_STRING.sub("", line)
        opened = brackets.count("[") + brackets.count("{")
        if opened == brackets.count("]") + brackets.count("}") and depth + opened <= DEEPEST:
            continue  # as good as every line of a .jsonl
        for character in brackets:
            depth += (character in "[{") - (character in "]}")
            if depth > DEEPEST:
                raise DataError(f"{path}, line {number}: nested more than {DEEPEST} deep: no table of texts")


def load_hub(source: str, split: str, hint: str) -> Dataset:
    """A data set of the hub by its id, with ``:config`` or ``:file`` behind it; what looks like a path is none."""
    hub_id = HUB_ID.fullmatch(source)
    if hub_id is None or data_suffix(Path(hub_id[1])) is not None:
        raise DataError(f"{source} does not exist: {hint}")
    name, detail = hub_id.groups()
    datasets = _datasets()
    is_file = detail is not None and data_suffix(Path(detail)) is not None
    selection = {"data_files": detail} if is_file else {"name": detail}
    try:
        return datasets.load_dataset(name, split=split, **selection)
    except Exception as error:  # no network, an unknown id, config or split, an HTTP status: each has its own type
        raise DataError(
            f"no file {name} here, and no such data set ({detail or 'default'}, {split}) could be loaded from the hub "
            f"({_first_cause(error)}): {hint}"
        ) from error


def _datasets() -> Any:
    """The package ``datasets``, which only tables and the hub need."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("only .txt files are read without the package datasets: pip install datasets") from error
    return datasets


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
