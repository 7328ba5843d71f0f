"""The benchmark of corpora on a tiny random model: all ways, the same embeddings, and what it refuses."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("timing", "cpu_meter", "attention_peers", "attention", "workload", "encode", "corpus")
FLAGS = ["--shape", "tiny", "--texts", "20", "--slice-texts", "8"]


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    torch.set_num_threads(threads)
    for name in MODULES:
        sys.modules.pop(name, None)


def test_runs(scripts, tmp_path, capsys):
    assert scripts.corpus.main([*FLAGS, "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "corpus_cpu.json").read_text(encoding="utf-8"))
    assert list(content["sides"]) == ["encode_corpus", "without thread", "given order", "sentence-transformers"]
    assert content["texts"] == 20 and content["tokens"] > 20 * 20 and content["largest_difference"] < 1e-5
    assert content["tokenising_seconds"] > 0 and content["tokenising_share"] > 0
    assert all(side["timing"]["repeats"] == 3 for side in content["sides"].values())
    assert "tokenising alone" in capsys.readouterr().out


def test_other_embeddings_are_found_out(scripts, tmp_path, monkeypatch, capsys):
    build = scripts.corpus.peer_encode
    monkeypatch.setattr(scripts.corpus, "peer_encode", lambda *x: lambda texts, **y: 1.01 * build(*x)(texts, **y))
    assert scripts.corpus.main([*FLAGS, "--output", str(tmp_path)]) == 1
    assert "FAILED  the embeddings differ" in capsys.readouterr().out


def test_ways_give_the_same(scripts):
    options = scripts.corpus.parse(FLAGS)
    texts = ["a b", "c", "d e f", "g"] * 3
    encoder = scripts.encode.our_encoder(options, torch.device("cpu"), texts)
    expected = encoder.encode(texts)
    for way in (scripts.corpus.to_file, scripts.corpus.without_thread):
        np.testing.assert_allclose(way(texts, encoder=encoder, slice_texts=5), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"), [(["--texts", "0"], "--texts is 0"), (["--repeats", "2"], "--repeats is 2")]
)
def test_bad_options(scripts, flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        scripts.corpus.main(flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
