"""Every code block of engine/integrations/README.md runs as it stands, with a small random model for its name."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
README = (ROOT / "engine/integrations/README.md").read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M"
BLOCKS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE))
LIBRARIES = {
    "transformers",
    "sentence_transformers",
    "lightning",
    "pytorch_lightning",
    "peft",
    "accelerate",
    "datasets",
}


def run(block, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert MODEL in block
    names = {"__name__": "block"}
    exec(compile(block.replace(MODEL, str(path)), "README.md", "exec"), names)
    return names


def test_no_block_is_missed():
    assert list(BLOCKS) == [
        "transformers",
        "MNTP in Trainer",
        "sentence-transformers",
        "A plain loop",
        "PyTorch Lightning",
    ]
    assert len(BLOCKS) == README.count("```python") == README.count("```") / 2


def test_transformers(tiny_llama_dir, tmp_path, monkeypatch):
    names = run(BLOCKS["transformers"], tiny_llama_dir, tmp_path, monkeypatch)
    assert names["hidden"].shape[0] == 2
    assert names["applied"].rms_norm == 5


def test_mntp_in_trainer(tiny_llama_dir, tmp_path, monkeypatch):
    assert run(BLOCKS["MNTP in Trainer"], tiny_llama_dir, tmp_path, monkeypatch)["trainer"].state.global_step == 3


def test_sentence_transformers(tiny_llama_dir, tmp_path, monkeypatch):
    names = run(BLOCKS["sentence-transformers"], tiny_llama_dir, tmp_path, monkeypatch)
    assert names["trainer"].state.global_step == 3
    trunk = names["model"][0].auto_model
    assert (trunk.config._attn_implementation, trunk.config.is_causal) == ("bivec", False)


def test_a_plain_loop(tiny_llama_dir, tmp_path, monkeypatch):
    torch.manual_seed(0)
    names = run(BLOCKS["A plain loop"], tiny_llama_dir, tmp_path, monkeypatch)
    assert 0.0 < float(names["loss"].detach()) < 3.0
    assert not torch.equal(names["first"], names["second"])  # two views


def test_lightning(tiny_llama_dir, tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="the README's example for it needs `pip install lightning`")
    trainer = run(BLOCKS["PyTorch Lightning"], tiny_llama_dir, tmp_path, monkeypatch)["trainer"]
    assert trainer.global_step == 3
    assert float(trainer.logged_metrics["loss"]) > 0.0


def imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_kernels_know_none_of_these_libraries():
    files = sorted((ROOT / "kernels").rglob("*.py"))
    assert len(files) > 20
    assert {file.name: LIBRARIES & set(imported(file)) for file in files} == {file.name: set() for file in files}


def test_each_module_loads_its_own_library_alone():
    script = (
        "import sys, bivec.engine.integrations, bivec.kernels\n"
        f"print(sorted({LIBRARIES} & set(sys.modules)))\n"
        "import bivec.engine.integrations.transformers\n"
        "print('sentence_transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.split("\n")[:2] == ["[]", "False"], result.stderr
