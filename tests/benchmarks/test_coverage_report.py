"""benchmarks/coverage_report.py: its ranges, where a line belongs, its page, and a reason for every committed gap."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = """import os


class Reader:
    def read(self):
        def line():
            return 1

        return line()

    @property
    def name(self):
        return "reader"


async def later():
    pass
"""


@pytest.fixture
def coverage_report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "coverage_report", raising=False)
    import coverage_report

    yield coverage_report
    sys.modules.pop("coverage_report", None)


@pytest.fixture
def content():
    return json.loads((ROOT / "benchmarks" / "results" / "coverage.json").read_text(encoding="utf-8"))


def test_ranges(coverage_report):
    assert coverage_report.ranges([3, 4, 5, 9, 11, 12]) == ["3-5", "9", "11-12"]
    assert coverage_report.ranges([]) == []


def test_gaps_are_named_by_the_innermost_function(coverage_report):
    found = coverage_report.gaps_by_function(SOURCE, [1, 6, 7, 9, 13, 17], [[9, -5], [5, 6], [11, 13], [16, -16]])
    assert found == {
        "": {"lines": ["1"], "branches": []},
        "Reader.read.line": {"lines": ["6-7"], "branches": []},
        "Reader.read": {
            "lines": ["9"],
            "branches": [],
        },  # its branch to such a line says no more
        "Reader.name": {"lines": ["13"], "branches": []},
        "later": {"lines": ["17"], "branches": ["16->exit"]},
    }


def test_every_gap_of_the_committed_figures_has_a_reason_and_no_other(coverage_report, content):
    gaps = {name: set(one["gaps"]) for name, one in content["files"].items()}
    known = coverage_report.reasons()
    assert {name: set(of_file) for name, of_file in known.items()} == gaps
    assert all(reason for of_file in known.values() for reason in of_file.values())


def test_a_gap_without_a_reason_is_an_error(coverage_report, content, monkeypatch, tmp_path, capsys):
    content["files"]["engine/new.py"] = {"percent": 50.0, "gaps": {"read": {"lines": ["7"], "branches": ["8->exit"]}}}
    monkeypatch.setattr(coverage_report, "measured", lambda: content)
    monkeypatch.setattr(coverage_report, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["coverage_report.py"])
    assert coverage_report.main() == 1
    assert capsys.readouterr().err == "without a reason: engine/new.py: read\n"
    assert "| engine/new.py | 50 % | `read` | 7, 8->exit |  |" in (tmp_path / "coverage.md").read_text()
    del content["files"]["engine/new.py"]
    assert coverage_report.main() == 0
