"""Lists the benchmarks, or runs one with its own arguments.

They are scripts of a clone and not part of an installed package. Their exit code is passed on.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bivec.engine.cli.output import command_parser, results_only, say, write_document

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
EPILOG = """examples:
  bivec bench                          # their names, and the question that each answers
  bivec bench ops                      # every operator against plain torch and torch.compile
  bivec bench roofline --help
  bivec bench losses --size small"""


@dataclass(frozen=True)
class Benchmark:
    """A script of benchmarks/."""

    name: str
    question: str  # the first line of its docstring
    path: str
    runner: str  # "python" | "pytest"


def main(arguments: Sequence[str]) -> int:
    """Lists the benchmarks or runs one; returns the exit code."""
    parser = command_parser("bench", __doc__, EPILOG)
    parser.add_argument("name", nargs="?", help="of a benchmark; what stands behind it goes to the script")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    own = next((i + 1 for i, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
    given = parser.parse_args(arguments[:own])
    if not FOLDER.is_dir():
        say(
            f"error: {FOLDER} is not there: the benchmarks come with a clone of the repository, not with an installed "
            "package; in a clone: pip install -e . and bivec bench"
        )
        return 1
    found = benchmarks()
    if given.name is not None:
        return run(found, given.name, arguments[own:])
    with results_only() as stdout:
        if given.json:
            write_document(stdout, [asdict(one) for one in found])
        else:
            width = max(len(one.name) for one in found)
            print("\n".join(f"{one.name:{width}}  {one.question}" for one in found), file=stdout)
    return 0


def benchmarks() -> list[Benchmark]:
    """Those that can be run, by name; the folder's other files are parts of them."""
    found = []
    for file in sorted(FOLDER.glob("*.py")):
        source = file.read_text(encoding="utf-8")
        documentation = ast.get_docstring(ast.parse(source)) or ""
        is_script = '\nif __name__ == "__main__":' in source
        if is_script or f"pytest benchmarks/{file.name}" in documentation:
            runner = "python" if is_script else "pytest"
            found.append(Benchmark(file.stem, documentation.partition("\n")[0], str(file), runner))
    return found


def run(found: Sequence[Benchmark], name: str, arguments: Sequence[str]) -> int:
    """The script's exit code."""
    one = next((one for one in found if one.name == name), None)
    if one is None:
        say(f"error: there is no benchmark {name!r}, only {', '.join(one.name for one in found)}")
        return 2
    runner = [sys.executable]
    if one.runner == "pytest":  # its own command: `python -m pytest` would put the working directory on sys.path
        runner = [str(Path(sys.executable).with_name("pytest"))]
        if not Path(runner[0]).exists():
            say(f'error: the benchmark {name} runs with pytest, which is not installed: pip install "bivec[test]"')
            return 1
    sys.stdout.flush()
    return subprocess.run([*runner, one.path, *arguments], check=False).returncode
