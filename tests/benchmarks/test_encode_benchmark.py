"""The benchmark of encoding on a tiny random model: both sides, their embeddings, and what it refuses."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bivec.engine.encoder import Encoder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("timing", "cpu_meter", "attention_peers", "attention", "workload", "encode")
OURS, PEER = "bivec", "sentence-transformers"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # ops this small wait for their threads, many times longer where the machine is busy
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    torch.set_num_threads(threads)
    for name in MODULES:
        sys.modules.pop(name, None)


def run(scripts, output, *arguments):
    """Exit status and the JSON."""
    status = scripts.encode.main(["--shape", "tiny", "--quick", "--output", str(output), *arguments])
    return status, json.loads((output / "encode_cpu.json").read_text(encoding="utf-8"))


def test_runs(scripts, tmp_path, capsys):
    """Both sides give the same embeddings; table, JSON and plot."""
    status, content = run(scripts, tmp_path)
    assert status == 0 and list(content["workloads"]) == ["batches of 16", "one call"]
    assert content["sentences"] == 40 and content["tokens"] > 40 * 5 and content["peer"]["absent"] is None
    assert content["largest_difference"] < 1e-5
    for workload in content["workloads"].values():
        sides = workload["sides"]
        assert list(sides) == [OURS, PEER]
        assert workload["ours_is_faster_by"] == pytest.approx(sides[PEER]["timing"]["ms"] / sides[OURS]["timing"]["ms"])
        for side in sides.values():
            assert side["timing"]["repeats"] == 3 and side["peak_bytes"] > 0
            assert side["tokens_per_s"] / side["sentences_per_s"] == pytest.approx(content["tokens"] / 40)
    assert (tmp_path / "encode_cpu.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "tiny in float32 on cpu" in printed and "ours is faster by" in printed


def test_batches_keep_the_order(scripts):
    seen = []

    def encode(texts, batch_size):
        seen.append((len(texts), batch_size))
        return np.array([[len(text)] for text in texts])

    found = scripts.encode.in_batches(encode, 3)(["a", "bbb", "cc", "dddd", "e"])
    assert found.tolist() == [[1], [3], [2], [4], [1]] and seen == [(3, 3), (2, 3)]


def test_other_embeddings_are_found_out(scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scripts.encode, "draw", lambda *_: None)
    build = scripts.encode.peer_encode
    for factor in (1.01, np.nan):

        def spoiled(*arguments, factor=factor):
            encode = build(*arguments)
            return lambda texts, **rest: factor * encode(texts, **rest)

        monkeypatch.setattr(scripts.encode, "peer_encode", spoiled)
        status, _ = run(scripts, tmp_path)
        assert status == 1 and "FAILED  the embeddings differ" in capsys.readouterr().out


def test_a_chat_template_is_left_out(scripts, tmp_path, monkeypatch):
    """sentence-transformers would encode the conversation instead of the text."""
    monkeypatch.setattr(scripts.encode, "draw", lambda *_: None)
    train = scripts.encode.trained_tokenizer

    def of_a_chat_model(*arguments):
        tokenizer = train(*arguments)
        tokenizer.chat_template = "{% for message in messages %}user: {{ message['content'] }}{% endfor %}"
        return tokenizer

    monkeypatch.setattr(scripts.encode, "trained_tokenizer", of_a_chat_model)
    status, content = run(scripts, tmp_path)
    assert status == 0 and content["largest_difference"] < 1e-5


def test_a_missing_peer_leaves_ours(scripts, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    hidden = "sentence_transformers"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == hidden else find(name, *rest))
    status, content = run(scripts, tmp_path)
    for workload in content["workloads"].values():
        assert set(workload["sides"]) == {OURS} and workload["ours_is_faster_by"] is None
    assert status == 0 and content["largest_difference"] is None
    assert content["peer"] == {"absent": "sentence-transformers is not installed"}
    assert "without sentence-transformers" in capsys.readouterr().out
    _, content = run(scripts, tmp_path, "--no-peer")
    assert content["peer"] == {"absent": "--no-peer"}


def test_it_is_the_bidirectional_encoder_of_the_checkpoint(scripts, tmp_path):
    """What is measured is what a user gets from the same folder."""
    options = scripts.encode.parse(["--shape", "tiny", "--quick"])
    sentences = scripts.encode.sts_sentences(6)
    encoder = scripts.encode.our_encoder(options, torch.device("cpu"), sentences)
    encoder.save_pretrained(tmp_path)
    loaded = Encoder.from_pretrained(tmp_path)
    assert not loaded.config.causal and loaded.config.pooling == "mean"
    np.testing.assert_allclose(loaded.encode(sentences), encoder.encode(sentences), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "tiny", "--model", "x"], "not allowed with"),
        (["--sentences", "0"], "--sentences is 0, expected at least 1"),
        (["--repeats", "2"], "--repeats is 2, expected at least 3"),
        (["--batch-sizes", "32", "0"], "--batch-sizes is [32, 0], expected at least 1"),
        (["--max-length", "1"], "--max-length is 1"),
        (["--device", "nowhere"], "--device nowhere: not usable here"),
    ],
)
def test_bad_options(scripts, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        scripts.encode.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_too_many_sentences(scripts, tmp_path, capsys):
    assert scripts.encode.main(["--shape", "tiny", "--sentences", "1000000", "--output", str(tmp_path)]) == 2
    assert "the sample that ships has" in capsys.readouterr().err
