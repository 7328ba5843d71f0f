"""What the documents say of files: every module has its row, METHOD numbers have their source, variables their line."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMBER = r"\d+(?:\.\d+)?"
METHOD = re.compile(rf"METHOD ({NUMBER}(?:(?:, | and |-){NUMBER})*)")  # "METHOD 3.6, 4.5 and 5.7"


def tracked(*patterns: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.split()


def text_of(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def section(file: str, heading: str) -> str:
    """From the heading to the next of its level."""
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text_of(file), re.MULTILINE | re.DOTALL)[1]


def first_cells(table: str) -> list[str]:
    return re.findall(r"^\| (.*?) \|", table, re.MULTILINE)


@pytest.mark.parametrize("folder", ["kernels", "models", "engine", "benchmarks"])
def test_every_module_stands_in_its_readme(folder):
    readme = f"{folder}/README.md"
    rows = {name for cell in first_cells(section(readme, "Files")) for name in re.findall(r"`([^`]+)`", cell)}
    shown = set(re.findall(rf"^(?:python|pytest) {folder}/(\S+)", text_of(readme), re.MULTILINE))  # "the scripts above"
    files = [file.removeprefix(f"{folder}/") for file in tracked(folder)]
    modules = [file for file in files if file.endswith(".py") and not file.endswith("__init__.py")]
    assert len(modules) >= 15
    lost = {
        module
        for module in modules
        if module not in shown
        and not any(fnmatch(module, row) or (row.endswith("/") and module.startswith(row)) for row in rows)
    }
    assert lost == set()
    assert {row for row in rows if not any(fnmatch(file, row) or file.startswith(row) for file in files)} == set()


def sources() -> set[str]:
    """The numbers that engine/README.md resolves."""
    return set(re.findall(rf"METHOD ({NUMBER})", " ".join(first_cells(section("engine/README.md", "Sources")))))


def cited() -> dict[str, str]:
    """Every number that is cited, and a file that does."""
    found = {}
    for file in tracked("*.py", "*.md"):
        text = text_of(file)
        if file == "engine/README.md":
            text = text.replace(section(file, "Sources"), "")
        text = re.sub(r"\s+(?:# )?", " ", text)  # a line may end within a reference
        for numbers in METHOD.findall(text):
            found |= dict.fromkeys(re.findall(NUMBER, numbers), file)
    return found


def covers(known: set[str], number: str) -> bool:
    """A chapter stands for its sections where none of them has a row."""
    chapter = number.partition(".")[0]
    return number in known or (chapter in known and not any(one.startswith(f"{chapter}.") for one in known))


def test_every_source_that_is_cited_resolves():
    known, wanted = sources(), cited()
    assert len(wanted) >= 30
    assert {number: file for number, file in wanted.items() if not covers(known, number)} == {}
    assert {one for one in known if not any(one == n or n.startswith(f"{one}.") for n in wanted)} == set()


def test_a_source_that_is_not_there_is_seen():
    assert METHOD.findall("(" + "METHOD 3.6, 4.5 and 5.7)") == ["3.6, 4.5 and 5.7"]
    assert covers({"14"}, "14.2") and covers({"3", "3.1"}, "3.1")
    assert not covers({"3", "3.1"}, "3.2") and not covers({"3.1"}, "3") and not covers({"3"}, "31")


@pytest.mark.parametrize("word", ["DESIGN", "STYLE"])
def test_no_document_is_cited_that_is_not_here(word):
    pattern = re.compile(rf"\b{word}(?:\.md|[ ,]+\d)")
    assert [file for file in tracked("*.py", "*.md", ".ci") if pattern.search(text_of(file))] == []


def test_every_variable_of_the_environment_is_explained():
    pages = text_of("CONTRIBUTING.md") + section("kernels/README.md", "Backends")
    explained = set(re.findall(r"^\| `(BIVEC_[A-Z_]+)", pages, re.MULTILINE))
    read = {
        name for file in tracked("*.py", ".ci") for name in re.findall(r"\bBIVEC_[A-Z]+(?:_[A-Z]+)*", text_of(file))
    }
    assert explained == read


def test_what_contributing_names_is_there():
    page = text_of("CONTRIBUTING.md")
    own = set(re.findall(r"^# (\S+\.py)$", page, re.MULTILINE))  # its own examples
    named = set(re.findall(r"\b((?:tests|models|kernels|engine|benchmarks)/[\w/]+\.py)\b", page)) - own
    assert len(named) >= 8
    assert {file for file in named if not (ROOT / file).is_file()} == set()
    tables = re.findall(r"`([A-Za-z]+)` of\s`(tests/\S+\.py)`", page)
    assert len(tables) >= 5
    missing = [(name, file) for name, file in tables if not re.search(rf"^{name} = ", text_of(file), re.MULTILINE)]
    assert missing == []
