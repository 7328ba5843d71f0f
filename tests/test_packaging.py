"""Packaging: tested bounds, one version, a citation that holds, archives of the same bytes, the audit."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import bivec

USAGE = """usage: pip-audit [-h] [-V] [-l] [-r REQUIREMENT] [-s SERVICE] [--timeout TIMEOUT] [--require-hashes]
pip-audit: error: unrecognized arguments: --no-such-option
"""  # "timeout" and "resolve" are words of its usage

ROOT = Path(__file__).parents[1]
FAKE = """#!{python}
import sys
sys.stderr.write({said!r})
sys.stdout.write({printed!r})
sys.exit({code})
"""


@pytest.fixture(scope="module")
def setup():
    """The names of setup.py, and under "given" what it hands to setuptools."""
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        names = runpy.run_path(str(ROOT / "setup.py"))
    return names | {"given": given}


def script_of_ci(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def audit():
    """.ci/audit.py as a module."""
    return script_of_ci("audit")


def requirements(setup):
    given = setup["given"]
    lines = [*given["install_requires"], *(line for extra in given["extras_require"].values() for line in extra)]
    return [Requirement(line) for line in lines]


def pins():
    lines = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    return {name: Version(version) for name, _, version in (line.partition("==") for line in lines if "==" in line)}


def test_every_lower_bound_is_pinned_for_ci(setup):
    bounds = {}
    for one in requirements(setup):
        (lower,) = [part.version for part in one.specifier if part.operator == ">="]
        assert bounds.setdefault(one.name, Version(lower)) == Version(lower), f"{one.name} has two bounds"
    assert pins() == bounds


def test_there_are_no_upper_bounds(setup):
    operators = {part.operator for one in requirements(setup) for part in one.specifier}
    assert operators <= {">=", "!="}


def test_all_holds_every_extra(setup):
    extras = setup["given"]["extras_require"]
    assert set(extras["all"]) == {line for extra in extras.values() for line in extra}


def test_version_changelog_and_citation_agree(setup):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## \[(.+?)\] - (unreleased|\d{4}-\d{2}-\d{2})$", changelog, flags=re.MULTILINE)[0]
    assert setup["given"]["version"] == bivec.__version__ == citation["version"] == newest[0]
    assert citation.get("date-released", "unreleased") == newest[1]  # of the same day, or of none
    sections = re.findall(r"^### (.+)$", changelog, flags=re.MULTILINE)
    assert sections and set(sections) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_is_a_cff_1_2_file(setup):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}  # what the schema asks for
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["license"] == setup["given"]["license_expression"].partition(" AND ")[0] == "Apache-2.0"
    known = {"abstract", "keywords", "version", "references", "date-released", "license", "type"}
    known |= {"repository-code", "url", "doi"}
    assert citation.keys() <= known | {"cff-version", "message", "title", "authors"}
    (paper,) = citation["references"]
    assert paper.keys() >= {"type", "title", "authors"} and paper["year"] == 2024
    assert [one["value"] for one in paper["identifiers"]] == ["arXiv:2404.05961"]
    people = [author.keys() for author in (*citation["authors"], *paper["authors"])]
    assert all(keys == {"name"} or keys == {"family-names", "given-names"} for keys in people)
    assert len(paper["authors"]) == 6


def test_the_licences_are_those_of_code_and_samples(setup):
    licenses = pytest.importorskip("packaging.licenses", reason="packaging before 24.2 knows no SPDX")
    given = setup["given"]
    expression, files = given["license_expression"], given["license_files"]
    assert licenses.canonicalize_license_expression(expression) == expression
    samples = (ROOT / "recipes" / "data" / "README.md").read_text(encoding="utf-8")
    stated = re.findall(r"Licence: \[(CC BY[^\]]*)\]", samples)
    assert len(stated) == 4
    assert expression.split(" AND ") == ["Apache-2.0", *dict.fromkeys(one.replace(" ", "-") for one in stated)]
    assert files == ["LICENSE", "recipes/data/README.md"] and all((ROOT / file).is_file() for file in files)
    assert {f"licenses/{file}" for file in files} == script_of_ci("package").LICENSES


def test_the_metadata_holds_no_links_into_the_repository(setup):
    text = setup["given"]["long_description"]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)]*)\)", prose)
    assert all(target.startswith("https://") for target in targets), targets
    assert text.count("```") == (ROOT / "README.md").read_text(encoding="utf-8").count("```")
    assert "`Encoder.from_pretrained(base, adapters=[mntp, simcse])`" in text  # brackets of code are none of a link


def written_wheel(path, year, mode):
    with zipfile.ZipFile(path, "w") as wheel:
        for name in ("bivec/b.py", "bivec/a.py", "bivec-1.dist-info/RECORD"):
            entry = zipfile.ZipInfo(name, (year, 5, 6, 7, 8, 10))
            entry.external_attr = mode << 16
            wheel.writestr(entry, name * 50)
    return path


def written_sdist(path, names, mtime, mode, owner):
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.mtime, member.mode, member.uname, member.uid = mtime, mode, owner, len(owner)
            if name.endswith(".py"):
                member.size = len(name)
                archive.addfile(member, io.BytesIO(name.encode()))
            else:
                member.type = tarfile.DIRTYPE
                archive.addfile(member)
    return path


def test_wheels_of_the_same_files_become_the_same_bytes(setup, tmp_path, monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    one = written_wheel(tmp_path / "one.whl", 2001, 0o100600)
    other = written_wheel(tmp_path / "other.whl", 2020, 0o100755)
    assert one.read_bytes() != other.read_bytes()
    for path in (one, other):
        setup["settle_wheel"](path)
    assert one.read_bytes() == other.read_bytes()
    with zipfile.ZipFile(one) as wheel:
        assert wheel.namelist() == ["bivec/b.py", "bivec/a.py", "bivec-1.dist-info/RECORD"]
        assert all(wheel.read(name) == name.encode() * 50 for name in wheel.namelist())
        assert {entry.external_attr >> 16 for entry in wheel.infolist()} == {0o100644}
        assert {entry.date_time for entry in wheel.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_sdists_of_the_same_files_become_the_same_bytes(setup, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    names = ["bivec-1", "bivec-1/a.py", "bivec-1/engine", "bivec-1/engine/b.py"]
    one = written_sdist(tmp_path / "one.tar.gz", names, 10**9, 0o644, "me")
    other = written_sdist(tmp_path / "other.tar.gz", names[::-1], 10**9 + 5, 0o600, "somebody")
    for path in (one, other):
        setup["settle_sdist"](path)
    assert one.read_bytes() == other.read_bytes()
    assert gzip.decompress(one.read_bytes())
    with tarfile.open(one) as archive:
        assert archive.getnames() == names
        assert [member.isdir() for member in archive] == [True, False, True, False]
        assert archive.extractfile("bivec-1/engine/b.py").read() == b"bivec-1/engine/b.py"
        assert {member.mtime for member in archive} == {1700000000}
        assert {(member.uid, member.uname) for member in archive} == {(0, "")}


def test_setup_is_no_module_of_the_package(setup):
    # pip builds from a script of its own, so that distutils does not know setup.py for the script that it leaves out
    distribution = setuptools.Distribution({"packages": ["bivec"], "package_dir": {"bivec": "."}, "script_name": "-"})
    command = setup["BuildPy"](distribution)
    command.finalize_options()
    files = [module[1] for module in command.find_package_modules("bivec", str(ROOT))]
    assert files == ["__init__"]


def test_what_does_not_belong_into_an_archive_is_named():
    package = script_of_ci("package")
    tracked = ["engine/run.py", "engine/README.md", "recipes/data/a.gz", "recipes/data/build.py", "tests/test_a.py"]
    expected = package.expected_in_wheel(Path("bivec-0.1.0-py3-none-any.whl"), tracked)
    ours = [file for file in expected if ".dist-info/" not in file]
    assert ours == ["bivec/engine/run.py", "bivec/recipes/data/a.gz"]
    assert "bivec-0.1.0.dist-info/licenses/LICENSE" in expected
    found = [*expected[1:], "bivec/setup.py", "bivec/tests/test_a.py", expected[1]]
    assert package.unexpected(found, expected) == [
        "bivec/engine/run.py is missing",
        "bivec/setup.py should not be there",
        "bivec/tests/test_a.py should not be there",
        "bivec/recipes/data/a.gz is there twice",
    ]
    assert package.unexpected(expected, expected) == []


def test_archives_that_differ_are_named(tmp_path):
    package = script_of_ci("package")
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.whl").write_text(name, encoding="utf-8")
    one, other = tmp_path / "one" / "a.whl", tmp_path / "other" / "a.whl"
    assert package.different(one, one) == []
    (line,) = package.different(one, other)
    assert package.sha256(one) in line and package.sha256(other) in line


def audited(monkeypatch, tmp_path, capsys, audit, said="", printed="", code=0):
    """The exit code, and what is printed, with a pip-audit that says so."""
    command = tmp_path / "pip-audit"
    command.write_text(FAKE.format(python=sys.executable, said=said, printed=printed, code=code), encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = audit.main("all")
    return result, capsys.readouterr()


def answer(*dependencies):
    return json.dumps({"dependencies": list(dependencies), "fixes": []})


CLEAN = {"name": "numpy", "version": "2.0.0", "vulns": []}
BAD = {
    "name": "torch",
    "version": "2.11.0",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-2026-1"], "fix_versions": ["2.12.0"], "description": "…"}],
}


@pytest.fixture
def two_packages(monkeypatch, audit):
    monkeypatch.setattr(audit, "closure", lambda package, extra: {"numpy": "2.0.0", "torch": "2.11.0"})


@pytest.mark.usefixtures("two_packages")
def test_a_known_vulnerability_fails_the_audit(monkeypatch, tmp_path, capsys, audit):
    code, shown = audited(monkeypatch, tmp_path, capsys, audit, printed=answer(CLEAN, BAD), code=1)
    assert code == 1
    assert shown.err.strip() == "torch 2.11.0: CVE-2026-1/PYSEC-1, fixed in 2.12.0"


@pytest.mark.usefixtures("two_packages")
def test_one_that_is_ignored_with_a_reason_does_not(monkeypatch, tmp_path, capsys, audit):
    monkeypatch.setitem(audit.IGNORED, "CVE-2026-1", "bivec never loads pickles")
    code, shown = audited(monkeypatch, tmp_path, capsys, audit, printed=answer(CLEAN, BAD), code=1)
    assert (code, shown.err) == (0, "")
    assert "CVE-2026-1: ignored, bivec never loads pickles" in shown.out
    assert "2 of 2 packages audited" in shown.out


@pytest.mark.usefixtures("two_packages")
def test_without_a_network_the_audit_says_so_and_goes_on(monkeypatch, tmp_path, capsys, audit):
    said = "ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed"
    code, shown = audited(monkeypatch, tmp_path, capsys, audit, said=said, code=1)
    assert code == 0
    assert "could not be reached: nothing was audited" in shown.out and said in shown.out


@pytest.mark.usefixtures("two_packages")
def test_a_database_that_knows_nothing_is_no_clean_bill(monkeypatch, tmp_path, capsys, audit):
    lost = [{"name": name, "skip_reason": "not found"} for name in ("numpy", "torch")]
    code, shown = audited(monkeypatch, tmp_path, capsys, audit, printed=answer(*lost))
    assert code == 0
    assert "not audited: 2 packages, numpy, torch" in shown.out and shown.out.endswith("nothing was audited\n")
    assert "no known vulnerability" not in shown.out


@pytest.mark.usefixtures("two_packages")
def test_another_failure_of_the_audit_is_one(monkeypatch, tmp_path, capsys, audit):
    code, shown = audited(monkeypatch, tmp_path, capsys, audit, said=USAGE, code=2)
    assert code == 1
    assert "unrecognized arguments" in shown.err


def test_without_bivec_there_is_nothing_to_audit(monkeypatch, capsys, audit):
    monkeypatch.setattr(audit, "closure", lambda *_: {})
    assert audit.main("all") == 1
    assert "bivec is not installed" in capsys.readouterr().err


def test_no_pip_audit_is_said(monkeypatch, tmp_path, capsys, audit):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert audit.main("all") == 1
    assert "pip-audit is not installed: nothing was audited" in capsys.readouterr().err


def test_the_audit_follows_requirements_of_requirements(audit):
    found = audit.closure("transformers", "torch")
    assert found.keys() >= {"torch", "safetensors", "mpmath"} and "transformers" not in found  # torch, sympy, mpmath
    assert "+" not in found["torch"] and found["safetensors"] == metadata.version("safetensors")
    assert "torch" not in audit.closure("transformers", "")


def test_the_pythons_script_names_those_that_setup_promises(setup):
    script = (ROOT / ".ci" / "pythons").read_text(encoding="utf-8")
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(setup["given"]["classifiers"]))
    assert f"for version in {' '.join(promised)}; do" in script
    assert setup["given"]["python_requires"] == f">={promised[0]}"


def test_every_package_of_the_clone_is_in_the_wheel(setup):
    tracked = subprocess.run(
        ["git", "ls-files", "*__init__.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    packages = {".".join(("bivec", *Path(file).parent.parts)) for file in tracked}
    assert packages == set(setup["given"]["packages"])


@pytest.mark.parametrize(
    ("file", "start", "end"),
    [("README.md", "(.ci/oldest.txt):", "All tests run"), ("CHANGELOG.md", "* Higher lower bounds", "###")],
)
def test_the_oldest_versions_in_prose_are_those_of_the_pins(file, start, end):
    text = (ROOT / file).read_text(encoding="utf-8").partition(start)[2].partition(end)[0]
    text = re.sub(r"\([^)]*\)", "", text)  # remarks on other versions
    found = re.findall(r"([a-z][\w-]*)\s+(\d+(?:\.\d+)+)", text)
    assert len(found) >= 6
    pinned = pins()
    wrong = [f"{name} {version}" for name, version in found if Version(version) != pinned[name]]
    assert wrong == []


def test_the_mutants_of_the_security_page_are_those_that_were_run():
    stated = re.search(r"([\d,]+) mutants", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))[1]
    figures = (ROOT / "benchmarks" / "results" / "fuzz.md").read_text(encoding="utf-8")
    total = re.search(r"^\| all \| (\d+) \|", figures, flags=re.MULTILINE)[1]
    assert stated.replace(",", "") == total


def test_every_script_of_ci_is_there_and_can_be_run():
    """What git does not track is not in CI's clone, where this test runs."""
    named = {}
    for document in (".ci/run", "README.md", "CONTRIBUTING.md", "SECURITY.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for before, name in re.findall(r"(python |bash |-c )?(\.ci/[\w.]*\w)", text):
            named[name] = named.get(name, False) or (document == ".ci/run" and not before)
    assert {".ci/run", ".ci/types", ".ci/oldest.txt", ".ci/audit.py"} <= named.keys()
    for name, called in named.items():
        assert (ROOT / name).is_file(), name
        assert not called or os.access(ROOT / name, os.X_OK), f"{name} cannot be executed"
