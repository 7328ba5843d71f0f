"""benchmarks/report_text.py: which numbers of a document need a source, and what a claim finds and writes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("report_text")
    sys.modules.pop("report_text", None)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("85.0 ± 0.9 of 1,379 pairs", ["85.0", "0.9", "1,379"]),
        ("off by 2e-4, 1 to 3 %, +2.5 … -0.5", ["2e-4", "1", "3", "2.5", "0.5"]),
        ("in 97.5k words, 7B, 2D, .75", ["97.5", "7", "2", "75"]),
        ("SmolLM2-135M in bf16 on sm_90, F1, WNUT-17, H100, fp32", []),
        ("`--steps 40`, [link 5](a/7.md), (#12, #345), <https://x.y/3>", ["5"]),
        ("see Table 4, Figure 5, METHOD 3.6, Appendix D.1.3 and command 1", []),
        ("on 2026-11-28 with torch 2.13.0 at commit 8551b69", []),
        ("1. first\n**2. second:** 3 steps", ["3"]),
        ("```python\nx = 3  # 4 s\n```\n```bash\nrun 5  # 6 s\n# 7 s\n```\n", ["6", "7"]),
        ("nine minutes, a quarter of an hour, two cores, twice, three of them", ["nine minutes", "a quarter of"]),
        ("<!-- table: a -->\n| 5 |\n<!-- end -->\n6", ["6"]),
    ],
)
def test_numbers_of_the_prose(parts, text, numbers):
    assert [found[0] for found in parts.numbers(text)] == numbers


def test_numbers_of_tables(parts):
    text = "<!-- table: a -->\n| 5 |\n<!-- end -->\n6"
    assert [found[0] for found in parts.numbers(text, of_tables=True)] == ["5", "6"]


def test_figures_are_written_over_line_breaks_and_nothing_else_is(parts):
    claims = [parts.measured("x.json", "takes {:.1f} minutes for {:,} texts", 3.14159, 12345)]
    text = "It takes 9.9 minutes\n  for 1 texts, and 9.9 minutes."
    assert parts.updated(text, {}, claims) == "It takes 3.1 minutes\n  for 12,345 texts, and 9.9 minutes."
    assert [line for line, _ in parts.undeclared(text, claims)] == [2]
    assert not list(parts.missing(text, claims))


def test_a_signed_figure(parts):
    claims = [parts.measured("x.json", "from {:+.1f} to {:.0e}", 0.25, 0.00123)]
    assert parts.updated("from -2.5 to 7e-05", {}, claims) == "from +0.2 to 1e-03"


@pytest.mark.parametrize("text", ["140 steps", "40 steps2", "1.40 steps", "41 steps", "40 step"])
def test_a_setting_is_found_whole_only(parts, text):
    claims = parts.given("a setting", "40 steps")
    assert list(parts.missing(text, claims)) == claims
    assert list(parts.undeclared(text, claims))
    assert not list(parts.undeclared("of 40\nsteps, 40 steps.", claims))


def test_a_setting_with_braces(parts):
    claims = parts.given("a formula", "{1, 2} of 3")
    assert not list(parts.undeclared("{1, 2} of 3", claims))


def test_tables_are_made_again_and_unknown_ones_refused(parts):
    text = "a\n<!-- table: t -->\n| old |\n<!-- end -->\nb"
    made = parts.table(["x", "y"], [["1", None], [None, "2"]])
    assert made == "| x | y |\n|---|---|\n| 1 | |\n| | 2 |"
    assert parts.updated(text, {"t": lambda: made}, []) == f"a\n<!-- table: t -->\n{made}\n<!-- end -->\nb"
    with pytest.raises(KeyError, match="t"):
        parts.updated(text, {}, [])
    with pytest.raises(ValueError, match="1 cells under 2 columns"):
        parts.table(["x", "y"], [["1"]])


def test_a_claim_needs_a_value_for_every_field(parts):
    with pytest.raises(ValueError, match="argument"):
        parts.updated("1 and 2", {}, [parts.measured("x.json", "{} and {}", 1)])
