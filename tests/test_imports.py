"""What importing bivec loads, and that the layers point down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bivec

ROOT = Path(__file__).parents[1]
HEAVY = ("transformers", "datasets", "huggingface_hub", "peft", "scipy", "matplotlib", "triton")
LAYERS = ["kernels", "models", "engine", "recipes"]  # each may import those before it


def python(script, cwd):
    return subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("module", ["bivec", "bivec.kernels", "bivec.models"])
def test_imports_are_light(module, tmp_path):
    run = python(f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])", tmp_path)
    assert (run.stdout.strip(), run.returncode) == ("[]", 0), run.stderr


def test_the_version_is_there_without_torch(tmp_path):
    run = python("import sys, bivec; print(bivec.__version__, 'torch' in sys.modules)", tmp_path)
    assert run.stdout.split() == [bivec.__version__, "False"], run.stderr


def imported_layers(file):
    """Parts of bivec that a file imports anywhere, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = ("bivec", *file.relative_to(ROOT).parent.parts)
            package = inside[: len(inside) + 1 - node.level] if node.level else []
            module = [*package, *([node.module] if node.module else [])]
            names += [".".join([*module, alias.name]) for alias in node.names]
    return {parts[1] for name in names if (parts := name.split("."))[0] == "bivec" and len(parts) > 1}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_point_down_only(layer):
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    forbidden = {*LAYERS[LAYERS.index(layer) + 1 :], "recipes"}  # nothing imports recipes, recipes neither
    if layer != "recipes":
        forbidden.add("Encoder")  # bivec.Encoder is the engine's
    for file in files:
        assert not imported_layers(file) & forbidden, file


def test_the_root_on_the_path_does_no_harm():
    """transformers probes for a package named kernels: in the repository root it finds ours, and must decline it."""
    script = (
        "import sys, kernels\n"
        "print(kernels.__version__, *[n for n in sys.modules if n.split('.')[0] in ('bivec', 'kernels', 'torch')])"
    )
    run = python(script, ROOT)
    assert run.stdout.split() == ["0.0.0", "kernels"], run.stderr


def test_transformers_declines_our_folder():
    script = (
        "import bivec.kernels, transformers, sys\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "print(is_kernels_available(), [n for n in sys.modules if n.startswith('kernels.')])"
    )
    run = python(script, ROOT)
    assert run.stdout.strip() == "False []", run.stderr
