"""Every number of the READMEs and of benchmarks/results/*.md has a source: benchmarks/report.py knows it, or it fails.

To fix a failure, run ``python benchmarks/report.py``; what it cannot write it names, with what is missing.
"""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
CHANGED = 12  # numbers of each document, drawn once, that are changed one by one; of README.md all


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(BENCHMARKS))
    before = set(sys.modules)
    try:
        yield importlib.import_module("report")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARKS:
                del sys.modules[name]


@pytest.fixture(scope="module")
def texts(report):
    return importlib.import_module("report_text")


def documents() -> list[str]:
    own = ("benchmarks", "engine", "kernels", "models", "recipes", "tests")
    found = [*ROOT.glob("*.md"), *(file for folder in own for file in (ROOT / folder).rglob("README.md"))]
    found += (BENCHMARKS / "results").rglob("*.md")
    return sorted(file.relative_to(ROOT).as_posix() for file in found)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", documents())
def test_every_number_has_a_source_and_is_right(report, name):
    assert sorted(report.documents()) == documents()
    found = list(report.problems(name, text_of(name), report.claims_of(name)))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", documents())
def test_a_number_that_is_changed_is_seen(report, texts, name):
    """Of tables and text, one at a time; dates and versions of the results' machines are not figures."""
    text, claims = text_of(name), report.claims_of(name)
    found = texts.numbers(text, of_tables=True)
    if name != "README.md":
        found = random.Random(name).sample(found, min(CHANGED, len(found)))
    for one in found:
        last = max(i for i in range(one.start(), one.end()) if text[i].isalnum())
        other = str((int(text[last]) + 3) % 10) if text[last].isdigit() else "x"
        changed = f"{text[:last]}{other}{text[last + 1 :]}"
        assert next(report.problems(name, changed, claims), None), f"{one[0]!r} at {one.start()} of {name}"


@pytest.mark.parametrize(
    "sentence",
    [
        "It is 7 % faster.",
        "It takes 3.5 minutes.",
        "Now 1,234 tokens/s.",
        "It takes five minutes.",
        "It is twice as fast.",
        "* 1e-3 off\n",
    ],
)
def test_a_number_without_a_source_is_seen(report, sentence):
    name, text = "README.md", text_of("README.md")
    for place in (len(text), text.index("## Limits"), text.index("## How it works")):
        changed = f"{text[:place]}\n{sentence}\n\n{text[place:]}"
        number = re.search(r"[\d.,]+(?:e-\d)?|five minutes|twice as", sentence)[0].strip(".")
        found = [one for one in report.problems(name, changed, report.claims_of(name)) if "no source" in one]
        assert len(found) == 1 and repr(number) in found[0]


def test_a_declared_text_that_is_gone_is_seen(report):
    changed = text_of("README.md").replace("within 0.02 % over 20 steps", "about")
    assert any("agree within" in one for one in report.problems("README.md", changed, report.claims_of("README.md")))


def test_claims_that_contradict_each_other_are_seen(report, texts, monkeypatch):
    """Of two texts that match in one place neither may win: the document stays as it is, and the check says why."""
    text = "It took 1.5 minutes before lunch and 2.5 minutes before dinner.\n"
    claims = [
        texts.measured("source", "took {:.1f} minutes before lunch", 1.5),
        texts.measured("source", "{:.1f} minutes before dinner", 2.5),
    ]
    assert list(texts.contradictions(text, claims)) == []
    assert texts.updated(text.replace("2.5", "9.9"), {}, claims) == text
    claims.append(texts.measured("source", "{:.1f} minutes before", 3.5))
    said = "by 'took {:.1f} minutes before lunch', 3.5 by '{:.1f} minutes before'"
    assert next(texts.contradictions(text, claims)) == (1, f"1.5 {said}")
    assert texts.updated(text, {}, claims) == text
    signed = [
        texts.measured("source", "it by {:+.1f} a day", 1.5),
        texts.measured("source", "by +{:.1f} a day or", 2.5),
    ]
    assert next(texts.contradictions("It moved it by +1.5 a day or so.", signed))[1].startswith("+1.5 by")
    monkeypatch.setattr(report, "WHOLE", {})
    found = [one for one in report.problems("README.md", text, claims) if "two claims for one figure" in one]
    assert len(found) == 2 and found[0].startswith("README.md:1: ")


def test_every_table_stands_somewhere_and_every_declaration_belongs_to_a_document(report, texts):
    text = "\n".join(map(text_of, report.documents()))
    markers = re.findall(r"<!-- table: (.*?) -->", text)
    assert sorted(markers) == sorted(report.TABLES)
    assert len(texts.TABLE.findall(text)) == len(markers) == text.count("<!-- end -->")
    assert set(report.CLAIMS) | set(report.RESULT_CLAIMS) | set(report.WHOLE) <= set(report.documents())


def test_settings_are_told_apart_from_figures(report, texts):
    """A declared text is long enough to be found in one meaning, has a number, and says why it needs no source."""
    for name in report.documents():
        for claim in report.claims_of(name):
            assert len(claim.text) >= 6 and len(claim.source) >= 5, claim
            assert claim.figures or re.search(r"\d", claim.text) or texts.SPELLED.search(claim.text), claim


def test_what_is_wrong_is_written_again(report, tmp_path, monkeypatch, capsys):
    text = text_of("README.md")
    wrong = (
        text.replace("| 166 tokens/s", "| 999 tokens/s")
        .replace("64.6 ± 3.3", "64.9 ± 3.3")
        .replace("20 steps", "21 steps", 1)
    )
    (tmp_path / "README.md").write_text(wrong, encoding="utf-8")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "documents", lambda: ["README.md"])
    assert report.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert said.count("differs from its source") == 3 and "999 tokens/s" in said
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == wrong
    assert report.main([]) == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text
    assert report.main(["--check"]) == 0


def test_the_headline_is_of_the_long_run_and_the_quick_start_mean_and_deviation_of_three_seeds():
    """By hand, beside the functions that write them."""
    long, short = (json.loads(text_of(f"benchmarks/results/{name}.json")) for name in ("long_run", "quick_start"))
    rows = [line for line in text_of("README.md").splitlines() if line.startswith("| **+ SimCSE**")]
    headline, quick = ([cell.strip("* ") for cell in row.strip("| ").split(" | ")[2:]] for row in rows)
    stage = next(one for one in long["stages"] if one["stage"] == "bi+mntp+simcse")
    assert len(short["runs"]) == 3
    for split, one, three in zip(("dev", "test"), headline, quick, strict=True):
        assert one == f"{stage[f'sts_{split}_spearman']:.1f}"
        found = [run["stages"][-1][f"sts_{split}_spearman"] for run in short["runs"]]
        assert three == f"{mean(found):.1f} ± {stdev(found):.1f}"
