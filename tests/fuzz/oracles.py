"""What a mutant says, read a second time by other means, to compare with what bivec made of it.

Nothing here is bivec's: the safetensors and CoNLL readers are the shortest statements of their formats, texts and JSON
go through the standard library, GGUF and Parquet through ``gguf.GGUFReader`` and pyarrow. A function that raises
``Unreadable`` says that the file should have been refused.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Unreadable(Exception):
    """The file is none of its kind."""


def strict_json(data: bytes, nan: bool = False) -> Any:
    """Plain JSON: UTF-8, no key with two values, and but for ``nan`` no NaN and no infinity."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({(key, repr(value)) for key, value in pairs}) > len(dict(pairs)):
            raise Unreadable("a key is there twice")
        return dict(pairs)

    def number(text: str) -> float:
        raise Unreadable(f"{text} is no JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=None if nan else number)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"no JSON: {error}") from None


def text_of(file: Path) -> str:
    """The characters of a text file, without a byte-order mark."""
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
    except (ValueError, OSError, EOFError, __import__("zlib").error) as error:
        raise Unreadable(f"no UTF-8: {error}") from None
    if "\0" in text:
        raise Unreadable("NUL in a text")
    return text.removeprefix("\ufeff")


def lines_of(file: Path) -> list[str]:
    lines = text_of(file).split("\n")
    return [line.rstrip("\r") for line in (lines if lines[-1] else lines[:-1])]


def safetensors(data: bytes) -> dict[str, torch.Tensor]:
    """Every tensor by name. The offsets must tile the data without holes."""
    if len(data) < 8 or (length := struct.unpack("<Q", data[:8])[0]) > len(data) - 8:
        raise Unreadable("the header is longer than the file")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"))
        header.pop("__metadata__", None)
        body, tensors, end = data[8 + length :], {}, 0
        fields = ("dtype", "shape", "data_offsets")
        for name, entry in header.items():
            if isinstance(entry, list):  # the reference implementation takes an object's values for the object
                header[name] = dict(zip(fields, entry, strict=True))
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if entry["dtype"] not in SIZES:
                tensors[name], end = None, stop
                continue
            if start != end or stop - start != math.prod(shape) * SIZES[entry["dtype"]] or stop > len(body):
                raise Unreadable(f"the offsets of {name} do not fit")
            raw = (
                torch.frombuffer(bytearray(body[start:stop]), dtype=DTYPES[entry["dtype"]])
                if stop > start
                else torch.empty(0)
            )
            tensors[name], end = raw.reshape(shape), stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unreadable(f"no safetensors: {error!r}") from None
    if end != len(body):
        raise Unreadable("bytes behind the last tensor")
    return tensors


def digest(tensor: torch.Tensor) -> tuple:
    """Shape and bytes as float32."""
    return tuple(tensor.shape), tensor.detach().to(torch.float32).contiguous().numpy().tobytes()


def trunk_weights(files: list[Path]) -> dict[str, tuple]:
    """What the files of a checkpoint hold, under the names of the trunk."""
    found: dict[str, tuple] = {}
    for file in files:
        for name, tensor in safetensors(file.read_bytes()).items():
            if tensor is not None:
                found[name.removeprefix("model.")] = digest(tensor)
    return found


def differing(expected: dict, found: dict) -> str | None:
    """Where two mappings differ, in words."""
    for name in sorted(expected.keys() | found.keys(), key=str):
        if expected.get(name) != found.get(name):
            return f"{name}: {str(found.get(name))[:120]} instead of {str(expected.get(name))[:120]}"
    return None


def same_value(one: Any, other: Any) -> bool:
    """Equal, and of one type: 1 is not True; 1 and 1.0 are one number."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same_value, one, other))
    return one == other


def gguf_file(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and dequantised tensors by the reader of the ``gguf`` package."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            .astype(np.float32)
            .reshape([int(n) for n in tensor.shape[::-1]])
            for tensor in reader.tensors
        }
    except MemoryError:
        raise
    except Exception as error:
        raise Unreadable(f"gguf.GGUFReader: {error!r}") from None
    return fields, tensors


GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTROL, USER_DEFINED = 3, 4  # types of tokens that are found in a text before it is split


def byte_level_ids(fields: dict[str, Any], texts: Sequence[str], bos: bool | None) -> list[list[int]]:
    """The tokens of texts by the vocabulary and merges of a GGUF file whose texts are split as GPT-2's.

    Args:
        fields: the metadata.
        texts: the texts.
        bos: a BOS in front; None = as the file says.
    """
    import regex

    def field(name: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{name}", default)

    words = field("tokens")
    if (field("model"), field("pre")) != ("gpt2", "gpt-2") or len(set(words)) < len(words):
        raise Unreadable("another kind of tokenizer, or a token twice")
    ids = {word: number for number, word in enumerate(words)}
    ranks = {tuple(merge.split(" ", 1)): rank for rank, merge in enumerate(field("merges"))}
    types = field("token_type", [])
    special = [word for word, kind in zip(words, types, strict=bool(types)) if kind in (CONTROL, USER_DEFINED) and word]
    found_first = "|".join(regex.escape(word) for word in sorted(special, key=len, reverse=True))
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the other bytes are shown above 255
    hidden = {byte: 256 + n for n, byte in enumerate(byte for byte in range(256) if byte not in shown)}

    def merged(piece: str) -> list[str]:
        parts = [chr(hidden.get(byte, byte)) for byte in piece.encode()]
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, math.inf), at) for at, pair in enumerate(itertools.pairwise(parts)))
            if rank == math.inf:
                break
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        return parts

    def encoded(text: str) -> list[int]:
        found = []
        for part in regex.split(f"({found_first})", text) if special else [text]:
            pieces = [[part]] if part in special else map(merged, regex.findall(GPT2_SPLIT, part))
            found += [ids[token] for piece in pieces for token in piece if token in ids]
        return found

    first, last = field("bos_token_id"), field("eos_token_id")
    head = [first] if first is not None and (field("add_bos_token", False) if bos is None else bos) else []
    tail = [last] if last is not None and field("add_eos_token", False) else []
    return [head + encoded(text) + tail for text in texts]


def csv_column(file: Path, delimiter: str, column: str) -> list[str]:
    import csv

    usual = csv.field_size_limit(2**31 - 1)
    try:
        rows = list(csv.reader(io.StringIO(text_of(file), newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise Unreadable(str(error)) from None
    finally:
        csv.field_size_limit(usual)
    rows = [row for row in rows if row]
    if rows[0].count(column) != 1:
        raise Unreadable(f"not one column {column}")
    where, width = rows[0].index(column), len(rows[0])
    if any(len(row) != width for row in rows):
        raise Unreadable("a row with another number of cells than the header")
    return [row[where] for row in rows[1:]]


def json_column(file: Path, column: str) -> list[str]:
    rows = values_of(text_of(file))
    if ".jsonl" not in file.name and len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    try:
        return [row[column] for row in rows]
    except (KeyError, TypeError) as error:
        raise Unreadable(f"a row without {column}: {error!r}") from None


def values_of(text: str) -> list[Any]:
    """The JSON values of a text, one behind the other; as pyarrow reads them: control characters in strings, NaN."""
    decoder, found, text = json.JSONDecoder(strict=False), [], text.strip()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError) as error:
            raise Unreadable(str(error)) from None
        found.append(value)
        text = text[end:].strip()
    return found


def columns_of(file: Path, width: int) -> list[list[tuple[str, ...]]]:
    """Sentences of a CoNLL file: cells of the lines between blank ones; without document marks and comments."""
    import re

    sentences: list[list[tuple[str, ...]]] = [[]]
    for line in (found.rstrip(" \t\r") for found in lines_of(file)):
        if not line or line.startswith("-DOCSTART-"):
            sentences.append([])
        elif width == 10 and line.startswith("#"):
            continue
        else:
            cells = line.split("\t") if width == 10 or line.count("\t") == width - 1 else re.split("[ \t]+", line)
            if len(cells) != width:
                raise Unreadable(f"{len(cells)} cells in {line[:60]!r}")
            if not (width == 10 and re.fullmatch(r"\d+[-.]\d+", cells[0])):
                sentences[-1].append(tuple(cell.strip(" ") if width != 10 else cell for cell in cells))
    return [sentence for sentence in sentences if sentence]
