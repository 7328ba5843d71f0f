"""The study of a run, from its baselines to the report, on a tiny random model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("baselines", "pooling", "tasks", "words", "prefixes", "masks", "curves")


def run(script, *flags, expected=0):
    command = [sys.executable, str(ROOT / "recipes" / script), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == expected, done.stderr
    return done


@pytest.fixture(scope="module")
def quick_start(tiny_llama_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("study") / "run"
    run("llm2vec_smollm2.py", "--model", tiny_llama_dir, "--smoke", "--output-dir", directory)
    return directory


@pytest.mark.slow
def test_all_parts_and_the_report(quick_start, tmp_path):
    flags = ("--run", quick_start, "--output-dir", tmp_path, "--smoke")
    run("reproduce.py", *flags)
    report = (tmp_path / "report.md").read_text()
    assert "This part was not run" not in report
    for name in PARTS[1:]:
        part = json.loads((tmp_path / f"{name}.json").read_text())
        assert part["data"]["table"] in report and part["seconds"] >= 0
        assert f"| {name} | " in report
    for name in ("pooling", "prefixes", "masks", "curves"):
        assert f"({name}.png)" in report and (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert "Bi < Uni < Bi+MNTP" in report and "| uni+simcse |" in report and "| echo |" in report
    assert "not measured" not in report.split("## Sentence pairs")[0].split("was not measured")[1]
    # again: nothing is done twice, and the report is the same
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    again = run("reproduce.py", *flags)
    assert again.stdout.count("(kept from before)") == len(PARTS) - 1
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")} == before
    assert (tmp_path / "report.md").read_text() == report
    # a part that is lost is made again, and no other
    (tmp_path / "masks.json").unlink()
    assert run("reproduce.py", *flags, "--only", "masks").stdout.count("(kept from before)") == len(PARTS) - 2
    assert (tmp_path / "report.md").read_text().count("This part was not run") == 0


def test_what_is_not_asked_for_is_left_out(quick_start, tmp_path):
    run("reproduce.py", "--run", quick_start, "--output-dir", tmp_path, "--smoke", "--only", "prefixes")
    report = (tmp_path / "report.md").read_text()
    assert report.count("This part was not run") == len(PARTS) - 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["prefixes.json", "prefixes.png", "report.md"]


def test_bad_input(tiny_llama_dir, tmp_path):
    flags = ("--output-dir", tmp_path / "out")
    error = run("reproduce.py", "--run", tiny_llama_dir, *flags, expected=2).stderr
    assert "no run with MNTP and SimCSE is there; to make one: python" in error
    error = run("reproduce.py", "--run", tiny_llama_dir, *flags, "--only", "pooling,nothing", expected=2).stderr
    assert "--only 'nothing': choose of baselines, pooling, " in error
    assert not (tmp_path / "out").exists()
