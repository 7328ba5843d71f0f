"""recipes/encode_corpus.py: from a run, under torchrun, and what it refuses."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from bivec.engine.encoder import Encoder

SCRIPT = Path(__file__).parents[2] / "recipes" / "encode_corpus.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TEXTS = ["a choir sang", "the river runs north", "None", "", "a ship\nsailed", "old kings"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Tables that ``datasets`` converts go elsewhere than into the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def main():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield runpy.run_path(str(SCRIPT))["main"]
    torch.set_num_threads(threads)


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.jsonl"
    rows = ({"name": f"d{i}", "passage": text, "number": i} for i, text in enumerate(TEXTS))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def words(model, corpus, output, *more):
    named = {"--model": model, "--input": corpus, "--output": output}
    return [str(word) for word in (*(part for pair in named.items() for part in pair), *more)]


def fails(main, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_one_process_and_two(main, tiny_llama_dir, corpus, tmp_path, capsys):
    """A run stands for its merged/; the files of one process and of two are the same bytes."""
    encoder = Encoder.from_pretrained(tiny_llama_dir, max_length=20)
    encoder.save_pretrained(tmp_path / "run" / "merged")
    flags = ("--column", "passage", "--instruction", "Find:", "--slice-texts", 2, "--max-text-length", 4)
    one, two = tmp_path / "one.npy", tmp_path / "two.npy"
    main(words(tmp_path / "run", corpus, one, *flags))
    assert f"{one}: 6 embeddings of 64" in capsys.readouterr().out
    expected = encoder.encode(TEXTS, instruction="Find:", max_text_length=4)
    np.testing.assert_allclose(np.load(one, mmap_mode="r"), expected, rtol=0, atol=1e-5)
    command = [*TORCHRUN, str(SCRIPT), *words(tmp_path / "run", corpus, two, *flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 embeddings") == 1 and two.read_bytes() == one.read_bytes()


def test_parquet_with_ids(main, tiny_llama_dir, corpus, tmp_path):
    output = tmp_path / "e.parquet"
    main(
        words(tiny_llama_dir, corpus, output, "--column", "passage", "--id-column", "name", "--limit", 4, "--normalize")
    )
    table = pq.read_table(output)
    assert table["id"].to_pylist() == ["d0", "d1", "d2", "d3"]
    lengths = np.linalg.norm(np.array(table["embedding"].to_pylist()), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--column", "text"), "'text' is not one of them"),
        ((), "which column holds the texts"),
        (("--column", "number"), "'number' is not one of them"),
        (("--column", "passage", "--id-column", "name"), "a .parquet file to hold them"),
        (("--column", "passage", "--limit", "0"), "--limit is 0"),
        (("--column", "passage", "--max-text-length", "0"), "max_text_length is 0"),
        (("--column", "passage", "--tokens-per-batch", "0"), "tokens_per_batch is 0"),
        (("--column", "passage", "--timeout", "0"), "--timeout 0"),
        (("--column", "passage", "--dtype", "int9"), "--dtype: 'int9' is none of float32"),
        (("--column", "passage", "--device", "nowhere"), "--device: 'nowhere' is no device of torch"),
    ],
)
def test_bad_flags(main, tiny_llama_dir, corpus, tmp_path, capsys, more, message):
    error = fails(main, capsys, words(tiny_llama_dir, corpus, tmp_path / "e.npy", *more))
    assert "error: " in error and message in error and "Traceback" not in error
    assert not list(tmp_path.glob("*e.npy*"))


def test_bad_files(main, tiny_llama_dir, corpus, tmp_path, capsys):
    output = tmp_path / "e.npy"
    null = tmp_path / "null.jsonl"
    null.write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n', encoding="utf-8")
    assert "1 of 3 rows have no value in the column 'text'" in fails(main, capsys, words(tiny_llama_dir, null, output))
    latin = tmp_path / "latin.txt"
    latin.write_bytes("a\nna\xefve\n".encode("latin-1"))
    assert "latin.txt, line 2: not UTF-8" in fails(main, capsys, words(tiny_llama_dir, latin, output))
    assert "nowhere.jsonl does not exist" in fails(
        main, capsys, words(tiny_llama_dir, tmp_path / "nowhere.jsonl", output)
    )
    assert "nowhere" in fails(main, capsys, words(tmp_path / "nowhere", corpus, output, "--column", "passage"))
    main(words(tiny_llama_dir, corpus, output, "--column", "passage"))
    before = output.read_bytes()
    error = fails(main, capsys, words(tiny_llama_dir, corpus, output, "--column", "name"))
    assert "holds other embeddings (texts.blake2b" in error and output.read_bytes() == before
    main(words(tiny_llama_dir, corpus, output, "--column", "name", "--overwrite"))
    assert output.read_bytes() != before


def test_out_of_memory_says_what_to_do(main, tiny_llama_dir, corpus, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "hidden_states", full)
        error = fails(main, capsys, words(tiny_llama_dir, corpus, tmp_path / "e.npy", "--column", "passage"))
    assert "to go on, repeat it with a smaller --tokens-per-batch" in error
    main(words(tiny_llama_dir, corpus, tmp_path / "e.npy", "--column", "passage", "--tokens-per-batch", 8))
    assert np.load(tmp_path / "e.npy").shape == (6, 64)
