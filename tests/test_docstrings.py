"""The docstrings: those of public names say shapes and errors, what they refer to exists, and pdoc builds them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bivec
import bivec.engine
import bivec.kernels
import bivec.models
from bivec.engine import corpus, objectives
from bivec.engine.integrations import transformers as our_transformers

ROOT = Path(__file__).parents[1]
SHAPE = re.compile(r"\[\w[\w, +*/…]*\]|0-dim|\bshape|as :func:")
SURFACES = {
    "bivec.kernels": [getattr(bivec.kernels, name) for name in bivec.kernels.__all__],
    "bivec.models": [getattr(bivec.models, name) for name in bivec.models.__all__],
    "bivec": [bivec.Encoder, *(m for n, m in inspect.getmembers(bivec.Encoder, callable) if not n.startswith("_"))],
    "bivec.engine": [objectives.mntp_loss, objectives.simcse_loss, corpus.encode_corpus],
    "integrations": [our_transformers.register, our_transformers.apply_kernels, our_transformers.mntp_loss],
}
PUBLIC = [pytest.param(one, id=f"{where}.{one.__name__}") for where, ones in SURFACES.items() for one in ones]


def modules() -> Iterator[str]:
    for package in (bivec.kernels, bivec.models, bivec.engine):
        yield package.__name__
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not found.name.endswith("__main__"):
                yield found.name


def docstrings(module: str) -> Iterator[tuple[str, str]]:
    """(name, docstring) of a module and of what it defines."""
    loaded = importlib.import_module(module)
    yield module, loaded.__doc__ or ""
    for name, member in list(vars(loaded).items()):  # some load more as they are asked
        if getattr(member, "__module__", None) != module or not (inspect.isclass(member) or inspect.isfunction(member)):
            continue
        yield f"{module}.{name}", member.__doc__ or ""
        if inspect.isclass(member):
            for inner, found in list(vars(member).items()):
                method = getattr(found, "__func__", found)
                if inspect.isfunction(method) and method.__module__ == module:
                    yield f"{module}.{name}.{inner}", method.__doc__ or ""


@pytest.mark.parametrize("one", PUBLIC)
def test_public_names_are_described(one):
    text = inspect.getdoc(one) or ""
    assert len(text.split()) >= 3
    if inspect.isclass(one):
        return
    parameters = inspect.signature(one).parameters
    tensors = [name for name, p in parameters.items() if "Tensor" in str(p.annotation)]
    if tensors:
        assert SHAPE.search(text), "takes tensors and says no shape"
    if "Args:" in text:
        missing = [name for name in parameters if name not in ("self", "cls") and not re.search(rf"\b{name}\b", text)]
        assert missing == [], "not described"
    if re.search(r"^\s+raise \w+(Error|Exception)\b", inspect.getsource(one), flags=re.MULTILINE):
        assert re.search(r"Raises|raises|refuse", text), "raises, and does not say so"


@pytest.mark.parametrize("module", modules())
def test_what_a_docstring_refers_to_exists(module):
    """``:func:`name```, ``bivec.x.y`` and the path of a file of ours."""
    loaded = sys.modules.get(module) or importlib.import_module(module)
    gone = []
    for name, text in docstrings(module):
        owner = getattr(loaded, name.removeprefix(module).strip(".").partition(".")[0] or "__doc__")
        roles = re.findall(r":(?:func|class|meth|mod|attr|data):`~?([\w.]+)`", text)
        known = [any(resolves(start, target) for start in (owner, loaded, bivec)) for target in roles]
        gone += [
            (name, target) for target, here in zip(roles, known, strict=True) if not here and not importable(target)
        ]
        gone += [(name, target) for target in re.findall(r"`(bivec\.[\w.]+)`", text) if not importable(target)]
        paths = re.findall(r"\b(?:kernels|models|engine|recipes|benchmarks)/[\w/]+\.(?:py|json|md)\b", text)
        gone += [(name, path) for path in paths if not (ROOT / path).is_file()]
    assert gone == []


def resolves(start: object, target: str) -> bool:
    for part in target.split("."):
        if not hasattr(start, part) and part not in getattr(start, "__annotations__", {}):
            return False
        start = getattr(start, part, None)
    return True


def importable(target: str) -> bool:
    module, _, rest = target.partition(".")
    if module not in sys.modules and module != "bivec":
        return False
    found = importlib.import_module(module)
    for part in rest.split("."):
        if not hasattr(found, part):
            try:
                importlib.import_module(f"{found.__name__}.{part}")
            except (ImportError, AttributeError):
                return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize(
    ("source", "warning"),
    [
        ('"""Fine."""\n\n\ndef one(x: int) -> int:\n    """Adds one."""\n    return x + 1\n', None),
        ('"""Names what is not there."""\n\n__all__ = ["nothing"]\n', "nothing"),
        ('"""Wrong."""\n\n\ndef one(x: "Nothing") -> int:\n    """An annotation of nothing."""\n', "Nothing"),
        ('"""Includes what is not there.\n\n.. include:: nothing.md\n"""\n', "nothing.md"),
    ],
)
def test_the_api_reference_is_strict(source, warning, tmp_path, monkeypatch):
    """What .ci/api_reference.py is built of: a warning of pdoc ends it. The pages of ours: test_readmes.py."""
    name = f"documented_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    build = runpy.run_path(str(ROOT / ".ci" / "api_reference.py"))["build"]
    if warning is None:
        assert build(tmp_path / "api", [name]) == 1
        assert "Adds one." in (tmp_path / "api" / f"{name}.html").read_text(encoding="utf-8")
    else:
        with pytest.raises(Exception, match=warning):
            build(tmp_path / "api", [name])


def test_the_api_reference_is_ours_alone():
    """Nothing of setup.py, tests, recipes and benchmarks, which lie beside the packages."""
    script = runpy.run_path(str(ROOT / ".ci" / "api_reference.py"))
    import pdoc

    pages = pdoc.extract.walk_specs(script["specs"]())
    assert {name.split(".")[1] for name in pages if "." in name} == {"kernels", "models", "engine"}
    assert set(pages) >= {name for name in modules() if name.startswith("bivec.engine")}
