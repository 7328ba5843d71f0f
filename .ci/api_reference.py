"""Builds the API reference from the docstrings with pdoc; every warning of pdoc is an error.

    python .ci/api_reference.py DIRECTORY

The import package is the repository's root: setup.py, tests, recipes and benchmarks lie in it and are none of its
modules, so the modules are named here, and nothing else is imported. A package whose ``__all__`` is its surface is one
page; of the others every module is.
"""

import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import bivec

SPECS = ("bivec", "bivec.kernels", "bivec.kernels.reference", "bivec.models", "bivec.engine")  # pdoc walks engine
BEHIND_ALL = "bivec.engine.evaluation"  # whose modules pdoc leaves out, since ``__all__`` does not name them


def specs() -> list[str]:
    """What pdoc is to document."""
    path = importlib.import_module(BEHIND_ALL).__path__
    return [*SPECS, *(module.name for module in pkgutil.iter_modules(path, BEHIND_ALL + "."))]


def build(directory: Path, names: list[str]) -> int:
    """Writes the pages, and says how many.

    Raises:
        UserWarning: whatever pdoc warns of: a name of ``__all__`` or an annotation that does not resolve, a module that
            does not import, a file to include that is missing.
    """
    modules = pdoc.extract.walk_specs(names)  # imports them: what other libraries warn of there is not our docstrings'
    bivec.Encoder = bivec.Encoder  # loaded at its first use; pdoc looks for names that are there
    pdoc.render.configure(docformat="google", footer_text=f"bivec {bivec.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # of others, imported for the annotations
        pdoc.pdoc(*names, output_directory=directory)
    return len(modules)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/api_reference.py DIRECTORY")
    target = Path(sys.argv[1])
    print(f"{target / 'index.html'}: {build(target, specs())} modules")
