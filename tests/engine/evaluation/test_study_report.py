"""The report of a study holds every table and plot that is there, says what is not, and counts the trends right."""

import re

import pytest

from bivec.engine.evaluation.parts import Part
from bivec.engine.evaluation.study_report import SECTIONS, study_report, study_trends, write_report
from bivec.engine.evaluation.trends import FAILS, HOLDS, MISSING

POOLED = {
    "uni": {"eos_token": 20.0, "mean": 40.0, "weighted_mean": 53.0},
    "bi": {"eos_token": 10.0, "mean": 19.0, "weighted_mean": 18.0},
    "bi+mntp": {"eos_token": 30.0, "mean": 65.0, "weighted_mean": 60.0},
    "bi+mntp+simcse": {"eos_token": 50.0, "mean": 70.0, "weighted_mean": 66.0},
    "uni+simcse": {"eos_token": 50.0, "mean": 60.0, "weighted_mean": 61.0},
    "bi+simcse": {"eos_token": 50.0, "mean": 75.0, "weighted_mean": 71.0},
    "echo": {"mean": 58.0},
}
WORDS = {
    "at their own tokens": {"pos": {"uni": 80.0, "bi": 78.0, "bi+mntp": 84.0, "bi+mntp+simcse": 83.0}},
    "to the left": {"pos": {"uni": 80.0, "bi": 78.0, "bi+mntp": 74.0, "bi+mntp+simcse": 73.0}},
}


def part(name, **data):
    return Part(name, {"table": f"the table of {name}", **data}, 90.0, reused=False)


@pytest.fixture
def parts():
    scores = [
        {"variant": variant, "pooling": pooling, "spearman": score}
        for variant, row in POOLED.items()
        for pooling, score in row.items()
    ]
    return {
        "pooling": part("pooling", scores=scores),
        "words": part("words", accuracy=WORDS),
        "prefixes": part("prefixes", auc={"uni": 50.0, "bi": 60.0, "bi+mntp": 55.0}),
        "masks": part("masks"),
    }


def test_the_trends_of_all_parts(parts):
    verdicts = {trend.claim: trend.verdict for trend in study_trends(parts)}
    assert verdicts["Bidirectional attention alone hurts a LLaMA-type decoder"] == HOLDS
    assert verdicts["MNTP alone beats the best causal pooling"] == HOLDS
    assert verdicts["Of the three that have SimCSE the one after MNTP is best"] == FAILS  # bi+simcse has 75
    assert verdicts["Echo beats the causal decoder it is made of, and LLM2Vec beats Echo"] == HOLDS
    assert verdicts["uni: the weighted mean is the best pooling"] == HOLDS
    assert verdicts["pos, at their own tokens: Bi < Uni < Bi+MNTP"] == HOLDS
    assert verdicts["pos, to the left: Bi < Uni < Bi+MNTP"] == FAILS
    assert verdicts["Words to the left: chunking gains most by MNTP over Uni"] == MISSING
    assert verdicts["MNTP makes that knowledge useful"] == FAILS
    assert study_trends({}) == []


def test_the_report(parts, tmp_path):
    (tmp_path / "pooling.png").write_bytes(b"")
    text = write_report(tmp_path, "a run", parts, ["One note.", "Another."]).read_text()
    trends = study_trends(parts)
    held, failed = (sum(trend.verdict == verdict for trend in trends) for verdict in (HOLDS, FAILS))
    assert f"Of {len(trends)} claims {held} hold and {failed} do not" in text
    assert text.count("| **holds** |") == held and text.count("| **does not hold** |") == failed
    assert text.count("This part was not run.") == len(SECTIONS) - len(parts)  # tasks and curves
    for name in parts:
        assert f"the table of {name}\n" in text
    assert re.findall(r"!\[.*\]\((.*)\)", text) == ["pooling.png"]
    assert "* One note.\n* Another.\n" in text and "| all | 6.0 |" in text
    assert study_report("a run", {}, [], []).count("This part was not run.") == len(SECTIONS)
