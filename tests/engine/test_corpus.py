"""Corpora: killed and resumed to the byte, by two processes as by one, never mixed, and what is refused."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from bivec.engine import corpus, corpus_files
from bivec.engine.corpus import encode_corpus
from bivec.engine.data import load_texts
from bivec.engine.encoder import Encoder
from bivec.engine.errors import BivecError, ConfigError, RunError

WORKER = Path(__file__).with_name("corpus_worker.py")
SAMPLE = Path(__file__).parents[2] / "recipes/data/wikipedia_sentences.txt.gz"
SETTINGS = {"slice_texts": 8, "tokens_per_batch": 100, "instruction": "Find:"}  # those of the worker


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Tables that ``datasets`` converts go elsewhere than into the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def encoder(tiny_llama_dir):
    return Encoder.from_pretrained(tiny_llama_dir)


@pytest.fixture(scope="module")
def texts():
    """Three slices and a part of one; one text empty, two alike."""
    return [*load_texts(SAMPLE, limit=27), "", "x", "x"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def run(model, texts, output, *kill, size=1, code=0):
    """The worker, in ``size`` processes, by SLURM's variables; ``code`` of every one."""
    file = output.parent.parent / "texts.json"
    file.write_text(json.dumps(texts), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(WORKER), str(model), str(file), str(output), *map(str, kill)]
    processes = []
    for rank in range(size):
        variables = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": size, "SLURM_LOCALID": rank, "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **options))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * size, "\n".join(outputs)


