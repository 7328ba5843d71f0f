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


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package of a contributor: ours by symbolic links, and the files of the page."""
    package = tmp_path_factory.mktemp("contributor") / "bivec"
    package.mkdir()
    (package / "__init__.py").symlink_to(ROOT / "__init__.py")
    for file in (file for folder in ("kernels", "models", "engine", "tests") for file in (ROOT / folder).rglob("*")):
        if file.is_file() and file.suffix != ".pyc":
            link = package / file.relative_to(ROOT)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    for name, text in FILES.items():
        (package / name).write_text(text, encoding="utf-8")
    return package


def run(copy, *command):
    """Runs a command as from a fresh checkout, and gives what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(copy.parent), "BIVEC_CACHE": str(copy.parent / "cache")}
    if "pytest" not in command:
        environment.pop("TRITON_INTERPRET", None)  # the interpreter cannot compile
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
    pytest_options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={copy}"]
    printed = run(
        copy, sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main())", *pytest_options, f"{copy / test}"
    )
    assert re.search(r"^\d+ passed", printed, re.MULTILINE)


def test_the_kernel_is_compiled_ahead_of_time(copy):
    (command,) = re.findall(r"^python -m bivec\.kernels\.aot .*$", PAGE, re.MULTILINE)
    printed = run(copy, sys.executable, *shlex.split(command)[1:])
    assert re.search(r"^6 kernels of 3 cases: 0 failed, 6 compiled", printed, re.MULTILINE), printed
