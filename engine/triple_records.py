"""A row of a data set of triples as a :class:`Triple`, checked field by field; ``triples.py`` has the format."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bivec.models.plain_json import parse_json

REQUIRED = ("query", "positive")
OPTIONAL = ("negative", "negatives", "instruction", "positive_id", "negative_id", "negative_ids", "symmetric")
FIELDS = (*REQUIRED, *OPTIONAL)


@dataclass(frozen=True)
class Triple:
    """A query, a text that answers it, and hard negatives: texts that look like answers and are none."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    instruction: str = ""  # of the query, without separator
    positive_id: str | None = None  # identity of the positive document, for filtering false negatives
    negative_ids: tuple[str, ...] | None = None  # one a negative
    symmetric: bool = False  # query and documents are of one kind: the instruction may stand before both


class BadRowError(ValueError):
    """What is wrong with a row; whoever catches it adds where the row stands."""


def parse_line(line: bytes) -> Any:
    """The JSON value of a line."""
    try:
        return parse_json(line.rstrip())
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at column {error.start + 1}"
        raise BadRowError(f"not UTF-8 ({byte})") from error
    except json.JSONDecodeError as error:
        raise BadRowError(f"not JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:  # a number of 5,000 digits, 5,000 brackets, a key twice
        raise BadRowError(f"not JSON that can be read ({error})") from error


def parse_record(record: Any, instruction: str = "", symmetric: bool = False) -> Triple:
    """The triple of a row; ``instruction`` and ``symmetric`` are for a row without its own."""
    if not isinstance(record, dict):
        raise BadRowError(f"a row must be an object with {' and '.join(REQUIRED)}, this is {_kind(record)}")
    query, positive = (_text(record.get(field), field) for field in REQUIRED)
    negatives = _one_or_list(record, "negative", "negatives", _text)
    negative_ids = _one_or_list(record, "negative_id", "negative_ids", _identity)
    if negative_ids is not None and len(negative_ids) != len(negatives or ()):
        raise BadRowError(
            f"{len(negative_ids)} ids of negatives for {len(negatives or ())} negatives: give one for each"
        )
    own, positive_id = record.get("instruction"), record.get("positive_id")
    if own is not None:
        instruction = _text(own, "instruction", blank=True).strip()
    if positive_id is not None:
        positive_id = _identity(positive_id, "positive_id")
    stated = record.get("symmetric")
    if stated is not None and not isinstance(stated, bool):
        raise BadRowError(f"the field 'symmetric' must be true or false, this is {_kind(stated)}")
    symmetric = symmetric if stated is None else stated
    return Triple(query, positive, negatives or (), instruction, positive_id, negative_ids, symmetric)


def _one_or_list(
    record: dict[str, Any], one: str, several: str, read: Callable[[Any, str], str]
) -> tuple[str, ...] | None:
    """The values of a field that holds one, or of its namesake that holds a list; None where the row has neither."""
    single, values = record.get(one), record.get(several)
    if single is not None and values is not None:
        raise BadRowError(f"the fields {one!r} and {several!r} are both there: give one of them")
    if single is not None:
        return (read(single, one),)
    if values is None:
        return None
    if not isinstance(values, list):
        raise BadRowError(f"the field {several!r} must be a list, this is {_kind(values)}")
    return tuple(read(value, f"{several}[{index}]") for index, value in enumerate(values))


def _text(value: Any, field: str, *, blank: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"the field {field!r} must be a string, this is {_kind(value)}")
    if not (blank or value.strip()):
        raise BadRowError(f"the field {field!r} is blank: give it a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud83d" in JSON; a tokenizer could not take it
        raise BadRowError(f"the field {field!r} holds half a surrogate pair at character {error.start}") from error
    return value


def _identity(value: Any, field: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadRowError(f"the field {field!r} must be a string or an integer, this is {_kind(value)}")
    if not value.strip():  # all documents without an id would be taken for the same one
        raise BadRowError(f"the field {field!r} is blank: give an id or leave the field out")
    return value


def _kind(value: Any) -> str:
    """What a value is called in JSON."""
    names = {type(None): "missing", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return {**names, list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
