"""A recipe's flags as a YAML or JSON file.

preset: mistral-7b          # the keys are the flags' names, with - or _
mntp-data: articles.txt
stages: [bi, mntp]
mntp:                       # and what --set takes, nested or with dots
  optim: {learning_rate: 1.0e-4, steps: 500}
simcse.batch_size: 64
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from bivec.engine.errors import ConfigError
from bivec.engine.recipe import Recipe
from bivec.engine.recipe_arguments import OWN_FLAGS
from bivec.models.plain_json import parse_json

MOST_VALUES = 10_000
NOT_IN_A_FILE = ("help", "config", "json")
ON_BAD_LINE = "supervised.on_bad_line"  # has a flag, which would come before --set


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings of a file by key, nested ones with dots: ``{"mntp.optim.steps": 500}``.

    Raises:
        ConfigError: no such file, not YAML or JSON (with the line), a key that is there twice.
    """
    path = Path(path)
    readers = {".yaml": _read_yaml, ".yml": _read_yaml, ".json": _read_json}
    if path.suffix not in readers:
        raise ConfigError(f"{path}: a configuration is a .yaml, .yml or .json file")
    try:
        content = readers[path.suffix](path, path.read_text(encoding="utf-8"))
        if _values(content, {}) > MOST_VALUES:  # of a few aliases YAML can make more than a memory holds
            raise ConfigError(f"{path}: holds more than {MOST_VALUES} values; write them out")
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deep, or a part of itself") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}, expected keys and values such as model: DIR")
    found: dict[str, Any] = {}
    for key, value in _flat(content):
        if key in found:
            raise ConfigError(f"{path}: the key {key!r} is there twice")
        found[key] = value
    return found


def as_flags(path: str | Path, settings: dict[str, Any], parser: argparse.ArgumentParser, recipe: Recipe) -> list[str]:
    """The flags that say what a file says.

    Args:
        path: of the file, for errors.
        settings: from :func:`read_config`.
        parser: of the recipe.
        recipe: whose fields ``--set`` reaches.

    Raises:
        ConfigError: a key that is neither a flag nor a hyper-parameter, or a value that none can have.
    """
    actions = parser._actions  # noqa: SLF001 - argparse has no public list of a parser's flags
    flags = {action.dest: action for action in actions if action.dest not in (*NOT_IN_A_FILE, "set")}
    known = [*flags, *(name for name in setting_names(recipe) if name not in OWN_FLAGS)]
    words = []
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}; {_nearest(key, known)}")
        name = "on_bad_line" if key == ON_BAD_LINE else key
        place = f"{path}: {key}"
        if name not in flags:
            words.append(f"--set={key}={_text(value, place)}")
        elif flags[name].nargs == 0:
            if not isinstance(value, bool):
                raise ConfigError(f"{place} is {repr(value)[:80]}, expected true or false")
            words += [f"--{name.replace('_', '-')}"] * value
        elif value is not None:  # null = the default
            words.append(f"--{name.replace('_', '-')}={_text(value, place)}")
    return words


def setting_names(settings: Any, prefix: str = "") -> list[str]:
    """What ``--set`` reaches, with dots; ``shape`` cannot be given."""
    found = []
    for field in fields(settings):
        value, name = getattr(settings, field.name), prefix + field.name
        if is_dataclass(value) and name != "shape":
            found += setting_names(value, f"{name}.")
        elif name != "shape":
            found.append(name)
    return found


def _values(part: Any, known: dict[int, int]) -> int:
    """How many values there are, those of an alias counted at each of its places."""
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    if id(part) not in known or not inner:
        known[id(part)] = 1 + sum(_values(value, known) for value in inner)
    return known[id(part)]


def _flat(content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = prefix + str(key).replace("-", "_")
        if isinstance(value, dict):
            yield from _flat(value, "" if name == "set" else f"{name}.")
        else:
            yield name, value


def _nearest(key: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    last = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    if found or last:
        return f"the nearest is {(found or last)[0]!r}"
    return f"there are {', '.join(name for name in known if '.' not in name)} and those of the stages, mntp.… for one"


def _text(value: Any, place: str) -> str:
    """A value as the command line has it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and not any(isinstance(item, list) for item in value):
        return ",".join(_text(item, place) for item in value)
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ConfigError(f"{place} is {repr(value)[:80]}, expected text, a number, true, false or a list of them")


def _read_json(path: Path, text: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _read_yaml(path: Path, text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        """Safe, and no key of a mapping twice: of two, YAML's would keep the last without a word."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            """As its parent's, of keys that differ."""
            met = set()
            for key, _ in node.value:
                if isinstance(key.value, str) and key.value in met:
                    line = key.start_mark.line + 1
                    raise ConfigError(f"{path}, line {line}: the key {key.value!r} is there twice")
                met.add(str(key.value))
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    try:
        return yaml.load(text, Loader) or {}  # noqa: S506 - a SafeLoader
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:  # a date with a thirteenth month
        raise ConfigError(f"{path}: holds a value that YAML cannot read ({error!r})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise ConfigError(f"{path}{where}: not YAML ({getattr(error, 'problem', None) or error})") from error
