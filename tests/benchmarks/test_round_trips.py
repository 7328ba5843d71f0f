"""The table of round trips: every library is there, and nothing is farther apart than the issue allows."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LIBRARIES = {"sentence-transformers", "transformers", "gguf", "peft", "mteb"}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("round_trips")
    sys.modules.pop("round_trips", None)


def check(document):
    assert {row["library"] for row in document["rows"]} == LIBRARIES
    for row in document["rows"]:
        halved = row["compared"].startswith("f16")
        assert row["difference"] <= (2e-3 if halved else 1e-4), row


def test_a_tiny_decoder(script, tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["round_trips.py", "--model", str(tiny_llama_dir), "--output", str(tmp_path)])
    script.main()
    document = json.loads((tmp_path / "round_trips.json").read_text(encoding="utf-8"))
    check(document)
    table = (tmp_path / "round_trips.md").read_text(encoding="utf-8")
    assert table.count("\n| ") == 1 + len(document["rows"])


def test_the_figures_that_are_kept():
    check(json.loads((BENCHMARKS / "results" / "round_trips.json").read_text(encoding="utf-8")))
