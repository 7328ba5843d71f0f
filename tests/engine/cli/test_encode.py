"""bivec encode: Encoder.encode's vectors from every kind of file, and what it refuses."""

import csv
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bivec.engine.encoder import Encoder

TEXTS = ["a choir sang", "the river runs north", "None", "old kings", "a ship, sailed"]


@pytest.fixture(scope="module")
def encoder(tiny_llama_dir):
    return Encoder.from_pretrained(tiny_llama_dir)


def write(folder, kind):
    """TEXTS as a file of this kind, with names beside them where it is a table."""
    file = folder / f"texts{kind}"
    rows = [{"docid": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]
    opener = gzip.open if kind.endswith(".gz") else open
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file
    with opener(file, "wt", encoding="utf-8", newline="") as lines:
        if kind.startswith(".txt"):
            lines.write("".join(f"{text}\n" for text in TEXTS))
        elif kind.startswith(".jsonl"):
            lines.write("".join(json.dumps(row) + "\n" for row in rows))
        else:
            table = csv.DictWriter(lines, ["docid", "text"], delimiter="\t" if ".tsv" in kind else ",")
            table.writeheader()
            table.writerows(rows)
    return file


def vectors_of(path):
    if path.suffix == ".npy":
        return np.load(path)
    return np.array(pq.read_table(path)["embedding"].to_pylist(), dtype=np.float32)


@pytest.mark.parametrize("kind", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".parquet"])
@pytest.mark.parametrize("output", ["e.npy", "e.parquet"])
def test_every_kind_of_file(bivec_json, encoder, tiny_llama_dir, tmp_path, kind, output):
    document = bivec_json("encode", tiny_llama_dir, write(tmp_path, kind), "-o", tmp_path / output)
    assert isinstance(document.pop("seconds"), float)
    assert document == {
        "output": str(tmp_path / output),
        "texts": 5,
        "dimension": 64,
        "dtype": "float32",
        "normalized": False,
    }
    np.testing.assert_allclose(vectors_of(tmp_path / output), encoder.encode(TEXTS), rtol=0, atol=1e-5)


def test_the_flags_of_a_vector(bivec, tiny_llama_dir, tmp_path):
    """Instruction, length, unit length, pooling and dtype are those of Encoder."""
    encoder = Encoder.from_pretrained(tiny_llama_dir, pooling="last_token", max_length=9)
    flags = ["--instruction", "Find:", "--normalize", "--pooling", "last_token", "--max-length", "9"]
    flags += ["--max-text-length", "3", "--output-dtype", "float16", "--dtype", "float32", "--device", "cpu"]
    printed, _ = bivec("encode", tiny_llama_dir, write(tmp_path, ".txt"), "-o", tmp_path / "e.npy", *flags)
    assert printed.startswith(f"{tmp_path / 'e.npy'}: 5 embeddings of 64, ")
    expected = encoder.encode(TEXTS, instruction="Find:", max_text_length=3, normalize_embeddings=True)
    found = np.load(tmp_path / "e.npy")
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_a_prompt_by_its_name(bivec, encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "model", prompts={"query": "Find the answer:", "topic": "Name it:"})
    file = write(tmp_path, ".txt")
    bivec("encode", tmp_path / "model", file, "-o", tmp_path / "e.npy", "--prompt", "query")
    expected = encoder.encode(TEXTS, prompt="Find the answer:")
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), expected, rtol=0, atol=1e-5)
    start = ["encode", tmp_path / "model", file, "-o", tmp_path / "f.npy", "--prompt"]
    assert "--prompt passage: " in bivec(*start, "passage", code=1)[1]
    assert "keeps query, topic; give --instruction" in bivec(*start, "passage", code=1)[1]
    assert "say the same thing" in bivec(*start, "query", "--instruction", "Find:", code=1)[1]


def test_standard_input(process, encoder, tiny_llama_dir, tmp_path):
    """A text a line, empty ones included; stdout is the document alone."""
    words = ("encode", tiny_llama_dir, "-", "-o", "e.npy", "--json")
    done = process(*words, input="a choir sang\n\nold kings")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["texts"] == 3
    expected = encoder.encode(["a choir sang", "", "old kings"])
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), expected, rtol=0, atol=1e-5)
    for given, flags, message in (
        ("", (), "the corpus holds no texts"),
        ("a\n", ("--column", "text"), "standard input is plain text"),
        ("a\n\udcef\n", (), "standard input, line 2: not UTF-8 (column 1)"),
    ):
        done = process(*words, *flags, input=given, errors="surrogateescape")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"bivec: error: {message}")


def test_a_file_that_is_there_is_not_made_again(bivec, tiny_llama_dir, tmp_path):
    file, output = write(tmp_path, ".jsonl"), tmp_path / "e.npy"
    command = ["encode", tiny_llama_dir, file, "-o", output]
    bivec(*command)
    before = output.stat().st_mtime_ns
    bivec(*command)
    assert output.stat().st_mtime_ns == before
    said = bivec(*command, "--instruction", "Find:", code=1)[1]
    assert "holds other embeddings" in said and "--overwrite" in said and output.stat().st_mtime_ns == before
    bivec(*command, "--instruction", "Find:", "--overwrite")
    assert output.stat().st_mtime_ns > before


def test_ids_and_a_limit(bivec, tiny_llama_dir, tmp_path):
    flags = ["--id-column", "docid", "--column", "text", "--limit", "2"]
    bivec("encode", tiny_llama_dir, write(tmp_path, ".csv.gz"), "-o", tmp_path / "e.parquet", *flags)
    assert pq.read_table(tmp_path / "e.parquet")["id"].to_pylist() == ["d0", "d1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "--limit is 0"),
        (["--device", "xpu"], "--device xpu: not usable here"),
        (["--max-length", "5000"], "max_length 5000 exceeds the 1024 positions"),
        (["--adapter", "absent"], "absent"),
        (["-o", "e.txt"], "embeddings are written as .npy or .parquet"),
    ],
)
def test_bad_flags(bivec, tiny_llama_dir, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    printed, said = bivec("encode", tiny_llama_dir, write(tmp_path, ".txt"), "-o", "e.npy", *flags, code=1)
    assert printed == "" and said.startswith("bivec: error: ") and message in said
    assert not list(tmp_path.glob("*e.npy*"))
