"""Commands as a user gives them: in this process, and in one of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from bivec.engine.cli import main


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Tables that ``datasets`` converts go elsewhere than into the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # a name that is no path is not asked of the hub


@pytest.fixture
def bivec(capsys) -> Callable[..., tuple[str, str]]:
    """bivec(*words, code=0) -> (stdout, stderr) of a command that must end with this exit code."""

    def run(*words: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        try:
            found = main([str(word) for word in words])
        except SystemExit as stop:  # argparse: help and wrong usage
            found = stop.code
        captured = capsys.readouterr()
        assert found == code, captured.err
        assert "Traceback" not in captured.err
        return captured.out, captured.err

    return run


@pytest.fixture
def bivec_json(bivec) -> Callable[..., Any]:
    """bivec_json(*words, code=0): the one JSON document that the command prints."""

    def run(*words: object, code: int = 0) -> Any:
        return json.loads(bivec(*words, "--json", code=code)[0])

    return run


@pytest.fixture
def process(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """process(*words, input=None): the command in a process of its own, in an empty folder."""

    def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "bivec.engine.cli", *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, **options)

    return run
