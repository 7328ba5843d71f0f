"""A long evaluation in parts: each leaves its result on the disk, and what is there is not done again.

A part's file is ``<directory>/<name>.json``: its settings, its result, the seconds that it took. With other settings,
another model for one, the part is done anew.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bivec.engine.errors import RunError
from bivec.engine.recipe import RUN_FILE, TRAINED
from bivec.engine.run_files import recorded_recipe
from bivec.models.files import write_text_atomic


@dataclass(frozen=True)
class Part:
    """What came out of one part."""

    name: str
    data: Any  # of JSON values
    seconds: float  # when it was made
    reused: bool


def kept_part(directory: str | Path, name: str, settings: Mapping[str, Any]) -> Part | None:
    """The result of a part that was made with these settings; None if there is none."""
    kept = _kept(Path(directory) / f"{name}.json")
    if kept is None or kept["settings"] != json.loads(json.dumps(dict(settings))):
        return None
    return Part(name, kept["data"], kept["seconds"], reused=True)


def run_part(directory: str | Path, name: str, settings: Mapping[str, Any], make: Callable[[], Any]) -> Part:
    """The result of a part: from the disk where it was made with the same settings, else made and written there.

    Args:
        directory: is made if it does not exist.
        name: of the part and its file.
        settings: everything that the result depends on, as JSON values.
        make: does the work; its result must be JSON values.

    Raises:
        RunError: a result that cannot be written as JSON: a NaN, or no JSON value.
    """
    kept = kept_part(directory, name, settings)
    if kept is not None:
        return kept
    file, started = Path(directory) / f"{name}.json", time.monotonic()
    file.parent.mkdir(parents=True, exist_ok=True)  # before the part draws its figure there
    data = make()
    seconds = round(time.monotonic() - started, 1)
    try:
        text = json.dumps({"settings": dict(settings), "seconds": seconds, "data": data}, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RunError(f"part {name}: its result is no JSON ({error})") from error
    write_text_atomic(file, text + "\n")
    return Part(name, json.loads(text)["data"], seconds, reused=False)


def fingerprint(directory: str | Path) -> dict[str, str]:
    """What tells the model of a run, or of any other place, from another: by file, size and checksum.

    Of a run: its ``run.json`` without the place, and what its stages have trained. Of weights outside a run: name, size
    and the checksum of the first MiB, which holds the header of every format.
    """
    directory = Path(directory)
    if not (directory / RUN_FILE).is_file():
        files = sorted(directory.glob("*")) if directory.is_dir() else [directory]
        return {file.name: _checksum(file, 1 << 20) for file in files if file.is_file()}
    trained = [file for name in TRAINED for file in sorted((directory / name).glob("*.safetensors"))]
    recipe = recorded_recipe(directory)
    found = {str(file.relative_to(directory)): _checksum(file) for file in trained}
    return {"recipe": f"{zlib.crc32(json.dumps(recipe, sort_keys=True).encode()):08x}"} | found


def _kept(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {name: content[name] for name in ("settings", "seconds", "data")}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or of another program: to be made


def _checksum(file: Path, limit: int | None = None) -> str:
    """Size and CRC of a file or of its beginning."""
    left, value = file.stat().st_size if limit is None else limit, 0
    with file.open("rb") as handle:
        while left > 0 and (block := handle.read(min(left, 1 << 20))):
            value, left = zlib.crc32(block, value), left - len(block)
    return f"{file.stat().st_size} bytes, crc32 {value:08x}"
