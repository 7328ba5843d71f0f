"""The packages that bivec works with, as setup.py asks for them, and what is installed. Imports none of them."""

from __future__ import annotations

import re
from importlib import metadata
from importlib.util import find_spec

PYTHON = "3.10"
REQUIRED = {"torch": "2.13", "safetensors": "0.4.3", "numpy": "2.0"}  # with the oldest version that does
OPTIONAL = {  # oldest version, and the extra that installs it
    "triton": ("3.6", "all"),
    "transformers": ("5.2", "quickstart"),
    "datasets": ("3.0", "quickstart"),
    "sentencepiece": ("0.2", "quickstart"),
    "gguf": ("0.18", "quickstart"),
    "scipy": ("1.13", "quickstart"),
    "tqdm": ("4.66.3", "quickstart"),
    "matplotlib": ("3.9", "quickstart"),
    "pyyaml": ("6", "quickstart"),
    "huggingface_hub": ("1.3", "hub"),
    "mteb": ("2.6.9", "eval"),
    "seqeval": ("1.2.2", "eval"),
    "scikit-learn": ("1.5", "eval"),
    "peft": ("0.18", "integrations"),
    "sentence-transformers": ("5.4", "integrations"),
    "lightning": ("2.5", "integrations"),
    "pytest": ("8", "test"),
}
MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml"}  # where the name is another one


def installed(package: str) -> str | None:
    """The version that is installed, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def importable(package: str) -> bool:
    """Whether the package's module is there; a folder that only bears its name is none."""
    spec = find_spec(MODULES.get(package, package.replace("-", "_")))
    return spec is not None and spec.origin is not None


def owner(module: str) -> str | None:
    """The package that a module came with, and its version: "pytorch-triton 3.6.0"; None where nothing says so."""
    found = metadata.packages_distributions().get(module, [])
    return f"{found[0]} {metadata.version(found[0])}" if found else None


def older(version: str, oldest: str) -> bool:
    """Whether a version comes before another one, by its leading numbers ("2.13.0+cpu" is 2.13.0)."""
    found, wanted = (_numbers(text) for text in (version, oldest))
    width = max(len(found), len(wanted))
    return found + (0,) * (width - len(found)) < wanted + (0,) * (width - len(wanted))


def install_hint(package: str) -> str:
    """The command that installs an optional package."""
    return f'pip install "bivec[{OPTIONAL[package][1]}]"'


def _numbers(version: str) -> tuple[int, ...]:
    leading = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()
