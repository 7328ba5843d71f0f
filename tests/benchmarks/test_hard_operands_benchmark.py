"""benchmarks/hard_operands.py: what it measures, and that the committed figures say what the README says of them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("hard_operands")
    sys.modules.pop("hard_operands", None)


@pytest.mark.parametrize("cosine", [0.5, 0.95])
def test_vectors_are_as_parallel_as_they_are_asked_to_be(script, cosine):
    vectors = torch.nn.functional.normalize(script.near(256, cosine, torch.Generator().manual_seed(1)).float(), dim=1)
    assert (vectors @ vectors.T).mean().item() == pytest.approx(cosine, abs=0.02)


def test_parallel_vectors_cost_digits(script):
    def error(cosine):
        generator = torch.Generator().manual_seed(2)
        sides = [script.near(16, cosine, generator) for _ in range(2)]
        return script.errors(lambda a, b, backend: script.info_nce(a, b, scale=20.0, backend=backend), sides)

    nearly, apart = error(0.99), error(0.5)
    assert len(nearly) == 2 and min(nearly) > max(apart) > 0


def test_the_committed_figures_grow_with_what_is_hard():
    found = json.loads((ROOT / "benchmarks" / "results" / "hard_operands.json").read_text(encoding="utf-8"))
    for rows, keys in (
        (found["losses"], ("info_nce", "linear_cross_entropy")),
        (found["attention"], ("dq", "dk", "dv")),
    ):
        for key in keys:
            errors = [row[key] for row in rows]
            assert errors == sorted(errors) and errors[0] > 0
