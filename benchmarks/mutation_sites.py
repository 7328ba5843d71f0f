"""The mutants of a Python file: cosmic-ray's core operators, and two of our own.

* ``removed``: a statement with an effect (a call, an assignment to a part of something, ``x += y``, a ``raise``)
  becomes ``pass``.
* ``zeros``: a public function, method or property gives zeros of the structure of its result: see :func:`zeroed`.

Annotations are left out: every module of ours has ``from __future__ import annotations`` or none to evaluate. So are
the signatures of overloads, which nothing runs.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch

Span = tuple[tuple[int, int], tuple[int, int]]  # (line, column) of its begin and of its end
REMOVED, ZEROS = "removed", "zeros"
ZEROED_IMPORT = "from mutation_sites import zeroed as _zeroed"


@dataclass(frozen=True)
class Site:
    """Where an operator changes a file."""

    operator: str  # of cosmic-ray, or one of ours
    occurrence: int  # the operator's n-th place in the file
    line: int
    name: str = ""  # of what gives zeros, dotted


def sites_of(source: str) -> list[Site]:
    """All mutants of a file, in the order of the operators' names, then of their places."""
    return [*_cosmic_sites(source), *_removed_sites(source), *_zeros_sites(source)]


def mutated(source: str, site: Site) -> str:
    """The file with one change."""
    if site.operator == ZEROS:
        return f"{source}\n\n{ZEROED_IMPORT}\n\n{site.name} = _zeroed({_raw(site.name)})\n"
    if site.operator == REMOVED:
        return _without(source, _statements(source)[site.occurrence])
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    return mutate_code(source, get_operator(site.operator)(), site.occurrence)


def same_program(one: str, other: str) -> bool:
    """Whether two sources compile to the same syntax tree."""
    try:
        return ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))
    except SyntaxError:
        return False


def zeroed(function: Any) -> Any:
    """What computes as ``function`` does and gives zeros: for tensors with a gradient of zero, for lists element-wise.

    Dataclasses have their fields zeroed, strings are empty, an object of another kind becomes None.
    """
    if isinstance(function, property):
        return property(zeroed(function.fget))
    if isinstance(function, classmethod | staticmethod):
        return type(function)(zeroed(function.__func__))

    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        return _zeros_like(function(*args, **options))

    if hasattr(function, "cache_clear"):
        wrapper.cache_clear = function.cache_clear
    return wrapper


def _zeros_like(value: Any) -> Any:
    zeros = None
    if isinstance(value, torch.Tensor):
        zeros = value * 0 if value.is_floating_point() else torch.zeros_like(value)
    elif isinstance(value, np.ndarray):
        zeros = np.zeros_like(value)
        zeros.setflags(write=value.flags.writeable)
    elif isinstance(value, bool | int | float | str):
        zeros = type(value)()
    elif isinstance(value, list | tuple):
        zeros = type(value)(_zeros_like(item) for item in value)
    elif inspect.isgenerator(value):
        zeros = (_zeros_like(item) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        zeros = object.__new__(type(value))  # no check of the fields
        for field in fields(value):
            object.__setattr__(zeros, field.name, _zeros_like(getattr(value, field.name)))
    return zeros


def _cosmic_sites(source: str) -> Iterator[Site]:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    tree, left_out = get_ast(source), [*_annotations(source), *_overloads(source)]
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if operator.arguments():  # of variables that are named by hand
            continue
        occurrence = 0
        for node in ast_nodes(tree):
            for start, _ in operator().mutation_positions(node):
                if not any(begin <= tuple(start) < end for begin, end in left_out):
                    yield Site(name, occurrence, start[0])
                occurrence += 1


def _overloads(source: str) -> list[Span]:
    """The functions that say a signature."""
    return [
        ((node.decorator_list[0].lineno, 0), (node.end_lineno or node.lineno, node.end_col_offset or 0))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(mark, ast.Name) and mark.id == "overload" for mark in node.decorator_list)
    ]


def _annotations(source: str) -> list[Span]:
    """All annotations."""
    found = []
    for node in ast.walk(ast.parse(source)):
        annotation = getattr(node, "returns" if isinstance(node, ast.FunctionDef) else "annotation", None)
        if isinstance(annotation, ast.expr):
            begin, end = (annotation.lineno, annotation.col_offset), (annotation.end_lineno, annotation.end_col_offset)
            found.append((begin, end))
    return found


def _removed_sites(source: str) -> Iterator[Site]:
    for occurrence, statement in enumerate(_statements(source)):
        yield Site(REMOVED, occurrence, statement.lineno)


def _statements(source: str) -> list[ast.stmt]:
    """What ``removed`` takes away."""
    found = []
    for node in ast.walk(ast.parse(source)):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant | ast.Yield)
        part = isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple)
        if (isinstance(node, ast.Expr | ast.AugAssign | ast.Raise) and not text) or part:
            found.append(node)
    return sorted(found, key=lambda node: node.lineno)


def _without(source: str, statement: ast.stmt) -> str:
    lines = [line.encode() for line in source.splitlines(keepends=True)]  # columns of ast count bytes
    first, last = statement.lineno - 1, statement.end_lineno - 1
    rest = lines[last][statement.end_col_offset :]
    lines[first : last + 1] = [lines[first][: statement.col_offset] + b"pass" + rest]
    return b"".join(lines).decode()


def _zeros_sites(source: str) -> Iterator[Site]:
    for occurrence, (name, line) in enumerate(_public(ast.parse(source), "")):
        yield Site(ZEROS, occurrence, line, name)


def _public(tree: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, int]]:
    """Public functions and methods that give something back."""
    for node in tree.body:
        if getattr(node, "name", "_").startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from _public(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and _gives(node):
            yield f"{prefix}{node.name}", node.lineno


def _gives(function: ast.FunctionDef) -> bool:
    kinds = (ast.Return, ast.Yield, ast.YieldFrom)
    return any(isinstance(node, kinds) and node.value is not None for node in ast.walk(function))


def _raw(name: str) -> str:
    """An expression for what a name is bound to, a classmethod not yet bound to its class."""
    owner, _, attribute = name.rpartition(".")
    return f"vars({owner})[{attribute!r}]" if owner else name


def diff_of(before: str, after: str) -> tuple[str, str]:
    """The lines that differ, stripped: those before and those after."""
    old, new = before.splitlines(), after.splitlines()
    start = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    limit = min(len(old), len(new)) - start
    end = next((i for i in range(limit) if old[-1 - i] != new[-1 - i]), limit)

    def text(lines: list[str]) -> str:
        return " ".join(" ".join(lines[start : len(lines) - end]).split())

    return text(old), text(new)
