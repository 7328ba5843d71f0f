"""The recipe of the word tasks, run as a user runs it."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bivec.engine.evaluation import word_probe

RECIPE = Path(__file__).parents[2] / "recipes" / "word_tasks.py"


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., SimpleNamespace]:
    """run(*arguments): exit status and output, in this process; the probes train for ten steps."""

    def run(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *map(str, arguments)])
        capsys.readouterr()
        try:
            runpy.run_path(str(RECIPE), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    short = {name: replace(preset, steps=10) for name, preset in word_probe.PRESETS.items()}
    monkeypatch.setattr(word_probe, "PRESETS", short)
    return run


def test_table_files_and_second_run(run, tmp_path, tiny_llama_dir):
    arguments = ["--model", tiny_llama_dir, "--output-dir", tmp_path, "--sentences", 30, "--seeds", 1]
    done = run(*arguments)
    assert done.code == 0, done.err
    table = (tmp_path / "words.md").read_text()
    assert done.out.endswith(table)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert [row[0] for row in rows[-2:]] == ["BERT-large (paper)", "DeBERTa-v3-large (paper)"]
    assert [row[:2] for row in rows[2:-2]] == [
        [model, at] for model in ("uni", "bi") for at in ("same token", "next token")
    ]
    assert rows[2][-3:] == ["86.10", "96.09", "90.89"]  # the paper's figures, in the row of its alignment
    assert rows[3][-3:] == ["", "", ""]
    content = json.loads((tmp_path / "words.json").read_text())
    assert {score["task"] for score in content["scores"]} == {"chunking", "ner", "pos"}
    assert content["read_at"] == {"uni": "same_token", "bi": "same_token"}
    assert content["data"]["wnut17"]["train"].startswith("30 sentences")
    features = {file: file.stat().st_mtime_ns for file in (tmp_path / "features").glob("*.npy")}
    assert len(features) == 2 * 2 * 2 * 2  # models, corpora, splits, alignments
    again = run(*arguments, "--variants", "bi", "--tasks", "ner", "--alignments", "same_token")
    assert again.code == 0, again.err
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "features").glob("*.npy")} == features
    (score,) = json.loads((tmp_path / "words.json").read_text())["scores"]
    assert score in content["scores"]


def test_errors_are_one_line(run, tmp_path, tiny_llama_dir):
    for arguments, says in (
        (["--tasks", "parsing"], "task 'parsing'"),
        (["--alignments", "last"], "--alignments 'last'"),
        (["--variants", "bi+mntp"], "no variant 'bi+mntp'"),
        (["--conll2003", tmp_path], "no train file of CoNLL-2003"),
    ):
        done = run("--model", tiny_llama_dir, "--output-dir", tmp_path, "--sentences", 2, *arguments)
        assert done.code == 2
        assert says in done.err and done.err.startswith("error: ") and done.err.count("\n") == 1
