"""bivec convert: the weights of the recipe's own script, from flags and from a file, and what it prints."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bivec.engine.encoder import Encoder

ROOT = Path(__file__).parents[3]
SETTINGS = {
    "stages": ["bi", "mntp", "simcse"],
    "seed": 5,
    "mntp": {"optim": {"steps": 2, "warmup_steps": 0}, "batch_size": 2, "sequence_length": 24},
    "simcse": {"optim": {"steps": 2, "warmup_steps": 0}, "batch_size": 4, "max_length": 24},
    "data_limit": 40,
    "eval_pairs": 12,
}
FLAGS = [
    *("--seed", "5", "--set", "mntp.optim.steps=2", "--set", "mntp.optim.warmup_steps=0"),
    *("--set", "mntp.batch_size=2", "--set", "mntp.sequence_length=24", "--set", "simcse.optim.steps=2"),
    *("--set", "simcse.optim.warmup_steps=0", "--set", "simcse.batch_size=4", "--set", "simcse.max_length=24"),
    *("--set", "data_limit=40", "--set", "eval_pairs=12"),
]


@pytest.fixture(scope="module")
def script_run(tiny_llama_dir, tmp_path_factory):
    """The run of recipes/llm2vec_smollm2.py with FLAGS."""
    directory = tmp_path_factory.mktemp("script") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", "--model", str(tiny_llama_dir), "--output-dir", str(directory), *FLAGS])
        runpy.run_path(str(ROOT / "recipes" / "llm2vec_smollm2.py"))["main"]()
    return directory


def same_weights(one, other):
    ours, theirs = (load_file(directory / "merged" / "model.safetensors") for directory in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_flags_a_file_and_the_script_give_the_same_weights(bivec_json, bivec, script_run, tiny_llama_dir, tmp_path):
    start = ["convert", "--preset", "smollm2-135m", "--model", tiny_llama_dir]
    document = bivec_json(*start, *FLAGS, "--output-dir", tmp_path / "flags")
    assert same_weights(tmp_path / "flags", script_run)
    assert document["encoder"] == str(tmp_path / "flags" / "merged")
    expected = json.loads((script_run / "results.json").read_text())
    assert document["stages"] == expected["stages"] and len(document["stages"]) == 5

    file = tmp_path / "convert.yaml"
    file.write_text(json.dumps(SETTINGS | {"preset": "smollm2-135m", "model": str(tiny_llama_dir)}))  # JSON is YAML
    printed, said = bivec("convert", "--config", file, "--output-dir", tmp_path / "file")
    assert same_weights(tmp_path / "file", script_run)
    assert "| bi+mntp+simcse | mean |" in printed and printed.endswith(f"encoder is in {tmp_path / 'file'}/merged\n")
    assert "STS-B dev" in said and "STS-B dev" not in printed.replace("| STS-B dev", "")  # progress is on stderr
    assert Encoder.from_pretrained(tmp_path / "file").config.pool_bos


def test_supervised_on_what_a_run_has_made(bivec_json, script_run, tmp_path):
    """As recipes/supervised.py: the run's settings stay, and its decoder is not scored again."""
    triples = tmp_path / "triples.jsonl"
    rows = ({"query": f"{i} birds", "positive": f"{i} crows", "negatives": [f"{i + 9} trees"]} for i in range(12))
    triples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--supervised-data", triples, "--output-dir", tmp_path / "out", "--set", "supervised.optim.steps=2"]
    flags += ["--set", "supervised.batch_size=4", "--set", "supervised.optim.warmup_steps=0", "--set", "eval_pairs=12"]
    document = bivec_json("convert", "--preset", "supervised", "--model", script_run, *flags)
    names = [stage["stage"] for stage in document["stages"]]
    assert names == ["bi+mntp+simcse", "bi+mntp+simcse+supervised"]
    assert Encoder.from_pretrained(tmp_path / "out").config.pool_bos


def test_dry_run(bivec, bivec_json):
    printed, said = bivec("convert", "--preset", "mistral-7b", "--dry-run")
    assert "trainable parameters   41,943,040" in printed and said == ""
    assert bivec_json("convert", "--preset", "mistral-7b", "--dry-run")["dry_run"] == printed.splitlines()
    assert not Path("runs/llm2vec-mistral-7b").exists()


def test_what_cannot_start(bivec, tiny_llama_dir, script_run, tmp_path):
    start = ["convert", "--preset", "smollm2-135m", "--model", tiny_llama_dir]
    for flags, message in (
        (["--output-dir", script_run], "holds a run already; give --resume"),
        (["--output-dir", tmp_path / "x", "--set", "mntp.batch=3"], "--set mntp.batch: no such hyper-parameter"),
        (["--output-dir", tmp_path / "x", "--mntp-data", tmp_path / "absent.txt"], "--mntp-data"),
        (["--output-dir", tmp_path / "x", "--device", "xpu"], "--device xpu"),
    ):
        printed, said = bivec(*start, *flags, code=1)
        assert printed == "" and said.startswith("bivec: error: ") and message in said
    assert not (tmp_path / "x").exists()


def test_ctrl_c_says_how_to_go_on(bivec, tiny_llama_dir, tmp_path, monkeypatch):
    def stops(*_, **__):
        raise KeyboardInterrupt

    command = ["convert", "--preset", "smollm2-135m", "--model", tiny_llama_dir, "--output-dir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr("bivec.engine.run.Run.simcse", stops)
        said = bivec(*command, *FLAGS, code=130)[1]
    line = next(line for line in said.splitlines() if line.startswith("bivec: to go on: "))
    words = line.removeprefix("bivec: to go on: bivec ").split()
    assert words == [str(word) for word in (*command, *FLAGS, "--resume")] and said.endswith("bivec: stopped\n")
    bivec(*words)
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()
