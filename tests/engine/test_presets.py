"""The presets are the recipes' settings, and the samples that they name are part of the installed package."""

import runpy
from pathlib import Path

import pytest
import setuptools

from bivec.engine.presets import DATA, PRESETS

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "mistral-7b": "llm2vec_mistral.py",
    "llama-2-7b": "llm2vec_llama2.py",
    "llama-3-8b": "llm2vec_llama3.py",
    "sheared-llama-1.3b": "llm2vec_sheared_llama.py",
    "smollm2-135m": "llm2vec_smollm2.py",
    "supervised": "supervised.py",
}


def test_every_script_starts_from_a_preset():
    assert {*SCRIPTS, "paper"} == set(PRESETS)
    for name, script in SCRIPTS.items():
        assert runpy.run_path(str(ROOT / "recipes" / script))["RECIPE"] is PRESETS[name]


def test_the_papers_presets_state_what_differs():
    paper = PRESETS["paper"]
    assert PRESETS["llama-2-7b"].mntp == PRESETS["llama-3-8b"].mntp == PRESETS["sheared-llama-1.3b"].mntp == paper.mntp
    assert PRESETS["mistral-7b"].mntp != paper.mntp and PRESETS["mistral-7b"].simcse == paper.simcse
    assert PRESETS["sheared-llama-1.3b"].simcse != paper.simcse


@pytest.fixture
def setup_arguments(monkeypatch):
    """What setup.py gives to setuptools."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_a_wheel_holds_the_samples_and_the_command(setup_arguments):
    held = {file for pattern in setup_arguments["package_data"]["bivec"] for file in ROOT.glob(pattern)}
    recipe = PRESETS["smollm2-135m"]
    for file in (recipe.mntp_data, recipe.simcse_data, recipe.sts_dev, recipe.sts_test):
        assert Path(file) in held, file
    samples = {file for file in DATA.iterdir() if file.suffix != ".py" and file.is_file()}
    assert samples | {ROOT / "py.typed"} == held
    assert "bivec.engine.cli" in setup_arguments["packages"]
    assert setup_arguments["entry_points"] == {"console_scripts": ["bivec = bivec.engine.cli:main"]}
