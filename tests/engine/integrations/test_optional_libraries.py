"""The libraries of engine/integrations are optional: nothing imports one but the module that is named after it."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
LIBRARIES = {
    "transformers",
    "sentence_transformers",
    "lightning",
    "pytorch_lightning",
    "peft",
    "accelerate",
    "datasets",
}


def imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_kernels_know_none_of_these_libraries():
    files = sorted((ROOT / "kernels").rglob("*.py"))
    assert len(files) > 20
    assert {file.name: LIBRARIES & set(imported(file)) for file in files} == {file.name: set() for file in files}


def test_each_module_loads_its_own_library_alone():
    script = (
        "import sys, bivec.engine.integrations, bivec.kernels\n"
        f"print(sorted({LIBRARIES} & set(sys.modules)))\n"
        "import bivec.engine.integrations.transformers\n"
        "print('sentence_transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.split("\n")[:2] == ["[]", "False"], result.stderr
