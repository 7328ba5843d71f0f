"""JSON files: read for what they must be, or for what they may be, and written in one form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bivec.models.errors import BivecError, ConfigError
from bivec.models.plain_json import parse_json

KINDS: dict[type, str] = {dict: "object", list: "list"}  # what JSON calls them


def read_json(
    file: Path,
    kind: type,
    error_class: type[BivecError] = ConfigError,
    *,
    hint: str = "",
    allow_nan: bool = False,
) -> Any:
    """The content of a JSON file that must be there.

    Args:
        file: its path.
        kind: dict or list.
        error_class: of what is raised.
        hint: what is said of a file that is not there.
        allow_nan: see :func:`parse_json`.

    Raises:
        BivecError: of the class: no such file, no JSON, or another kind of value.
    """
    try:
        content = parse_json(file.read_bytes(), allow_nan=allow_nan)
    except FileNotFoundError:
        raise error_class(f"{file}: no such file{hint}") from None
    except OSError as error:
        raise error_class(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise error_class(f"{file}: not a JSON file ({error})") from error
    if not isinstance(content, kind):
        raise error_class(f"{file}: expected a JSON {KINDS[kind]}, found {type(content).__name__}")
    return content


def json_or_none(file: Path) -> Any:
    """The content of a JSON file; None where there is none, or none that can be read."""
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError):
        return None


def json_text(content: Any) -> str:
    """A file's content: two spaces a level, and a last line end."""
    return json.dumps(content, indent=2) + "\n"
