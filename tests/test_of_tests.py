"""Tests that can fail: each one asserts something, itself or by a helper, and none is skipped without a reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
ASSERTING_MODULES = (
    "np.testing",
    "torch.testing",
    "torch.autograd.gradcheck",
    "torch.library.opcheck",
)
ASSERTING_CALLS = ("pytest.raises", "pytest.warns", "pytest.fail")


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def calls(node: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call inside, by the dotted name of what is called."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call):
            yield ast.unparse(inner.func), inner


def asserts(node: ast.AST, known: dict[str, ast.AST], seen: frozenset[str] = frozenset()) -> bool:
    """Whether running ``node`` checks something: by an ``assert`` that is no constant, by a call of a library that
    asserts, by a process that must succeed, or by a function, fixture or class of ``known`` that does.
    """
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assert) and not isinstance(inner.test, ast.Constant | ast.Tuple):
            return True
    for name, call in calls(node):
        if name in ASSERTING_CALLS or name.startswith(ASSERTING_MODULES):
            return True
        if name == "subprocess.run" and any(
            keyword.arg == "check" and getattr(keyword.value, "value", None) is True for keyword in call.keywords
        ):
            return True
    helpers = {name.partition(".")[0] for name, _ in calls(node)}
    if isinstance(node, ast.FunctionDef):  # fixtures
        helpers |= {argument.arg for argument in node.args.args}
    return any(asserts(known[name], known, seen | {name}) for name in helpers if name in known and name not in seen)


@cache
def names_of(file: Path) -> dict[str, ast.AST]:
    """Functions and classes of a file of tests, of the conftest files above it, and of the test files it imports."""
    found: dict[str, ast.AST] = {}
    for folder in (TESTS, *(TESTS / part for part in file.relative_to(TESTS).parents)):
        if (folder / "conftest.py").is_file() and file.name != "conftest.py":
            found |= names_of(folder / "conftest.py")
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported = file.parent / f"{node.module.rpartition('.')[2]}.py"
            if imported.is_file() and imported != file:
                found |= {
                    alias.asname or alias.name: names_of(imported)[alias.name]
                    for alias in node.names
                    if alias.name in names_of(imported)
                }
    return found | {
        node.name: node for node in ast.walk(parsed(file)) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def functions_of(tree: ast.Module) -> list[ast.FunctionDef]:
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test")]
    bodies = [tree.body, *(node.body for node in classes)]
    return [node for body in bodies for node in body if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"]


def unreasoned_skips(tree: ast.AST) -> list[int]:
    """Lines of ``skip``, ``skipif`` and ``xfail`` without a reason; ``importorskip`` names the module by itself."""
    found = []
    with_reason = set()
    for name, call in calls(tree):
        marks = name in ("pytest.mark.skip", "pytest.mark.skipif", "pytest.mark.xfail", "pytest.xfail", "pytest.skip")
        reasons = [keyword.value for keyword in call.keywords if keyword.arg == "reason"]
        if not name.endswith("skipif"):
            reasons += call.args[:1]
        if marks and any(not isinstance(one, ast.Constant) or str(one.value).strip() for one in reasons):
            with_reason.add(call.func)
        elif marks:
            found.append(call.lineno)
            with_reason.add(call.func)
    for node in ast.walk(tree):
        bare = isinstance(node, ast.Attribute) and ast.unparse(node) in ("pytest.mark.skip", "pytest.mark.xfail")
        if bare and node not in with_reason:
            found.append(node.lineno)
    return sorted(found)


def test_every_test_asserts():
    idle = [
        f"{file.relative_to(TESTS)}:{test.lineno} {test.name}"
        for file in FILES
        for test in functions_of(parsed(file))
        if not asserts(test, names_of(file))
    ]
    assert idle == []


def test_every_skip_says_why():
    silent = [f"{file.relative_to(TESTS)}:{line}" for file in FILES for line in unreasoned_skips(parsed(file))]
    assert silent == []


def test_pytest_prints_the_reasons(pytestconfig):
    """Of skips, in every run; and a test that passes where it is expected to fail is a failure."""
    assert "-rs" in pytestconfig.getini("addopts") and pytestconfig.getini("xfail_strict") is True


def test_no_test_hides_another():
    """Of two tests of one name in a file the first would never run."""
    names = [(str(file), test.name) for file in FILES for test in functions_of(parsed(file))]
    assert sorted(set(names)) == sorted(names) and len(names) > 1000


HELPERS = """
def checks(x):
    deeper(x)

def deeper(x):
    assert x

def loops(x):
    return loops(x)
"""


@pytest.mark.parametrize(
    ("body", "enough"),
    [
        ("assert f() == 1", True),
        ("checks(1)", True),
        ("np.testing.assert_array_equal(1, 1)", True),
        ("with pytest.raises(ValueError):\n        f()", True),
        ("subprocess.run(['x'], check=True)", True),
        ("subprocess.run(['x'], check=False)", False),
        ("assert True", False),
        ("assert (f() == 1, 'says what')", False),
        ("loops(1)", False),
        ("f()", False),
    ],
)
def test_what_counts_as_an_assertion(body, enough):
    tree = ast.parse(f"{HELPERS}\ndef test_it():\n    {body}\n")
    known = {node.name: node for node in tree.body}
    assert asserts(known["test_it"], known) == enough


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("@pytest.mark.skipif(True, reason='no fork')\ndef test_it(): ...", []),
        ("@pytest.mark.skipif(True)\ndef test_it(): ...", [1]),
        ("@pytest.mark.skip\ndef test_it(): ...", [1]),
        ("@pytest.mark.xfail(reason='')\ndef test_it(): ...", [1]),
        ("def test_it():\n    pytest.skip()", [2]),
        ("def test_it():\n    pytest.skip(INSTALL)", []),
        ("pytest.importorskip('triton')", []),
    ],
)
def test_what_counts_as_a_reason(source, lines):
    assert unreasoned_skips(ast.parse(source)) == lines
