"""CONTRIBUTING.md, followed: its files are put into a copy of the package, and its tests and its command are run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
FOLDERS = ("kernels", "models", "engine", "recipes", "tests")
FAMILY = "hunyuan_v1_dense"
PYTEST = (sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main())", "-q", "-p", "no:cacheprovider")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package of a contributor: ours by symbolic links, and the files of the page."""
    package = tmp_path_factory.mktemp("contributor") / "bivec"
    package.mkdir()
    (package / "__init__.py").symlink_to(ROOT / "__init__.py")
    for file in (file for folder in FOLDERS for file in (ROOT / folder).rglob("*")):
        if file.is_file() and file.suffix != ".pyc":
            link = package / file.relative_to(ROOT)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    for name, text in FILES.items():
        (package / name).write_text(text, encoding="utf-8")
    conftest = package / "tests" / "conftest.py"
    (row,) = re.findall(rf'`("{FAMILY}": .*?,)`', PAGE)
    text = conftest.read_text(encoding="utf-8").replace("\nFAMILIES = {\n", f"\nFAMILIES = {{\n    {row}\n")
    assert row in text
    conftest.unlink()  # the link
    conftest.write_text(text, encoding="utf-8")
    return package


def run(copy, *command, search="PYTHONPATH"):
    """Runs a command as from a fresh checkout, and gives what it printed."""
    environment = {**os.environ, search: str(copy.parent), "BIVEC_CACHE": str(copy.parent / "cache")}
    environment["MYPY_CACHE_DIR"] = str(copy.parent / "cache")
    environment.pop("TRITON_INTERPRET", None)  # the interpreter cannot compile; tests/conftest.py sets it for tests
    finished = subprocess.run(command, env=environment, cwd=copy.parent, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_one_file_makes_a_model_and_one_a_kernel():
    assert [name for name in FILES if not name.startswith("tests/")] == ["models/hunyuan.py", "kernels/relu_squared.py"]
    assert all(not (ROOT / name).exists() for name in FILES)


def test_files_are_as_the_linter_wants_them():
    for name, text in FILES.items():
        for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
            ruff = [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml")]
            done = subprocess.run(
                [*ruff, "--stdin-filename", str(ROOT / name), "-"], input=text, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("test", [name for name in FILES if name.startswith("tests/")])
def test_the_tests_of_the_page_pass(copy, test):
    printed = run(copy, *PYTEST, "--import-mode=importlib", f"--rootdir={copy}", f"{copy / test}")
    assert re.search(r"^\d+ passed", printed, re.MULTILINE)


def test_the_tests_of_all_families_take_the_model_in(copy):
    """By the command of the page, with no change beside its row in tests/conftest.py."""
    (command,) = re.findall(rf"`pytest (tests/\S+(?: tests/\S+)*) -k {FAMILY}`", PAGE)
    folders = [str(copy / folder) for folder in command.split()]
    printed = run(copy, *PYTEST, "--import-mode=importlib", f"--rootdir={copy}", *folders, "-k", FAMILY)
    passed = re.search(r"^(\d+) passed", printed, re.MULTILINE)
    assert passed and int(passed[1]) >= 40, printed


def test_the_types_are_right(copy):
    """mypy as .ci/types runs it, on the two files."""
    modules = [name.removesuffix(".py").replace("/", ".") for name in FILES if not name.startswith("tests/")]
    options = ["--config-file", str(ROOT / "pyproject.toml"), *(f"-mbivec.{module}" for module in modules)]
    printed = run(copy, sys.executable, "-m", "mypy", *options, search="MYPYPATH")
    assert printed.startswith("Success: no issues found in 2 source files"), printed


def test_the_kernel_is_compiled_ahead_of_time(copy):
    (command,) = re.findall(r"^python -m bivec\.kernels\.aot .*$", PAGE, re.MULTILINE)
    printed = run(copy, sys.executable, *shlex.split(command)[1:])
    assert re.search(r"^6 kernels of 3 cases: 0 failed, 6 compiled", printed, re.MULTILINE), printed