@pytest.fixture(scope="module")
def whole(encoder, texts, tmp_path_factory):
    """The file that nobody interrupted, by suffix."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    files = {suffix: encode_corpus(encoder, texts, folder / f"e{suffix}", **SETTINGS) for suffix in corpus.SUFFIXES}
    torch.set_num_threads(threads)
    return {suffix: file.read_bytes() for suffix, file in files.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_rows_are_those_of_encode(encoder, texts, tmp_path, dtype):
    options = {"instruction": "Find:", "normalize_embeddings": True, "max_text_length": 9}
    path = encode_corpus(encoder, texts, tmp_path / "e.npy", dtype=dtype, slice_texts=7, **options)
    vectors = np.load(path, mmap_mode="r")
    assert isinstance(vectors, np.memmap) and vectors.dtype == dtype and vectors.shape == (30, encoder.dimension)
    expected = encoder.encode(texts, **options)
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5 if dtype == "float32" else 1e-3)
    assert names(tmp_path) == ["e.npy", "e.npy.json"]


def test_order_slices_and_budget_change_nothing(encoder, texts, tmp_path):
    expected = encoder.encode(texts)
    order = np.random.default_rng(0).permutation(len(texts))
    for number, (slice_texts, budget) in enumerate([(1, None), (4, 1), (11, 64), (100, 5000)]):
        path = encode_corpus(
            encoder,
            [texts[i] for i in order],
            tmp_path / f"{number}.npy",
            slice_texts=slice_texts,
            tokens_per_batch=budget,
        )
        np.testing.assert_allclose(np.load(path), expected[order], rtol=0, atol=1e-5)


def test_parquet(encoder, texts, tmp_path):
    ids = [f"doc {i}" for i in range(len(texts))]
    path = encode_corpus(encoder, texts, tmp_path / "e.parquet", ids=ids, slice_texts=8)
    file = pq.ParquetFile(path)
    assert file.num_row_groups == 4 and file.schema_arrow.names == ["id", "embedding"]
    table = file.read()
    assert table["id"].to_pylist() == ids and table["embedding"].type.list_size == encoder.dimension
    vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(texts), -1)
    np.testing.assert_allclose(vectors, encoder.encode(texts), rtol=0, atol=1e-5)
    assert names(tmp_path) == ["e.parquet", "e.parquet.json"]
    with pytest.raises(RunError, match="ids"):
        encode_corpus(encoder, texts, path, ids=ids[::-1], slice_texts=8)


KILLS = [
    ("before", "_write_at", 1),  # the first slice
    ("half", "_write_at", 3),  # rows
    ("after", "_write_at", 3),  # rows are there, their mark is not
    ("after", "_write_at", 4),  # both
    ("before", "_write_at", 8),  # the last mark
    ("before", "_reserve", 1),
    ("after", "_reserve", 1),  # no state yet
    ("before", "write_text_atomic", 1),
    ("after", "write_text_atomic", 1),
    ("before", "replace", 1),  # the name of state.json, then those at the end
    ("before", "replace", 2),
    ("after", "replace", 2),  # the file has its name, the folder its state
    ("after", "replace", 3),
    ("after", "fsync", 5),
]


@pytest.fixture(scope="module")
def server(tiny_llama_dir, texts, tmp_path_factory):
    """server(output, *kill, code=0) is ``run`` in one process, without its seconds of imports."""
    file = tmp_path_factory.mktemp("server") / "texts.json"
    file.write_text(json.dumps(texts), encoding="utf-8")
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(WORKER), "serve"], env={**os.environ, **threads}, **pipes) as process:

        def send(output, *kill, code=0):
            process.stdin.write(json.dumps([str(word) for word in (tiny_llama_dir, file, output, *kill)]) + "\n")
            process.stdin.flush()
            assert int(process.stdout.readline()) == code, kill

        yield send
        process.stdin.close()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("suffix", corpus.SUFFIXES)
def test_killed_and_resumed(server, whole, tmp_path, suffix):
    """SIGKILL at every kind of moment, each in a folder of its own; then all of them in a row on one file."""
    folder = tmp_path
    for number, kill in enumerate(KILLS):
        output = folder / f"{number}{suffix}"
        server(output, *kill, code=-signal.SIGKILL)
        if output.exists():  # under its name it is whole
            assert output.read_bytes() == whole[suffix], kill
        server(output)
        assert output.read_bytes() == whole[suffix], kill
        assert [name for name in names(folder) if name.startswith(".")] == [], kill
    output = folder / f"again{suffix}"
    for _ in range(4):  # two writes a run: a slice and its mark
        server(output, "after", "_write_at", 2, code=-signal.SIGKILL)
        assert not output.exists()
    server(output)
    assert output.read_bytes() == whole[suffix]


def test_killed_once(tiny_llama_dir, texts, whole, tmp_path):
    """The short form of the test above; what had been encoded is not encoded again."""
    output = tmp_path / "out" / "e.npy"
    output.parent.mkdir()
    run(tiny_llama_dir, texts, output, "half", "_write_at", 5, code=-signal.SIGKILL)
    folder = output.parent / ".e.npy.partial"
    assert names(output.parent) == [".e.npy.partial"]
    assert (folder / "done").read_bytes() == b"\1\1\0\0"
    run(tiny_llama_dir, texts, output, "after", "_write_at", 4, code=-signal.SIGKILL)  # the two that were left
    assert (folder / "done").read_bytes() == b"\1\1\1\1"
    run(tiny_llama_dir, texts, output)
    assert output.read_bytes() == whole[".npy"] and names(output.parent) == ["e.npy", "e.npy.json"]


def test_two_processes_are_one(tiny_llama_dir, texts, whole, tmp_path):
    """Also when the corpus was begun by one that was killed."""
    output = tmp_path / "out" / "e.npy"
    output.parent.mkdir()
    run(tiny_llama_dir, texts, output, size=2)
    assert output.read_bytes() == whole[".npy"] and names(output.parent) == ["e.npy", "e.npy.json"]
    output = output.with_name("killed.npy")
    run(tiny_llama_dir, texts, output, "after", "_write_at", 2, code=-signal.SIGKILL)
    run(tiny_llama_dir, texts, output, size=2)
    assert output.read_bytes() == whole[".npy"]


def stopped(encoder, texts, path, monkeypatch, **settings):
    """A call that ends after two slices."""
    with monkeypatch.context() as patch:
        write, calls = corpus_files.CorpusFiles.write, []

        def stop(self, *arguments):
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(write(self, *arguments))

        patch.setattr(corpus_files.CorpusFiles, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            encode_corpus(encoder, texts, path, **{**SETTINGS, **settings})


def test_another_budget_may_go_on(encoder, texts, whole, tmp_path, monkeypatch):
    """As after a device ran out of memory."""
    stopped(encoder, texts, tmp_path / "e.npy", monkeypatch)
    path = encode_corpus(encoder, texts, tmp_path / "e.npy", **{**SETTINGS, "tokens_per_batch": 30})
    expected = np.load(tmp_path / "e.npy")
    np.testing.assert_allclose(encoder.encode(texts, instruction="Find:"), expected, rtol=0, atol=1e-5)
    assert path.stat().st_size == len(whole[".npy"])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("done", lambda data: data[:-1], "not a 0 or 1 for each of 4 slices"),  # the last one would be zeros
        ("done", lambda data: data + b"\1", "not a 0 or 1 for each of 4 slices"),
        ("done", lambda data: b"\3" + data[1:], "not a 0 or 1 for each of 4 slices"),
        ("vectors.npy", lambda data: data[:-4], "not an array"),
        ("vectors.npy", lambda data: data + bytes(64), "not an array"),  # rows would be written to the wrong place
        ("vectors.npy", lambda data: data.replace(b"<f4", b"<i4"), "not an array"),
        ("vectors.npy", lambda data: b"", "not an array"),
    ],
)
def test_a_damaged_beginning_is_not_gone_on_with(encoder, texts, whole, tmp_path, monkeypatch, name, change, message):
    path = tmp_path / "e.npy"
    stopped(encoder, texts, path, monkeypatch)
    folder = path.with_name(".e.npy.partial")
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(RunError, match=f"{message}.*begin anew"):
        encode_corpus(encoder, texts, path, **SETTINGS)
    encode_corpus(encoder, texts, path, **SETTINGS, overwrite=True)
    assert path.read_bytes() == whole[".npy"]


def test_a_mark_without_rows_does_not_count(encoder, texts, whole, tmp_path, monkeypatch):
    path = tmp_path / "e.npy"
    stopped(encoder, texts, path, monkeypatch)
    marks = path.with_name(".e.npy.partial") / "done"
    assert sum(marks.read_bytes()) == 2
    marks.write_bytes(b"\1" * len(marks.read_bytes()))  # the rows of two are the zeros that were reserved
    encode_corpus(encoder, texts, path, **SETTINGS)
    assert path.read_bytes() == whole[".npy"]


@pytest.mark.parametrize("complete", [False, True])
def test_never_a_mixture(encoder, tiny_mistral_dir, texts, tmp_path, monkeypatch, complete):
    """Texts, model or settings that differ are refused, named, and leave everything as it was."""
    path = tmp_path / "e.npy"
    if complete:
        encode_corpus(encoder, texts, path, **SETTINGS)
    else:
        stopped(encoder, texts, path, monkeypatch)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    other = [*texts[:-1], "y"]
    for model, given, settings, message in (
        (encoder, other, {}, "texts.blake2b"),
        (encoder, texts[:-1], {}, r"texts.count \(was 30, now 29\)"),
        (encoder, [texts[0] + texts[1][:3], texts[1][3:], *texts[2:]], {}, "texts.blake2b"),
        (encoder, texts, {"instruction": "Seek:"}, r"settings.instruction \(was 'Find:', now 'Seek:'\)"),
        (encoder, texts, {"normalize_embeddings": True}, "settings.normalize_embeddings"),
        (encoder, texts, {"dtype": "float16"}, "settings.dtype"),
        (encoder, texts, {"max_text_length": 5}, "settings.max_text_length"),
        (encoder, texts, {"slice_texts": 9}, "settings.slice_texts"),
        (Encoder.from_pretrained(tiny_mistral_dir), texts, {}, "model"),
    ):
        with pytest.raises(RunError, match=message):
            encode_corpus(model, given, path, **{**SETTINGS, **settings})
    embedding = encoder.model.embed_tokens.weight
    with torch.no_grad():  # the smallest change of one weight
        kept = embedding[3, 5].clone()
        embedding[3, 5] = torch.nextafter(kept, kept + 1)
        with pytest.raises(RunError, match=r"model\.model_crc32"):
            encode_corpus(encoder, texts, path, **SETTINGS)
        embedding[3, 5] = kept
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    encode_corpus(encoder, texts, path, **SETTINGS)
    encode_corpus(encoder, other, path, overwrite=True, **SETTINGS)
    expected = encoder.encode(other, instruction="Find:")
    np.testing.assert_allclose(np.load(path), expected, rtol=0, atol=1e-5)
    assert names(tmp_path) == ["e.npy", "e.npy.json"]


def test_a_whole_file_is_not_made_again(encoder, texts, tmp_path, monkeypatch):
    path = encode_corpus(encoder, texts, tmp_path / "e.npy", **SETTINGS)
    monkeypatch.setattr(Encoder, "hidden_states", None)
    assert encode_corpus(encoder, texts, path, **SETTINGS) == path


def test_overwriting_leaves_the_old_file_until_the_new_is_whole(encoder, texts, whole, tmp_path, monkeypatch):
    path = encode_corpus(encoder, texts[:9], tmp_path / "e.npy", **SETTINGS)
    old = path.read_bytes()
    stopped(encoder, texts, path, monkeypatch, overwrite=True)
    assert path.read_bytes() == old
    encode_corpus(encoder, texts, path, **SETTINGS)  # goes on
    assert path.read_bytes() == whole[".npy"] and names(tmp_path) == ["e.npy", "e.npy.json"]


def test_a_file_of_somebody_else(encoder, texts, tmp_path):
    (tmp_path / "e.npy").write_bytes(b"mine")
    with pytest.raises(RunError, match=r"e\.npy: holds other embeddings \(made by something else\)"):
        encode_corpus(encoder, texts, tmp_path / "e.npy")
    assert (tmp_path / "e.npy").read_bytes() == b"mine" and names(tmp_path) == ["e.npy"]


def test_full_disks(encoder, texts, whole, tmp_path, monkeypatch):
    path = tmp_path / "e.npy"
    with monkeypatch.context() as patch:
        patch.setattr(corpus_files.shutil, "disk_usage", lambda *_: SimpleNamespace(total=1, used=1, free=1000))
        with pytest.raises(RunError, match=r"30 embeddings take 0\.00 GiB, but 0\.00 GiB are free"):
            encode_corpus(encoder, texts, path, **SETTINGS)
    assert names(tmp_path) == []

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(corpus_files, "_reserve", full)
        with pytest.raises(RunError, match="the disk is full"):
            encode_corpus(encoder, texts, path, **SETTINGS)
    write, calls = corpus_files._write_at, []
    with monkeypatch.context() as patch:
        patch.setattr(corpus_files, "_write_at", lambda *x: full() if len(calls) == 3 else calls.append(write(*x)))
        with pytest.raises(RunError, match="the disk is full; what has been encoded is kept"):
            encode_corpus(encoder, texts, path, **SETTINGS)
    assert not path.exists()
    encode_corpus(encoder, texts, path, **SETTINGS)
    assert path.read_bytes() == whole[".npy"]


def test_file_systems_that_promise_no_space(encoder, texts, whole, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert encode_corpus(encoder, texts, tmp_path / "e.npy", **SETTINGS).read_bytes() == whole[".npy"]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["a", 3], {}, "text 1 is int, expected a str"),
        (["a"] * 9 + [None], {"slice_texts": 4}, "text 9 is NoneType"),
        (["a", "b\ud83d"], {}, "text 1: '.*ud83d' is half of a surrogate pair"),
        ([], {}, "holds no texts"),
        ("one text", {}, "the corpus is str, expected a list"),
        ((text for text in "ab"), {}, "the corpus is generator"),
        (["a"], {"path": "e.bin"}, r"written as \.npy or \.parquet"),
        (["a"], {"path": "nowhere/e.npy"}, "nowhere does not exist"),
        (["a"], {"path": "e.parquet", "dtype": "float16"}, "float16 in an .npy"),
        (["a"], {"dtype": "int8"}, "dtype int8"),
        (["a"], {"slice_texts": 0}, "slice_texts is 0"),
        (["a"], {"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        (["a"], {"max_text_length": 0}, "max_text_length is 0"),
        (["a"], {"ids": ["x"]}, "a .parquet file to hold them"),
        (["a"], {"path": "e.parquet", "ids": ["x", "y"]}, "2 ids for 1 texts"),
    ],
)
def test_refused_before_any_work(encoder, tmp_path, texts, options, message):
    path = tmp_path / options.get("path", "e.npy")
    with pytest.raises(BivecError, match=message):
        encode_corpus(encoder, texts, path, **{k: v for k, v in options.items() if k != "path"})
    assert names(tmp_path) == []


def test_embeddings_that_are_no_numbers(encoder, tiny_llama_dir, tmp_path):
    model = Encoder.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        model.model.norm.weight *= 1e6
    texts = ["a", "b", "c"]
    with pytest.raises(RunError, match="text 0: its embedding is too large for float16"):
        encode_corpus(model, texts, tmp_path / "e.npy", dtype="float16")
    with torch.no_grad():
        model.model.embed_tokens.weight[model.tokenizer("c").input_ids[-1]] = torch.nan
    with pytest.raises(RunError, match="text 2: its embedding is NaN"):
        encode_corpus(model, texts, tmp_path / "f.npy", slice_texts=2)


def test_tables_are_read_slice_by_slice(encoder, texts, tmp_path):
    """Of a table no more texts are in memory than two slices have."""
    file = tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    column = load_texts(file)
    assert not isinstance(column, list)
    path = encode_corpus(encoder, column, tmp_path / "e.npy", slice_texts=8)
    np.testing.assert_allclose(np.load(path), encoder.encode(texts), rtol=0, atol=1e-5)


def test_what_an_output_cannot_be(encoder, texts, tmp_path, monkeypatch):
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.npy is a folder; give the name of a file"):
        encode_corpus(encoder, texts, tmp_path / "folder.npy", **SETTINGS)
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"e\.parquet: Parquet needs the package pyarrow: pip install pyarrow"):
        encode_corpus(encoder, texts, tmp_path / "e.parquet", **SETTINGS)
    assert names(tmp_path) == ["folder.npy"]
