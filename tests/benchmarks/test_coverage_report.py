"""benchmarks/coverage_report.py: its ranges, its page, and a reason for every gap of the committed figures."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def coverage_report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "coverage_report", raising=False)
    import coverage_report

    yield coverage_report
    sys.modules.pop("coverage_report", None)


def test_ranges(coverage_report):
    assert coverage_report.ranges([3, 4, 5, 9, 11, 12]) == ["3-5", "9", "11-12"]
    assert coverage_report.ranges([]) == []


def test_every_gap_of_the_committed_figures_has_a_reason(coverage_report):
    content = json.loads((ROOT / "benchmarks" / "results" / "coverage.json").read_text(encoding="utf-8"))
    assert content["files"].keys() <= coverage_report.REASONS.keys()
    page = coverage_report.markdown(content)
    for name, reasons in coverage_report.REASONS.items():
        assert reasons and (ROOT / name).is_file(), name
        assert f"| {name} |" in page, f"{name} has no gap any more: take its reason out"


def test_a_gap_without_a_reason_is_an_error(coverage_report, monkeypatch, tmp_path, capsys):
    content = json.loads((ROOT / "benchmarks" / "results" / "coverage.json").read_text(encoding="utf-8"))
    content["files"]["engine/new.py"] = {"percent": 50.0, "lines": ["7"], "branches": []}
    monkeypatch.setattr(coverage_report, "measured", lambda: content)
    monkeypatch.setattr(coverage_report, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["coverage_report.py"])
    assert coverage_report.main() == 1
    assert "without a reason: engine/new.py" in capsys.readouterr().err
    assert "| engine/new.py | 50 % | 7 |  |" in (tmp_path / "coverage.md").read_text()
