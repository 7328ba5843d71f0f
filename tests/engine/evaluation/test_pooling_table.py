"""All poolings of one forward are the vectors that encode gives with each; EOS under both masks; the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bivec.engine.data import load_sts
from bivec.engine.encoder import Encoder
from bivec.engine.evaluation import sts_spearman
from bivec.engine.evaluation.echo import REPETITION, EchoEncoder
from bivec.engine.evaluation.paper import paper_rows
from bivec.engine.evaluation.pooling_table import (
    TITLES,
    PoolingScore,
    PoolingTable,
    draw_pooling_table,
    embed_poolings,
    pooling_markdown,
    pooling_table,
)
from bivec.engine.evaluation.variants import Variant

PAIRS = load_sts(Path(__file__).parents[3] / "recipes" / "data" / "stsb_dev.csv.gz")[:30]
TEXTS = ["A man plays the guitar.", "", "Rain. " * 30, "Two dogs run across a field of snow."]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("settings", [{}, {"pool_bos": False}, {"template": "[INST] {text} [/INST]"}])
@pytest.mark.parametrize("instruction", [None, "Find it:"])
def test_every_pooling_is_that_of_encode(tiny_llama_dir, monkeypatch, causal, settings, instruction):
    encoder = Encoder.from_pretrained(tiny_llama_dir, causal=causal, max_length=48, **settings)
    forwards = []
    forward = encoder.model.forward
    monkeypatch.setattr(encoder.model, "forward", lambda *a, **k: forwards.append(1) or forward(*a, **k))
    texts = [text for text in TEXTS if len(text) < 60]  # none is cut
    found = embed_poolings(encoder, texts, instruction=instruction)
    assert len(forwards) == (1 if causal else 2)
    for pooling in TITLES:
        asked = Encoder.from_pretrained(tiny_llama_dir, causal=causal, max_length=48, pooling=pooling, **settings)
        np.testing.assert_allclose(found[pooling], asked.encode(texts, instruction=instruction), atol=1e-5)
    assert np.abs(found["mean"] - found["weighted_mean"]).max() > 1e-2
    assert np.abs(found["mean"] - found["eos_token"]).max() > 1e-2


@pytest.mark.parametrize("causal", [True, False])
def test_a_text_that_the_eos_shortens_is_run_twice(tiny_llama_dir, causal):
    """With the EOS in the row one more token of the text is cut, so the two rows no longer begin alike."""
    found = embed_poolings(Encoder.from_pretrained(tiny_llama_dir, causal=causal, max_length=24), TEXTS)
    for pooling in TITLES:
        asked = Encoder.from_pretrained(tiny_llama_dir, causal=causal, max_length=24, pooling=pooling)
        np.testing.assert_allclose(found[pooling], asked.encode(TEXTS), atol=1e-5)


@pytest.fixture(scope="module")
def variants(tiny_llama_dir):
    """Uni, and Bi under the name of a run that was handed over."""
    settings = {"pool_bos": True}
    return [Variant("uni", str(tiny_llama_dir), settings=settings), Variant("bi+simcse", str(tiny_llama_dir))]


@pytest.fixture(scope="module")
def table(variants, tiny_llama_dir):
    other = Encoder.from_pretrained(tiny_llama_dir, pooling="last_token")
    reported = []
    table = pooling_table(variants, PAIRS, echo=REPETITION, others={"other": other}, report=reported.append)
    assert reported == list(table.scores)
    return table


def test_the_table_holds_what_evaluate_sts_gives(table, variants):
    assert table.num_pairs == 30
    assert table.variants == ["uni", "echo", "bi+simcse", "other"]
    for variant in variants:
        for pooling in TITLES:
            expected = sts_spearman(variant.load(pooling=pooling).encode, PAIRS)
            assert table.score(variant.name, pooling) == pytest.approx(expected, abs=0.2)  # ties of float32
    echo = EchoEncoder(variants[0].load(), template=REPETITION)
    assert table.score("echo", "mean") == pytest.approx(sts_spearman(echo.encode, PAIRS), abs=0.2)
    assert table.score("echo", "eos_token") is None
    other = variants[1].load(pooling="last_token")
    assert table.score("other", "last_token") == pytest.approx(sts_spearman(other.encode, PAIRS), abs=0.2)
    assert len({round(one.spearman, 1) for one in table.scores}) == len(table.scores)  # no two were mixed up


def test_beside_the_paper(tmp_path):
    scores = [PoolingScore("uni", pooling, 10.0 + i) for i, pooling in enumerate(TITLES)]
    table = PoolingTable((*scores, PoolingScore("echo", "mean", 44.44)), 1500)
    lines = pooling_markdown(table, paper_model="Mistral-7B").splitlines()
    assert lines[2] == "| uni | 10.0 | 11.0 | 12.0 | 22.12 | 43.00 | 44.01 | 58.59 |"
    assert lines[3] == "| echo |  | 44.4 |  |  |  |  | 73.60 |"
    assert "1500 sentence pairs" in lines[-1] and "Mistral-7B" in lines[-1]
    (row,) = paper_rows("5", model="Mistral-7B", variant="uni")
    assert row.scores["mean"] == 43.0
    assert json.loads(json.dumps(table.to_dict()))["scores"][3] == {
        "variant": "echo",
        "pooling": "mean",
        "spearman": 44.44,
    }
    draw_pooling_table(tmp_path / "figure.png", table, paper_model="Mistral-7B")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]
