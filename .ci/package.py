"""Builds wheel and sdist twice, and checks that they are the same bytes and hold what they should.

    python .ci/package.py EMPTY_FOLDER

Two clones of HEAD, made under different umasks, with files of different dates, are built at different times: the wheel
with ``pip wheel``, the sdist with setuptools' build backend, and a third wheel from the sdist. The wheel holds the
modules and data of the package, the sdist what git tracks. Of every file the SHA-256 is printed; wheel and sdist are
left in EMPTY_FOLDER.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = re.compile(
    r"(__init__\.py|py\.typed|(engine|kernels|models)/.*\.py|kernels/tuning/.*\.json|engine/evaluation/data/.*\.json)"
)
DATA = re.compile(r"recipes/data/.*(?<!\.py)")
LICENSES = {"licenses/LICENSE", "licenses/recipes/data/README.md"}
DIST_INFO = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", *LICENSES}
MADE = {"PKG-INFO", "setup.cfg"}  # by setuptools, beside the egg-info
YEAR = 365 * 24 * 3600
SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def main(folder: Path) -> None:
    """Builds all and compares.

    Raises:
        SystemExit: bytes differ, or a file is missing or too many; they are named.
    """
    folder = folder.resolve()
    python = tools(folder / "tools")
    built = []
    for number, umask in enumerate((0o022, 0o077)):
        clone = folder / f"clone{number}"
        before = os.umask(umask)
        try:
            cloned(clone, age=number * 3 * YEAR)
            target = folder / f"built{number}"
            target.mkdir()
            run(python, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", target, clone)
            run(python, "-c", SDIST, target, cwd=clone)
            built.append(target)
        finally:
            os.umask(before)
    wheel, sdist = (next(built[0].glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    from_sdist = folder / "from_sdist"
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", from_sdist, sdist)
    wrong = different(wheel, built[1] / wheel.name) + different(wheel, from_sdist / wheel.name)
    wrong += different(sdist, built[1] / sdist.name)
    tracked = run("git", "ls-files", cwd=folder / "clone0").split()
    wrong += [f"{wheel.name}: {line}" for line in unexpected(files_of_wheel(wheel), expected_in_wheel(wheel, tracked))]
    wrong += [f"{sdist.name}: {line}" for line in unexpected(files_of_sdist(sdist), tracked)]
    if wrong:
        sys.exit("\n".join(wrong))
    versions = run(python, "-c", "import setuptools, zlib; print(setuptools.__version__, zlib.ZLIB_RUNTIME_VERSION)")
    print("setuptools {}, zlib {}".format(*versions.split()))
    for file in (wheel, sdist):
        print(f"{sha256(file)}  {file.name}, built twice, {file.stat().st_size} bytes")
        shutil.copy(file, folder)


def tools(folder: Path) -> Path:
    """A Python that has pip and the setuptools which pyproject.toml asks for."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    requires = re.search(r'requires = \["(.*)"\]', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    run(python, "-m", "pip", "install", "-q", *requires[1].split('", "'))
    return python


def cloned(target: Path, age: int) -> None:
    """A clone of HEAD whose files are so many seconds older than they would be."""
    run("git", "clone", "-q", "--no-hardlinks", ROOT, target)
    for file in target.rglob("*"):
        if file.is_file() and ".git" not in file.relative_to(target).parts:
            past = file.stat().st_mtime - age
            os.utime(file, (past, past))


def different(one: Path, other: Path) -> list[str]:
    """What to say of two files that should be the same."""
    if one.read_bytes() == other.read_bytes():
        return []
    return [f"{one.name}: {one.parent.name} has {sha256(one)}, {other.parent.name} has {sha256(other)}"]


def sha256(file: Path) -> str:
    """Of a file's content, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def expected_in_wheel(wheel: Path, tracked: Iterable[str]) -> list[str]:
    """Modules and data under the package's name, and the dist-info."""
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    ours = [f"bivec/{file}" for file in tracked if PACKAGE.fullmatch(file) or DATA.fullmatch(file)]
    return ours + [f"{info}/{file}" for file in DIST_INFO]


def files_of_wheel(wheel: Path) -> list[str]:
    """Their names."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def files_of_sdist(sdist: Path) -> list[str]:
    """Without the top folder and what setuptools makes."""
    with tarfile.open(sdist) as archive:
        files = [member.name.partition("/")[2] for member in archive.getmembers() if not member.isdir()]
    return [file for file in files if file not in MADE and not file.startswith("bivec.egg-info/")]


def unexpected(found: list[str], expected: Iterable[str]) -> list[str]:
    """What is missing, too many or there twice."""
    expected = set(expected)
    wrong = [f"{file} is missing" for file in sorted(expected - set(found))]
    wrong += [f"{file} should not be there" for file in sorted(set(found) - expected)]
    return wrong + [f"{file} is there twice" for file in sorted({file for file in found if found.count(file) > 1})]


def run(*command: object, cwd: Path | None = None) -> str:
    """The command's output; what it says is shown where it fails."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/package.py EMPTY_FOLDER")
    main(Path(sys.argv[1]))
