"""The study of a run, from its baselines to the report, on a tiny random model."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from bivec.engine.recipe_arguments import parse_arguments

ROOT = Path(__file__).parents[2]
PARTS = ("baselines", "pooling", "tasks", "words", "prefixes", "masks", "curves")


def run(script, *flags):
    """In this process: importing torch, transformers and mteb takes longer than all of the work."""
    before = sys.argv
    sys.argv = [script, *map(str, flags)]
    try:
        runpy.run_path(str(ROOT / "recipes" / script), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def quick_start(tiny_llama_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("study") / "run"
    run("llm2vec_smollm2.py", "--model", tiny_llama_dir, "--smoke", "--output-dir", directory)
    return directory


@pytest.mark.slow
def test_all_parts_and_the_report(quick_start, tmp_path, capsys):
    flags = ("--run", quick_start, "--output-dir", tmp_path, "--smoke")
    run("reproduce.py", *flags)
    report = (tmp_path / "report.md").read_text()
    assert "This part was not run" not in report
    for name in PARTS[1:]:
        part = json.loads((tmp_path / f"{name}.json").read_text())
        assert part["data"]["table"] in report and isinstance(part["seconds"], float)
        assert f"| {name} | " in report
    for name in ("pooling", "prefixes", "masks", "curves"):
        assert f"({name}.png)" in report and (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert (
        "pos, at their own tokens: Bi < Uni < Bi+MNTP" in report
        and "ner, after MNTP one to the left: Bi <" in report
        and "| uni+simcse |" in report
        and "| echo |" in report
    )
    assert "not measured" not in report.split("## Sentence pairs")[0].split("was not measured")[1]
    # again: nothing is done twice, and the report is the same
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    capsys.readouterr()
    run("reproduce.py", *flags)
    assert capsys.readouterr().out.count("(kept from before)") == len(PARTS)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")} == before
    assert (tmp_path / "report.md").read_text() == report
    # a part that is lost is made again, and no other
    (tmp_path / "masks.json").unlink()
    run("reproduce.py", *flags, "--only", "masks")
    assert capsys.readouterr().out.count("(kept from before)") == len(PARTS) - 1
    assert (tmp_path / "report.md").read_text().count("This part was not run") == 0


def test_baselines_are_those_of_the_run(tiny_llama_dir, tmp_path, monkeypatch):
    """With its own hyper-parameters; those of another run, or of a smoke test, are trained anew."""
    from bivec.engine.evaluation import study

    trained = []

    def train(command, check):
        out = Path(command[command.index("--output-dir") + 1])
        trained.append((out.name, command))
        out.mkdir(parents=True)
        (out / "results.json").write_text('{"seconds": 1.5}')
        return subprocess.CompletedProcess(command, 0)

    runs = {}
    for name, scale in (("a", "7.5"), ("b", "5.0")):
        runs[name] = tmp_path / name
        flags = ("--set", f"simcse.scale={scale}", "--set", "simcse.lora.targets=q_proj,v_proj", "--seed", "5")
        run("llm2vec_smollm2.py", "--model", tiny_llama_dir, "--smoke", "--output-dir", runs[name], *flags)
    monkeypatch.setattr(study.subprocess, "run", train)

    def baselines(name, **more):
        trained.clear()
        recipe = ROOT / "recipes" / "llm2vec_smollm2.py"
        part = study.Study(runs[name], recipe, ROOT / "recipes" / "data", tmp_path / "out", **more).baselines()
        assert part.seconds == 4.5
        return part.reused, [one for one, _ in trained]

    every = ["uni-simcse", "bi-simcse", "bi-mntp-simcse"]
    assert baselines("a") == (False, every)
    causal, plain, after = (command for _, command in trained)
    assert all(
        {"simcse.scale=7.5", "simcse.lora.targets=q_proj,v_proj", "simcse.optim.steps=3"} <= {*c}
        for c in (causal, plain, after)
    )
    assert "simcse.causal=true" in causal and "simcse.causal=false" in plain
    assert all(command[command.index("--seed") + 1] == "5" for command in (causal, plain, after))
    assert after[after.index("--adapters") + 1] == str(runs["a"] / "mntp")
    for _, command in trained:  # the recipe understands what it is given
        recipe, _ = parse_arguments(runpy.run_path(command[1])["RECIPE"], None, command[2:])
        assert recipe.simcse.scale == 7.5 and recipe.simcse.lora.targets == ("q_proj", "v_proj")
        assert recipe.seed == 5 and recipe.eval_pairs == 16 and recipe.pool_bos
    assert baselines("a") == (True, [])
    assert baselines("b") == (False, every)
    assert baselines("b", smoke=True) == (False, every)
    (tmp_path / "out" / "baselines" / "bi-simcse.json").unlink()
    assert baselines("b", smoke=True) == (False, ["bi-simcse"])


def test_what_is_not_asked_for_is_left_out(quick_start, tmp_path):
    run("reproduce.py", "--run", quick_start, "--output-dir", tmp_path, "--smoke", "--only", "prefixes")
    report = (tmp_path / "report.md").read_text()
    assert report.count("This part was not run") == len(PARTS) - 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["prefixes.json", "prefixes.png", "report.md"]


def test_bad_input(tiny_llama_dir, tmp_path, capsys):
    flags = ("--run", tiny_llama_dir, "--output-dir", tmp_path / "out")
    for more, message in (
        ((), "no run with MNTP and SimCSE is there; to make one: python"),
        (("--only", "pooling,nothing"), "--only 'nothing': choose of baselines, pooling, "),
    ):
        with pytest.raises(SystemExit) as stop:
            run("reproduce.py", *flags, *more)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
