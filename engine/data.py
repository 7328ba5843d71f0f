"""Texts in, token ids out: local files and hub data sets, MNTP's blocks, SimCSE's sentences, STS pairs.

Everything that can be wrong with a file is found when it is opened, before any work, and named with file and line.
Plain text is read line by line, so that the shipped samples need no further package; JSON, CSV and Parquet files
and hub ids go through ``datasets`` (imported only then), which keeps them memory mapped in its own cache
(``HF_DATASETS_CACHE``), never beside the user's file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from bivec.engine.data_files import (
    BUILDERS,
    TEXT_SUFFIX,
    csv_rows,
    data_suffix,
    decoded_lines,
    load_hub,
    load_table,
)
from bivec.engine.errors import DataError
from bivec.engine.tokenizer import prefix_ids

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TOKENIZE_ROWS = 1000  # rows of one tokenizer call, and of one group of METHOD 3.1
STS_RANGE = (0.0, 5.0)
STS_COLUMNS = ("sentence1", "sentence2", "score")


class TextColumn(Sequence[str]):
    """One string column of a ``datasets`` table; rows are read from the memory-mapped file when they are asked for."""

    def __init__(self, dataset: Dataset, column: str) -> None:
        self.dataset = dataset
        self.column = column

    def select(self, rows: Sequence[int]) -> TextColumn:
        """Some of the rows, without a copy."""
        return TextColumn(self.dataset.select(rows), self.column)

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> list[str]: ...
    def __getitem__(self, item: int | slice) -> str | list[str]:
        texts: str | list[str] = self.dataset[item][self.column]
        return texts

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), TOKENIZE_ROWS):
            yield from self[start : start + TOKENIZE_ROWS]


@dataclass(frozen=True)
class BlockDataset:
    """Blocks of equal length, cut from running text."""

    input_ids: np.ndarray  # [N, block_size] int32
    special_mask: np.ndarray  # [N, block_size] bool, True for special tokens

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def block_size(self) -> int:
        """Tokens of a block, special tokens included."""
        return int(self.input_ids.shape[1])


@dataclass(frozen=True)
class SentenceDataset:
    """Sentences as token ids, one behind the other in one array: 30 M tokens take 0.12 GB, as lists 1 GB."""

    flat_ids: np.ndarray  # [T] int32
    offsets: np.ndarray  # [N + 1] int64: sentence i is flat_ids[offsets[i] : offsets[i + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> list[int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sentence {index} of {len(self)}")
        ids: list[int] = self.flat_ids[self.offsets[index] : self.offsets[index + 1]].tolist()
        return ids

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64: tokens of every sentence, special tokens included."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class STSPair:
    """Two sentences and how similar people found them, 0 to 5."""

    sentence1: str
    sentence2: str
    score: float


def load_texts(
    source: str | Path,
    *,
    column: str | None = None,
    split: str = "train",
    limit: int | None = None,
    drop_empty: bool = False,
    argument: str = "the data argument",
) -> Sequence[str]:
    """The texts of a local file or of a hub data set.

    Args:
        source: a file, ``.txt`` (one text a line), ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` (each also with ``.gz``)
            or ``.parquet``; or a hub id, with ``:config`` or ``:file`` behind it where the data set needs one, as in
            ``Salesforce/wikitext:wikitext-103-raw-v1`` and ``princeton-nlp/datasets-for-simcse:wiki1m_for_simcse.txt``.
        column: which column holds the texts; by default ``text``, else the only string column. Not for ``.txt``.
        split: which split of a hub data set, slices such as ``train[:1%]`` included; a file is taken whole.
        limit: no more than so many rows.
        drop_empty: leave out rows that are empty or all white space.
        argument: how the user names ``source``, for error messages, such as ``--mntp-data``.

    Returns:
        A sequence of str: a list for ``.txt``, otherwise memory mapped.

    Raises:
        DataError: a missing, empty, broken or non-UTF-8 file (with the line), a missing column, an unreachable hub.
    """
    path = Path(source).expanduser()
    hint = (
        f"give {argument} a .txt file with one text a line, a .jsonl, .json, .csv, .tsv or .parquet file with a column "
        "of texts, or the id of a data set on the hub"
    )
    if path.is_dir():
        raise DataError(f"{path} is a folder: {hint}")
    suffix = data_suffix(path)
    if not path.exists():
        dataset = load_hub(str(source), split, hint)
    elif suffix == TEXT_SUFFIX:
        if column is not None:
            raise DataError(f"{path} is plain text and has no column {column!r}: {hint}")
        return _load_lines(path, limit, drop_empty, hint)
    elif suffix in BUILDERS:
        dataset = load_table(path, suffix, hint)
    else:
        raise DataError(f"{path} is of a kind that is not read: {hint}")
    texts = TextColumn(dataset, _text_column(dataset, column, str(source)))
    if drop_empty:
        texts = texts.select([i for i, text in enumerate(texts) if text.strip()])
    if limit is not None:
        texts = texts.select(range(min(limit, len(texts))))
    if not len(texts):
        raise DataError(f"{source} holds no texts: {hint}")
    return texts


def mntp_blocks(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    block_size: int,
    *,
    group_size: int = TOKENIZE_ROWS,
    per_block_bos: bool = False,
) -> BlockDataset:
    """Cuts texts into blocks for masked next-token prediction.

    As the paper does it, every row is tokenised by itself with its special tokens (an empty row becomes a lone BOS),
    groups of rows are concatenated and cut, and what is left at the end of a group is dropped; a block may start
    anywhere in a text. With ``per_block_bos`` the rows are tokenised without special tokens and concatenated as a
    whole, and every block starts with what the tokenizer puts in front of a text (the BOS): right for small models,
    which park their attention there, and for small data, of which only the last part of a block is dropped.

    Args:
        texts: rows of text.
        tokenizer: a fast transformers tokenizer.
        block_size: tokens of a block, special tokens included.
        group_size: rows of a group; without meaning under ``per_block_bos``.
        per_block_bos: see above.

    Returns:
        N blocks [N, block_size] with the mask of their special tokens.

    Raises:
        DataError: too little text for one block, or ``per_block_bos`` with a tokenizer that puts nothing in front.
        ValueError: a size below 1, or a block that holds nothing but the prefix.
    """
    prefix = prefix_ids(tokenizer) if per_block_bos else []
    if per_block_bos and not prefix:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} puts no BOS in front of a text; give one, --set bos_token=…, or "
            "--set mntp.bos_in_every_block=false"
        )
    if group_size < 1 or block_size <= len(prefix):
        raise ValueError(f"need group_size > 0 and block_size > {len(prefix)}, got {group_size} and {block_size}")
    body = block_size - len(prefix)
    rows = TOKENIZE_ROWS if per_block_bos else group_size
    blocks = [np.empty((0, body), np.int32)]
    rest, total = np.empty(0, np.int32), 0
    for _, found in _tokenized(texts, tokenizer, rows, add_special_tokens=not per_block_bos):
        total += len(found)
        # under per_block_bos the rest of a group goes in front of the next one
        ids = np.concatenate([rest, found]) if per_block_bos else found
        whole = len(ids) // body * body
        blocks.append(ids[:whole].reshape(-1, body))
        rest = ids[whole:]
    input_ids = np.concatenate(blocks)
    if not len(input_ids):
        raise DataError(
            f"{len(texts)} rows of text with {total} tokens do not fill one block of {block_size}: give more text"
        )
    front = np.broadcast_to(np.array(prefix, np.int32), (len(input_ids), len(prefix)))
    input_ids = np.concatenate([front, input_ids], axis=1)
    return BlockDataset(input_ids, np.isin(input_ids, [*tokenizer.all_special_ids, *prefix]))


def sentence_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> SentenceDataset:
    """Tokenises every text by itself, special tokens included; the tail of a longer one than ``max_length`` is cut.

    Args:
        texts: the sentences; white space around them is stripped.
        tokenizer: a fast transformers tokenizer.
        max_length: tokens of a sentence, special tokens included.

    Raises:
        DataError: an empty text; the message names its position.
    """
    stripped = [text.strip() for text in texts]
    if "" in stripped:
        raise DataError(f"text {stripped.index('')} (counted from 0) is empty: every row must hold a sentence")
    groups = list(_tokenized(stripped, tokenizer, TOKENIZE_ROWS, max_length=max_length))
    lengths = np.concatenate([np.zeros(1, np.int64), *(lengths for lengths, _ in groups)])
    return SentenceDataset(np.concatenate([np.empty(0, np.int32), *(ids for _, ids in groups)]), lengths.cumsum())


def load_sts(path: str | Path) -> list[STSPair]:
    """Sentence pairs with scores from a CSV or TSV file (also ``.gz``).

    Args:
        path: rows of two sentences and a score, 0 to 5; or columns ``sentence1``, ``sentence2`` and ``score`` in any
            order among others, if a header names them.

    Raises:
        DataError: a missing, empty, broken or non-UTF-8 file, a row of another form or a score out of range (the line).
    """
    path = Path(path).expanduser()
    form = f"every row must hold {', '.join(STS_COLUMNS)}, with the score from {STS_RANGE[0]:g} to {STS_RANGE[1]:g}"
    if not path.is_file():
        raise DataError(f"{path} is no file: give a .csv or .tsv file; {form}")
    delimiter = "\t" if data_suffix(path) == ".tsv" else ","
    columns, width = [0, 1, 2], 3
    pairs: list[STSPair] = []
    seen = False
    for line, row in csv_rows(path, delimiter):
        if not seen and all(name in row for name in STS_COLUMNS):
            columns, width = [row.index(name) for name in STS_COLUMNS], len(row)
        elif row:
            if len(row) != width:
                raise DataError(f"{path}, line {line}: {len(row)} columns instead of {width}; {form}")
            first, second, score = (row[column] for column in columns)
            pairs.append(STSPair(first, second, _score(score, f"{path}, line {line}", form)))
        seen = seen or bool(row)
    if not pairs:
        raise DataError(f"{path} holds no sentence pairs; {form}")
    return pairs


def _score(text: str, where: str, form: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not STS_RANGE[0] <= score <= STS_RANGE[1]:
        raise DataError(f"{where}: the score is {text!r}; {form}")
    return score


def _load_lines(path: Path, limit: int | None, drop_empty: bool, hint: str) -> list[str]:
    texts: list[str] = []
    any_text = False
    for line in decoded_lines(path):
        text = line.rstrip("\r\n")
        any_text = any_text or bool(text.strip())
        if (limit is None or len(texts) < limit) and (text.strip() or not drop_empty):
            texts.append(text)
    if not any_text:
        raise DataError(f"{path} is empty: {hint}")
    return texts


def _text_column(dataset: Dataset, column: str | None, source: str) -> str:
    """The column with the texts, checked: it exists, holds strings and no nulls."""
    kinds = {name: getattr(feature, "dtype", None) for name, feature in dataset.features.items()}
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    if column is None:
        column = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
    if column is None or column not in strings:
        wanted = "none named 'text' and not just one" if column is None else f"{column!r} is not one of them"
        found = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise DataError(
            f"{source}: which column holds the texts? Columns of strings: {strings}, {wanted}; all: {found}"
        )
    values = dataset.with_format("arrow")[column]
    nulls = sum(chunk.null_count for chunk in getattr(values, "chunks", [values]))
    if nulls:
        raise DataError(f"{source}: {nulls} of {len(dataset)} rows have no value in the column {column!r}")
    return column


def _tokenized(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    *,
    add_special_tokens: bool = True,
    max_length: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokenises ``rows`` texts at a time: (lengths [rows] int64, the ids of all of them [T] int32)."""
    from tqdm import tqdm

    options = {"add_special_tokens": add_special_tokens, "truncation": max_length is not None, "max_length": max_length}
    with tqdm(total=len(texts), desc="tokenising", unit=" rows", delay=2, leave=False, disable=None) as progress:
        for start in range(0, len(texts), rows):
            group = list(texts[start : start + rows])
            id_lists = tokenizer(group, verbose=False, return_attention_mask=False, **options)["input_ids"]
            lengths = np.fromiter(map(len, id_lists), dtype=np.int64, count=len(id_lists))
            yield lengths, np.fromiter(chain.from_iterable(id_lists), dtype=np.int32, count=int(lengths.sum()))
            progress.update(len(group))
