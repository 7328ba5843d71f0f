"""Dataclasses whose values come from a file: each field must be of the type that its annotation names."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

TYPES = {"str": (str,), "bool": (bool,), "int": (int,), "float": (float, int), "None": (type(None),)}


def check_types(record: Any) -> None:
    """Checks the fields that are annotated with names of ``TYPES``, alone or joined by "|"; true is no number.

    Args:
        record: a dataclass of a module with ``from __future__ import annotations``.

    Raises:
        ValueError: the field, what it holds, and what was expected.
    """
    for field in fields(record):
        names, value = [name.strip() for name in field.type.split("|")], getattr(record, field.name)
        if not all(name in TYPES for name in names):
            continue
        kinds = tuple(kind for name in names for kind in TYPES[name])
        if not isinstance(value, kinds) or (isinstance(value, bool) and "bool" not in names):
            raise ValueError(f"{field.name} is {repr(value)[:80]}, expected {field.type.replace('|', 'or')}")
