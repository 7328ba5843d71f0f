"""What the tests do not run, function by function, each with the reason: all have been looked at.

    pytest -n 2 --dist loadfile --cov        # half an hour on two cores; writes .coverage into the repository's root
    python benchmarks/coverage_report.py     # the figures of that file

Lines and branches of engine/, kernels/ and models/, run by the tests or by a process that they start. Bodies of Triton
kernels are left out, which run rewritten in the interpreter. The reasons are in benchmarks/coverage_reasons.json: file,
function, why. Writes coverage.json and coverage.md into benchmarks/results and ends with 1 where a function has a gap
and no reason.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REASONS = ROOT / "benchmarks" / "coverage_reasons.json"


def measured() -> dict[str, Any]:
    """The totals, and the files with gaps, of coverage's own JSON."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "coverage.json"
        command = [sys.executable, "-m", "coverage", "json", "-q", "-o", str(file)]
        subprocess.run(command, cwd=ROOT, check=True)
        found = json.loads(file.read_text(encoding="utf-8"))
    files = {}
    for name, of_file in sorted(found["files"].items()):
        if of_file["missing_lines"] or of_file["missing_branches"]:
            source = (ROOT / name).read_text(encoding="utf-8")
            gaps = gaps_by_function(source, of_file["missing_lines"], of_file["missing_branches"])
            files[name] = {"percent": of_file["summary"]["percent_covered"], "gaps": gaps}
    names = ("num_statements", "missing_lines", "num_branches", "missing_branches", "percent_covered")
    git = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "command": "pytest -n 2 --dist loadfile --cov; python benchmarks/coverage_report.py",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip(),
        "coverage": found["meta"]["version"],
        "totals": {name: found["totals"][name] for name in names},
        "files": files,
    }


def gaps_by_function(source: str, lines: list[int], branches: list[list[int]]) -> dict[str, dict[str, list[str]]]:
    """Lines and branches that were not run, by the function or class that they are in; "" = the module itself.

    Args:
        source: of the file.
        lines: their numbers.
        branches: from which line to which; a negative end is that of a function.
    """
    tree = ast.parse(source)
    found: dict[str, tuple[list[int], list[str]]] = {}
    for number in lines:
        found.setdefault(owner(tree, number), ([], []))[0].append(number)
    for start, end in branches:
        if start not in lines and end not in lines:  # else the line says it
            found.setdefault(owner(tree, start), ([], []))[1].append(f"{start}->{'exit' if end < 0 else end}")
    return {name: {"lines": ranges(own), "branches": ways} for name, (own, ways) in found.items()}


def owner(tree: ast.AST, number: int) -> str:
    """The innermost function or class around a line, "Class.method"; "" = none."""
    found: list[str] = []
    inside: list[ast.AST] = [tree]
    while inside:
        node = inside.pop()
        named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if named:
            begin = min(part.lineno for part in (node, *node.decorator_list))
            if not begin <= number <= (node.end_lineno or begin):
                continue
            found.append(node.name)
            inside = []
        inside += ast.iter_child_nodes(node)
    return ".".join(found)


def reasons() -> dict[str, dict[str, str]]:
    """Why: file -> function -> reason; "" = the module itself."""
    found: dict[str, dict[str, str]] = json.loads(REASONS.read_text(encoding="utf-8"))
    return found


def ranges(numbers: list[int]) -> list[str]:
    """[3, 4, 5, 9] as ["3-5", "9"]."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found]


def markdown(content: Mapping[str, Any]) -> str:
    """The page: totals, then the files with gaps."""
    totals, known = content["totals"], reasons()
    rows = []
    for name, one in content["files"].items():
        for number, (function, gap) in enumerate(one["gaps"].items()):
            place = f"| {name} | {one['percent']:.0f} %" if number == 0 else "| |"
            where = f"`{function}`" if function else "the module"
            why = known.get(name, {}).get(function, "")
            rows.append(f"{place} | {where} | {', '.join(gap['lines'] + gap['branches'])} | {why} |")
    told = (
        f"`{content['command']}`, {content['date']}, commit {content['commit']}, coverage {content['coverage']}: "
        f"**{totals['percent_covered']:.1f} %** of {totals['num_statements']:,} statements and "
        f"{totals['num_branches']:,} branches of engine/, kernels/ and models/; {totals['missing_lines']} statements "
        f"and {totals['missing_branches']} branches are not run. Bodies of Triton kernels are left out."
    )
    head = ["| file | covered | where | lines, and ways from one to the next, not run | why |", "|---|---|---|---|---|"]
    return "\n".join(["# What the tests do not run", "", told, "", *head, *rows, ""])


def main() -> int:
    """The command line; 1 where a file has gaps and no reason."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    content = measured()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "coverage.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "coverage.md").write_text(markdown(content), encoding="utf-8")
    print(markdown(content).partition("\n| file")[0])
    known = reasons()
    unexplained = [
        f"{name}: {function or 'the module'}"
        for name, one in content["files"].items()
        for function in one["gaps"]
        if function not in known.get(name, {})
    ]
    if unexplained:
        print(f"without a reason: {', '.join(unexplained)}", file=sys.stderr)
    return int(bool(unexplained))


if __name__ == "__main__":
    sys.exit(main())
