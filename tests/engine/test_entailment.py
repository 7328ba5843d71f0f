"""Entailment data as triples: three layouts, one reading, and the command that writes them."""

from __future__ import annotations

import gzip
import json
import runpy
import sys
from pathlib import Path

import pytest

from bivec.engine.entailment import entailment_triples
from bivec.engine.errors import DataError
from bivec.engine.triples import Triple, load_triples

RECIPE = Path(__file__).parents[2] / "recipes" / "entailment_triples.py"
HEADER = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment"
PAIRS = [
    ("a", "b", "ENTAILMENT"),
    ("a", "c", "ENTAILMENT"),
    ("a", "d", "CONTRADICTION"),
    ("d", "e", "ENTAILMENT"),  # d is an anchor too: the contradiction holds both ways
    ("b", "f", "CONTRADICTION"),  # b entails nothing: no anchor, neither is f
    ("g", 'h "quoted', "ENTAILMENT"),  # no contradiction
    ("a", "g2", "NEUTRAL"),
]
TRIPLES = [Triple("a", "b", ("d",)), Triple("a", "c", ("d",)), Triple("d", "e", ("a",))]
LEFT = [Triple("g", 'h "quoted')]


def write_sick(path: Path, pairs, ending="\n") -> Path:
    lines = [HEADER, *(f"{i}\t{a}\t{b}\t3.5\t{label}" for i, (a, b, label) in enumerate(pairs))]
    path.write_bytes(ending.join([*lines, ""]).encode())
    return path


def write_snli(path: Path, pairs) -> Path:
    rows = [{"gold_label": c.lower(), "sentence1": a, "sentence2": b, "annotator_labels": []} for a, b, c in pairs]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_both_layouts_of_pairs_give_the_same(tmp_path):
    for path in (
        write_sick(tmp_path / "sick.txt", PAIRS),
        write_sick(tmp_path / "windows.tsv", PAIRS, "\r\n"),
        write_snli(tmp_path / "snli.jsonl", [*PAIRS, ("x", "y", "-")]),
        write_snli(tmp_path / "snli.jsonl.gz", PAIRS),
    ):
        assert entailment_triples([path]) == (TRIPLES, LEFT), path


def test_sentences_meet_across_files(tmp_path):
    first = write_sick(tmp_path / "one.txt", PAIRS[:2])
    second = write_snli(tmp_path / "two.jsonl", PAIRS[2:])
    assert entailment_triples([first, second]) == (TRIPLES, LEFT)
    assert entailment_triples([first]) == ([], [Triple("a", "b"), Triple("a", "c")])


def test_all_combinations_and_pairs_that_were_judged_twice(tmp_path):
    """Judged in both orders a contradiction counts twice: 692 anchors of SICK have 1,560 triples, not 1,320."""
    pairs = [("a", "b", "ENTAILMENT"), ("a", "c", "ENTAILMENT")]
    pairs += [("a", "d", "CONTRADICTION"), ("d", "a", "CONTRADICTION"), ("e", "a", "CONTRADICTION")]
    triples, left = entailment_triples([write_sick(tmp_path / "sick.txt", pairs)])
    assert triples == [Triple("a", positive, (negative,)) for positive in "bc" for negative in "dde"]
    assert left == []


def test_rows_of_simcse_are_triples_already(tmp_path):
    path = tmp_path / "nli.csv"
    path.write_text('hard_neg,sent0,sent1\n"no, never",a,b\n,a,c\nd,a,"e ""f"""\n')
    triples, left = entailment_triples([path])
    assert triples == [Triple("a", "b", ("no, never",)), Triple("a", 'e "f"', ("d",))]
    assert left == [Triple("a", "c")]


def test_blank_sentences_are_left_out(tmp_path):
    path = write_sick(tmp_path / "sick.txt", [*PAIRS, (" ", "b", "ENTAILMENT"), ("a", "", "CONTRADICTION")])
    with pytest.warns(UserWarning, match=r"sick.txt: left out 2 rows with a blank sentence"):
        assert entailment_triples([path]) == (TRIPLES, LEFT)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", f"{HEADER}\n1\ta\tb\t3\tENTAILMENT\n2\ta\tb\t3\tMAYBE\n", "line 3: the label is 'maybe'"),
        ("a.txt", f"{HEADER}\n1\ta\tb\tENTAILMENT\n", "line 2: 4 columns instead of 5"),
        ("a.csv", "premise,hypothesis,label\na,b,0\n", "line 2: has the columns premise, hypothesis, label; the first"),
        ("a.jsonl", '{"sentence1": "a", "sentence2": "b"}\n', "line 1: has the columns sentence1, sentence2;"),
        ("a.jsonl", '\n{"sentence1": "a", \n', "line 2: not JSON"),
        ("a.jsonl", "[]\n", "line 1: not a JSON object"),
        ("a.jsonl", '{"sentence1": "a", "sentence2": null, "gold_label": "neutral"}\n', "line 1: .* must be strings"),
        ("a.txt", f"{HEADER}\n1\ta\tb\t3\tNEUTRAL\n", "holds no pair of sentences that entail"),
        ("a.txt", "", "holds no pair of sentences that entail"),
        ("a.pdf", "", "is of a kind that is not read: give files of entailment data"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name},? ?:? ?{message}"):
        entailment_triples([tmp_path / name])


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *map(str, arguments)])
    runpy.run_path(str(RECIPE))["main"]()


@pytest.mark.parametrize("pairs", [False, True])
def test_the_command_writes_what_load_triples_reads(tmp_path, monkeypatch, capsys, pairs):
    source = write_sick(tmp_path / "sick.txt", [*PAIRS, ("Zürich", "北京", "ENTAILMENT")])
    output = tmp_path / "triples.jsonl"
    output.write_text("an older file")
    run(monkeypatch, source, "--output", output, *(["--pairs"] if pairs else []))
    [triples] = load_triples(output)
    assert list(triples) == (TRIPLES + LEFT + [Triple("Zürich", "北京")] if pairs else TRIPLES)
    assert "triples.jsonl: 2 anchors with 3 triples; 2 pairs without a negative" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["sick.txt", "triples.jsonl"]


def test_the_command_says_what_is_wrong_and_writes_nothing(tmp_path, monkeypatch, capsys):
    source = write_sick(tmp_path / "sick.txt", PAIRS[:2])
    bad = write_sick(tmp_path / "bad.txt", [("a", "b", "?")])
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for files, output, message in (
        ([source], tmp_path / "out.jsonl", "no sentence both entails and contradicts another; --pairs writes the 2"),
        ([bad], tmp_path / "out.jsonl", "bad.txt, line 2: the label is '?'"),
        ([tmp_path / "none.txt"], tmp_path / "out.jsonl", "none.txt is no file"),
        ([source], tmp_path / "no" / "out.jsonl", "does not exist"),
        ([source], source, "would overwrite what is read"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, *files, "--output", output)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
