"""No checkpoint may run code: nothing of ours unpickles, and no loader is told to trust a repository's code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    file
    for folder in ("kernels", "models", "engine", "recipes", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
)


def forbidden(tree: ast.AST) -> list[str]:
    """What a source must not do, as it is written there."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in ("pickle", "dill", "joblib", "shelve")]
        elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "joblib", "shelve"):
            found.append(node.module)
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) == "torch.load" and not any(
                k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords
            ):
                found.append(ast.unparse(node))
            found += ["allow_pickle" for k in node.keywords if k.arg == "allow_pickle"]
            found += [
                "trust_remote_code"
                for k in node.keywords
                if k.arg == "trust_remote_code" and getattr(k.value, "value", None) is not False
            ]
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_unpickles_or_trusts_remote_code(file):
    assert forbidden(ast.parse(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_scan_sees_each_of_them(source):
    assert forbidden(ast.parse(source))
