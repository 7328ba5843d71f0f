"""Triples from data sets of entailment: what follows from a sentence is its positive, what contradicts it a negative.

The reading is that of supervised SimCSE (arXiv 2104.08821, section 4), extended to data that are not made for it:

* "A entails B" gives A the positive B, in this direction only: B need not entail A.
* "A contradicts B" holds both ways, so each is a hard negative of the other.
* A sentence with a positive and a hard negative is an anchor; it makes a triple with every combination of its positives
  and its negatives. Sentences are the same if their texts are, across all the files.
* Nothing is deduplicated: a pair that people judged twice, in either order, counts twice.

The two files of SICK that are in general use (``SICK_train.txt``, ``SICK_test_annotated.txt``) give 692 anchors with
1,560 triples (1,320 different ones) by this reading, and 1,680 entailment pairs whose first sentence has no
contradiction.
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bivec.engine.data_files import csv_rows, data_suffix, decoded_lines
from bivec.engine.errors import DataError
from bivec.engine.triples import Triple
from bivec.models.plain_json import parse_json

TRIPLE_COLUMNS = ("sent0", "sent1", "hard_neg")  # SimCSE's CSV: one triple a row
PAIR_COLUMNS = (
    ("sentence_A", "sentence_B", "entailment_judgment"),  # SICK
    ("sentence1", "sentence2", "gold_label"),  # SNLI, MultiNLI, AllNLI
)
SUFFIXES = {".txt": "\t", ".tsv": "\t", ".csv": ",", ".jsonl": None}  # what separates the columns
FORM = "the first line or every JSON object must name " + ", or ".join(
    ", ".join(columns) for columns in (*PAIR_COLUMNS, TRIPLE_COLUMNS)
)
ENTAILMENT, CONTRADICTION = "entailment", "contradiction"
LABELS = (ENTAILMENT, "neutral", CONTRADICTION, "-")  # SNLI's "-": the annotators did not agree


def entailment_triples(files: Sequence[Path]) -> tuple[list[Triple], list[Triple]]:
    """Triples and pairs of entailment data, as the module docstring reads them.

    Args:
        files: SICK (tab-separated: ``.txt``, ``.tsv``); SNLI, MultiNLI or AllNLI (``.jsonl``, or tab-separated); or
            SimCSE's CSV, whose rows are triples already and are taken as they are. Columns are found by name; each file
            may be compressed (``.gz``). Rows with a blank sentence are left out, with a warning; a blank ``hard_neg``
            makes a pair.

    Returns:
        The triples, of one negative each; and the pairs of a sentence and what it entails of those that have no
        negative. Both in the order of the files.

    Raises:
        DataError: a missing or broken file, other columns, an unknown label (file, line), or nothing to learn from.
    """
    triples: list[Triple] = []
    pairs: list[Triple] = []
    entailed: defaultdict[str, list[str]] = defaultdict(list)
    contradicting: defaultdict[str, list[str]] = defaultdict(list)
    for file in files:
        for columns, (first, second, third) in _rows(Path(file)):
            if columns == TRIPLE_COLUMNS:
                (triples if third else pairs).append(Triple(first, second, (third,) if third else ()))
            elif third == ENTAILMENT:
                entailed[first].append(second)
            elif third == CONTRADICTION:
                contradicting[first].append(second)
                contradicting[second].append(first)
    for anchor, positives in entailed.items():
        negatives = contradicting.get(anchor, ())
        triples += [Triple(anchor, positive, (negative,)) for positive in positives for negative in negatives]
        if not negatives:
            pairs += [Triple(anchor, positive) for positive in positives]
    if not triples and not pairs:
        raise DataError(f"{', '.join(map(str, files)) or 'no file'}: holds no pair of sentences that entail each other")
    return triples, pairs


def _rows(path: Path) -> Iterator[tuple[tuple[str, str, str], tuple[str, str, str]]]:
    """The columns that are read, and their values of every row: stripped, and labels checked, in lower case."""
    blank = 0
    for line, row in _records(path):
        known = [columns for columns in (*PAIR_COLUMNS, TRIPLE_COLUMNS) if all(name in row for name in columns)]
        if not known:
            raise DataError(f"{path}, line {line}: has the columns {', '.join(row)}; {FORM}")
        values = [row[name] for name in known[0]]
        if not all(isinstance(value, str) for value in values):
            raise DataError(f"{path}, line {line}: {', '.join(known[0])} must be strings, got {values}")
        first, second, third = (value.strip() for value in values)
        if known[0] != TRIPLE_COLUMNS:
            third = third.lower()
            if third not in LABELS:
                raise DataError(f"{path}, line {line}: the label is {third!r}, expected one of {', '.join(LABELS)}")
        if first and second:
            yield known[0], (first, second, third)
        else:
            blank += 1
    if blank:
        warnings.warn(f"{path}: left out {blank} rows with a blank sentence", stacklevel=3)


def _records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Every row as a mapping from column to value, with the number of its line."""
    suffix = data_suffix(path)
    if suffix not in SUFFIXES or not path.is_file():
        what = "is of a kind that is not read" if path.is_file() else "is no file"
        raise DataError(f"{path} {what}: give files of entailment data, {', '.join(SUFFIXES)}; {FORM}")
    delimiter = SUFFIXES[suffix]
    return _json_records(path) if delimiter is None else _table_records(path, delimiter)


def _json_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(decoded_lines(path), start=1):
        if line.strip():
            try:
                row = parse_json(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON that can be read ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: not a JSON object; {FORM}")
            yield number, row


def _table_records(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    header: list[str] = []
    for line, row in csv_rows(path, delimiter, quoted=delimiter != "\t"):  # quotes in SNLI's are part of the text
        if not header:
            header = row
        elif row:
            if len(row) != len(header):
                raise DataError(f"{path}, line {line}: {len(row)} columns instead of {len(header)}")
            yield line, dict(zip(header, row, strict=True))
