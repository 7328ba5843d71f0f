"""JSON that means one thing: what every reader of ours takes for JSON.

Python's own parser is kinder than the format: of a key that is there twice it silently keeps the last value, it reads
NaN and Infinity, and on deep nesting it raises RecursionError, which is no ValueError.
"""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes, *, allow_nan: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        text: UTF-8 where it is bytes.
        allow_nan: take NaN and Infinity, which other programs write into fields that nobody reads.

    Raises:
        ValueError: no JSON (with line and column; a ``json.JSONDecodeError``), or no UTF-8; a key twice in one object;
            nesting or a number beyond what can be read.
    """
    try:
        return json.loads(
            text if isinstance(text, str) else text.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=None if allow_nan else _no_constant,
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and repr(found[key]) != repr(value):  # repr: 1 and true and 1.0 are not the same
            raise ValueError(f"the key {key[:60]!r} is there twice, with two values; keep one of them")
        found[key] = value
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")
