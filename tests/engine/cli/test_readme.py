"""The README's section on the command line: its commands run, its file is read, its presets are all there are."""

import json
import re
import shlex
from pathlib import Path

import pytest

from bivec.engine.cli import COMMANDS
from bivec.engine.cli.convert import parse
from bivec.engine.presets import PRESETS

README = Path(__file__).parents[3] / "README.md"


@pytest.fixture(scope="module")
def section():
    return README.read_text(encoding="utf-8").split("\n## Command line\n")[1].split("\n## ")[0]


def block(section, language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return found


def test_the_commands_run_one_after_the_other(bivec, section, tiny_llama_dir, tmp_path, monkeypatch):
    """On a tiny decoder and a few pairs; what one command writes the next one opens."""
    pytest.importorskip("triton")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(5)))
    small = {"convert": ["--model", tiny_llama_dir, "--smoke"], "eval": ["--pairs", 20]}
    small["doctor"] = ["--only", "versions,devices,backends,numerics"]
    commands = [shlex.split(line, comments=True) for line in block(section, "bash").splitlines()]
    assert [words[:2] for words in commands] == [
        ["bivec", name] for name in ("doctor", "convert", "encode", "eval", "export", "bench")
    ]
    assert {words[1] for words in commands} == set(COMMANDS)
    printed = {words[1]: bivec(*words[1:], *small.get(words[1], []))[0] for words in commands}
    assert (tmp_path / "corpus.npy").is_file() and (tmp_path / "encoder.gguf").is_file()
    assert len(json.loads(printed["eval"])["sts"]) == 2


def test_the_file_is_a_configuration(section, tmp_path):
    file = tmp_path / "convert.yaml"
    file.write_text(block(section, "yaml"), encoding="utf-8")
    recipe, _, _ = parse(["--config", str(file)])
    assert (recipe.model, recipe.mntp_data, recipe.mntp.optim.steps) == ("path/to/decoder", "articles.txt", 500)
    assert (recipe.mntp.batch_size, recipe.simcse.batch_size) == (16, 64)
    assert recipe.mntp.mask_style == PRESETS["sheared-llama-1.3b"].mntp.mask_style


def test_the_presets_are_all_named(section):
    told = section.split("The presets are the recipes' settings:")[1].split("for any other decoder")[0]
    assert set(re.findall(r"`([\w.-]+)`", told)) == set(PRESETS)
