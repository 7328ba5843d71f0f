"""Causal against bidirectional hidden states, against transformers; the table and the heat map."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bivec.engine.encoder import Encoder
from bivec.engine.errors import DataError
from bivec.engine.evaluation.auto_encoder import AutoEncoder
from bivec.engine.evaluation.paper import paper_findings
from bivec.engine.evaluation.similarity import (
    MaskSimilarity,
    draw_similarity,
    mask_similarity,
    similarity_markdown,
)

TEXTS = ["Montreal lies on an island in the river.", "Snow fell.", "The old mill stood still. " * 12]


@pytest.fixture(scope="module")
def encoder(tiny_llama_dir):
    return Encoder.from_pretrained(tiny_llama_dir, max_length=40)


@pytest.fixture(scope="module")
def result(encoder):
    return mask_similarity("tiny", encoder, TEXTS)


def test_against_transformers(tiny_llama_dir, encoder, result):
    """Both masks through transformers' own switch, one text at a time, every layer and token."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    for text, tokens, cosines, floor in zip(TEXTS, result.tokens, result.cosines, result.floors, strict=True):
        ids = torch.tensor([encoder.tokenizer(text).input_ids[:40]])
        assert list(tokens) == encoder.tokenizer.convert_ids_to_tokens(ids[0].tolist())
        states = []
        for causal in (True, False):
            model.config.is_causal = causal
            with torch.no_grad():
                states.append(model(ids, output_hidden_states=True, use_cache=False).hidden_states)
        expected = torch.stack(
            [torch.cosine_similarity(a[0].double(), b[0].double(), dim=-1) for a, b in zip(*states, strict=True)]
        )
        assert cosines.shape == (3, ids.shape[1])  # the embedding output and two layers
        np.testing.assert_allclose(cosines, expected.numpy(), atol=1e-5)
        pairs = [
            torch.cosine_similarity(a[0][i], a[0][j], dim=0).item()
            for a in states[0][1:2]
            for i in range(len(tokens))
            for j in range(i)
        ]
        assert floor[1] == pytest.approx(np.mean(pairs), abs=1e-4)


def test_what_must_be_so(result):
    """The embeddings are the same, the last token sees the same in one layer; all else may differ, and does."""
    for cosines in result.cosines:
        np.testing.assert_allclose(cosines[0], 1.0, atol=1e-6)
        assert cosines[1, -1] == pytest.approx(1.0, abs=1e-6)
        assert cosines[1, :-1].max() < 1 - 1e-5
    assert result.cosines[2].shape[1] == 40  # cut at the model's length


def test_the_encoders_own_mask_does_not_count(tiny_llama_dir, result):
    causal = mask_similarity("tiny", Encoder.from_pretrained(tiny_llama_dir, causal=True, max_length=40), TEXTS)
    for one, other in zip(causal.cosines, result.cosines, strict=True):
        np.testing.assert_array_equal(one, other)


def test_means():
    one = MaskSimilarity(
        "two",
        (("a", "b"), ("c",)),
        (np.array([[1.0, 1.0], [0.5, 0.2]], np.float32), np.array([[1.0], [0.8]], np.float32)),
        (np.array([0.3, 0.4], np.float32), np.array([np.nan, np.nan], np.float32)),
    )
    np.testing.assert_allclose(one.floor, [0.3, 0.4], atol=1e-6)  # of one token there is no pair
    np.testing.assert_allclose(one.by_layer, [1.0, 0.5])  # over three tokens, not over two texts
    np.testing.assert_allclose(one.by_position, [[1.0, 1.0], [0.65, 0.2]])


def test_table_and_figure(tmp_path, result):
    alone = np.array([np.nan, np.nan], np.float32)
    other = MaskSimilarity("shallow", (("a",),), (np.array([[1.0], [0.25]], np.float32),), (alone,))
    table = similarity_markdown([result, other])
    lines = table.splitlines()
    assert lines[0] == "| layer | tiny | floor | shallow | floor |"
    assert lines[3] == f"| 1 | {result.by_layer[1]:.3f} | {result.floor[1]:.3f} | 0.250 | nan |"
    assert lines[4].endswith(" |  |  |")
    assert paper_findings()["layer_similarity"] in table
    draw_similarity(tmp_path / "figure.png", [result, other])
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(json.dumps(other.to_dict()))["floor"] == [None, None]
    stored = json.loads(json.dumps(result.to_dict()))
    assert np.shape(stored["texts"][1]["cosines"]) == (3, len(result.tokens[1]))


def test_what_has_no_two_masks(encoder):
    with pytest.raises(DataError, match="needs texts with at least one token"):
        mask_similarity("tiny", encoder, [])
    with pytest.raises(DataError, match="no causal mask to compare with"):
        mask_similarity("bert", AutoEncoder.__new__(AutoEncoder), TEXTS)
