"""recipes/analyse.py on a run of a tiny model: every analysis leaves its data, table and figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bivec.engine.evaluation.future_tokens import load_future_triples

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(recipe, execute, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    execute(recipe, directory, "--stages", "bi,mntp,simcse")
    return directory


def analyse(folder, *flags):
    command = [sys.executable, str(ROOT / "recipes" / "analyse.py"), "--output-dir", str(folder), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_all_analyses_of_a_run(run, tmp_path):
    names = ("future-tokens", "similarity", "pooling", "curves")
    done = analyse(tmp_path / "new" / "out", "--model", run, "--only", ",".join(names), "--pairs", "20")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "new" / "out"
    assert {file.name for file in folder.iterdir()} == {f"{n}.{kind}" for n in names for kind in ("json", "md", "png")}
    for name in names:
        assert (folder / f"{name}.md").read_text().strip() in done.stdout
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    states = ["uni", "bi", "bi+mntp", "bi+mntp+simcse"]
    assert [one["variant"] for one in found["future-tokens"]] == ["uni", "echo", *states[1:]]
    assert found["future-tokens"][0]["auc"] == 0.5
    triples = load_future_triples(ROOT / "recipes" / "data" / "future_token_triples.jsonl")
    assert all(len(one["positive"]) + one["skipped"] == len(triples) for one in found["future-tokens"])
    paragraphs, sentences = found["similarity"]
    assert (len(paragraphs["texts"]), len(sentences["texts"]), len(paragraphs["by_layer"])) == (5, 50, 3)
    assert paragraphs["name"] == "llama, paragraphs" and sentences["name"] == "llama, sentences"
    assert found["pooling"]["num_pairs"] == 20 and len(found["pooling"]["scores"]) == 13
    assert {one["stage"] for one in found["curves"]} == {"mntp", "simcse"}


def test_further_runs_add_their_states(run, tiny_llama_dir, tmp_path):
    """Those of the model that is the first; a choice among them is kept in its order."""
    flags = ("--model", tiny_llama_dir, "--more", run, "--only", "future-tokens", "--variants", "bi+mntp", "bi")
    done = analyse(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "future-tokens.json").read_text())
    assert [one["variant"] for one in found] == ["bi+mntp", "bi"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "future"], "--only 'future': choose of future-tokens, similarity"),
        (["--only", "pooling", "--variants", "bi+mntp"], "there is no variant 'bi+mntp', only uni, bi"),
        (["--only", "curves"], "no evaluations.jsonl"),
        (["--triples", "missing.jsonl", "--only", "future-tokens"], "missing.jsonl: cannot be read"),
    ],
)
def test_errors_are_one_line(tiny_llama_dir, tmp_path, flags, message):
    done = analyse(tmp_path, "--model", tiny_llama_dir, *flags)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
