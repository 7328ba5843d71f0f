"""Files in, token ids out: what is read, how it is cut, and which errors name which line."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest

from bivec.engine import data
from bivec.engine.data import load_sts, load_texts, mntp_blocks, sentence_ids
from bivec.engine.errors import DataError

SAMPLES = Path(__file__).parents[2] / "recipes" / "data"
PARAGRAPHS = SAMPLES / "wikitext2_paragraphs.txt.gz"


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    """The cache of ``datasets`` away from the home of whoever runs the tests."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, ``<s>`` (id 0) in front of every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_samples_hold_what_the_readme_says():
    counts = {"wikitext2_paragraphs.txt.gz": 2381, "wikipedia_sentences.txt.gz": 4825}
    for name, count in counts.items():
        texts = load_texts(SAMPLES / name)
        assert len(texts) == len(list(filter(str.strip, texts))) == count
        assert not any("<unk>" in text or " @" in text for text in texts)
    sentences = load_texts(SAMPLES / "wikipedia_sentences.txt.gz")
    assert len(set(sentences)) == len(sentences)
    assert all(6 <= len(sentence.split()) <= 60 for sentence in sentences)
    assert len(load_sts(SAMPLES / "stsb_dev.csv.gz")) == 1500
    assert len(load_sts(SAMPLES / "stsb_test.csv.gz")) == 1379
    assert sum(file.stat().st_size for file in SAMPLES.glob("*.gz")) < 1_500_000


def test_build_script_makes_text_from_tokens(tmp_path):
    wikitext = tmp_path / "wiki.txt"
    wikitext.write_text(
        " \n = Crab = \n \n"
        ' The crab ( <unk> ) swims . It weighs 1 @.@ 5 kg ( 3 lb ) and , by " law " , is well @-@ known in No. 2 ! \n'
        ' He said " Stop it now , all of you . " Then it left the players \' home at 20 – 30 km / h . \n'
    )
    pairs = tmp_path / "pairs.csv"
    pairs.write_text('A b.,"C, d.",2.5\n')
    command = [sys.executable, str(SAMPLES / "build.py"), "--wikitext", str(wikitext), "--stsb-dev", str(pairs)]
    digests = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        subprocess.run([*command, "--stsb-test", str(pairs), "--output-dir", str(tmp_path / folder)], check=True)
        digests.append([hashlib.sha256(file.read_bytes()).digest() for file in sorted((tmp_path / folder).iterdir())])
    assert digests[0] == digests[1]
    expected = [
        'It weighs 1.5 kg (3 lb) and, by "law", is well-known in No. 2!',
        'He said "Stop it now, all of you."',
        "Then it left the players' home at 20–30 km/h.",
    ]
    assert load_texts(tmp_path / "one" / "wikipedia_sentences.txt.gz") == expected
    assert load_texts(tmp_path / "one" / "wikitext2_paragraphs.txt.gz") == [expected[0], " ".join(expected[1:])]
    assert load_sts(tmp_path / "one" / "stsb_dev.csv.gz") == [data.STSPair("A b.", "C, d.", 2.5)]


TEXTS = ["first, with a comma", "zweitens „groß“", "", "NA", "last"]


def write_table(path: Path, texts: list[str]) -> Path:
    """The texts as column ``text`` beside a column ``title``, in the format of the suffix."""
    rows = [{"title": f"t{i}", "text": text} for i, text in enumerate(texts)]
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
        return path
    content = {
        "txt": lambda: "".join(text + "\n" for text in texts),
        "jsonl": lambda: "".join(json.dumps(row) + "\n" for row in rows),
        "json": lambda: json.dumps(rows),
        "csv": lambda: "title,text\n" + "".join(f'{row["title"]},"{row["text"]}"\n' for row in rows),
        "tsv": lambda: "title\ttext\n" + "".join(f"{row['title']}\t{row['text']}\n" for row in rows),
    }[kind]()
    encoded = content.encode("utf-8")
    path.write_bytes(gzip.compress(encoded) if path.suffix == ".gz" else encoded)
    return path


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "jsonl", "jsonl.gz", "json", "csv", "csv.gz", "tsv", "parquet"])
def test_every_format_gives_the_same_texts(tmp_path, suffix):
    folder = tmp_path / "my [data]"  # the brackets must not be read as a pattern
    folder.mkdir()
    path = write_table(folder / f"rows.{suffix}", TEXTS)
    texts = load_texts(path)
    assert list(texts) == TEXTS
    assert texts[1] == TEXTS[1] and list(texts[1:4]) == TEXTS[1:4] and len(texts) == len(TEXTS)
    assert list(load_texts(path, drop_empty=True, limit=3)) == ["first, with a comma", "zweitens „groß“", "NA"]
    assert [file.name for file in folder.iterdir()] == [path.name]  # nothing is left beside the user's file


def test_line_ends_and_byte_order_mark_are_not_text(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes("\ufeffone\r\ntwo".encode())
    assert load_texts(path) == ["one", "two"]


def test_columns(tmp_path):
    path = write_table(tmp_path / "rows.jsonl", ["a", "b"])
    assert list(load_texts(path, column="title")) == ["t0", "t1"]
    with pytest.raises(DataError, match=r"\['title', 'text'\].*'body' is not one of them"):
        load_texts(path, column="body")
    other = tmp_path / "other.jsonl"
    other.write_text('{"sentence": "only one", "score": 3}\n')
    assert list(load_texts(other)) == ["only one"]
    other.write_text('{"sentence": "x", "other": "y", "score": 3}\n')
    with pytest.raises(DataError, match=r"which column.*none named 'text' and not just one; all: sentence \(string\)"):
        load_texts(other)
    with pytest.raises(DataError, match="'score' is not one of them"):
        load_texts(other, column="score")
    other.write_text('{"text": "x"}\n{"text": null}\n')
    with pytest.raises(DataError, match="1 of 2 rows have no value"):
        load_texts(other)
    with pytest.raises(DataError, match="has no column"):
        load_texts(write_table(tmp_path / "rows.txt", ["a"]), column="text")


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "jsonl", "csv", "json"])
def test_bad_bytes_are_named_with_file_and_line(tmp_path, suffix):
    path = tmp_path / f"latin.{suffix}"
    content = b"text\nfine\ncaf\xe9\n"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(DataError, match=rf"latin.{suffix}, line 3: not UTF-8 \(byte 0xe9 at column 4\)"):
        load_texts(path)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "json"])
@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_files(tmp_path, suffix, content):
    path = tmp_path / f"empty.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"empty.{suffix} is empty: give --mntp-data a .txt file"):
        load_texts(path, argument="--mntp-data")


def test_broken_files(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(DataError, match=r"bad.jsonl cannot be read as jsonl"):
        load_texts(bad)
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"bad.parquet cannot be read as parquet"):
        load_texts(bad)
    cut = tmp_path / "cut.txt.gz"
    cut.write_bytes(PARAGRAPHS.read_bytes()[:20_000])
    with pytest.raises(DataError, match=r"cut.txt.gz: broken gzip file after line \d+"):
        load_texts(cut)
    header_only = tmp_path / "header.csv"
    header_only.write_text("text\n")
    with pytest.raises(DataError, match=r"header.csv"):
        load_texts(header_only)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"number,text\n1,a,b\n2,c,d\n", "line 2: 3 columns instead of 2"),  # pandas takes the first for an index
        (b"number,text\n1,a\n2\n", "line 3: 1 columns instead of 2"),
        (b"text,text\na,b\n", "line 1: the column 'text' is there twice"),
        (b"text" + b"," * 200_000 + b"\na\n", "line 1: 200001 columns, more than 10000"),
        (b"number,text\n" + b"," * 200_000, "line 2: 200001 columns"),  # pandas takes minutes
        ("number,text\n1,a\n".encode("utf-16-le"), "line 1: a NUL character: no text, or UTF-16"),
    ],
)
def test_tables_that_pandas_would_bend(tmp_path, content, message):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.csv, {message}"):
        load_texts(tmp_path / "bad.csv", column="text")


@pytest.mark.parametrize("blank", ["", "   ", " \t"])
def test_blank_lines_of_a_table_are_no_rows(tmp_path, blank):
    (tmp_path / "a.csv").write_text(f"text,label\nhello,1\n{blank}\nworld,2\n{blank}")
    assert list(load_texts(tmp_path / "a.csv", column="text")) == ["hello", "world"]


def test_a_cell_may_be_longer_than_the_csv_module_thinks(tmp_path):
    (tmp_path / "long.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert [len(text) for text in load_texts(tmp_path / "long.csv")] == [200_000]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("brackets", ["[", '{"a":', "[\n"])
def test_deep_nesting_does_not_end_the_process(tmp_path, name, brackets):
    """pyarrow's parser runs out of its stack."""
    content = ('{"text": "a", "more": ' + brackets * 20_000).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=f"{name}.*(nested more than 200 deep|cannot be read)"):
        load_texts(tmp_path / name)


def test_brackets_in_strings_are_no_nesting(tmp_path):
    rows = [{"text": "[" * 1000 + '\\"' + "{" * 1000}] * 3
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.json", "a.jsonl"):
        assert list(load_texts(tmp_path / name)) == [rows[0]["text"]] * 3


def test_columns_without_a_name_may_be_several(tmp_path):
    (tmp_path / "a.csv").write_text("text,,\na,1,2\n")
    assert list(load_texts(tmp_path / "a.csv")) == ["a"]


def test_parquet_strings_that_are_no_text(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = pa.array([b"fine", b"\xff\xfe"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet \(ArrowInvalid"):
        load_texts(tmp_path / "a.parquet")


def test_nul_characters_are_named_with_the_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntw\0o\n")
    with pytest.raises(DataError, match=r"a\.txt, line 2: a NUL character"):
        load_texts(tmp_path / "a.txt")


@pytest.mark.parametrize("source", ["missing.txt", "dir/missing.jsonl.gz", "/no/such/file", "~/nothing/here", "a b"])
def test_missing_files_never_reach_the_hub(source, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match=r"does not exist: give --simcse-data a .txt file with one text a line"):
        load_texts(source, argument="--simcse-data")


def test_folders_and_unknown_kinds(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        load_texts(tmp_path)
    (tmp_path / "text.docx").write_text("x")
    with pytest.raises(DataError, match="kind that is not read"):
        load_texts(tmp_path / "text.docx")


@pytest.mark.parametrize(
    ("source", "name", "selection"),
    [
        ("wikitext", "wikitext", {"name": None}),
        ("Salesforce/wikitext:wikitext-103-raw-v1", "Salesforce/wikitext", {"name": "wikitext-103-raw-v1"}),
        ("owner/sets.v1:wiki.txt", "owner/sets.v1", {"data_files": "wiki.txt"}),
    ],
)
def test_hub_ids(source, name, selection, monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, /, **options):
        calls.append((path, options))
        return datasets.Dataset.from_dict({"text": ["a", "", "b"]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(load_texts(source, split="validation")) == ["a", "", "b"]
    assert calls == [(name, {"split": "validation", **selection})]


def test_unreachable_hub_says_what_to_give_instead(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach 'wikitext' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"wikitext.*raw.*Couldn't reach.*: give --mntp-data a .txt file with one text"):
        load_texts("wikitext:raw", argument="--mntp-data")


def test_plain_text_needs_no_datasets():
    code = "import sys; sys.modules['datasets'] = None; from bivec.engine.data import load_texts, load_sts\n"
    code += (
        f"assert len(load_texts({str(PARAGRAPHS)!r}, limit=5)) == 5; load_sts({str(SAMPLES / 'stsb_dev.csv.gz')!r})\n"
    )
    code += "assert 'transformers' not in sys.modules\n"
    code += "try: load_texts('wikitext')\nexcept ValueError as error: assert 'pip install datasets' in str(error)\n"
    code += "else: raise AssertionError"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_blocks_of_the_paper(tokenizer):
    """Every row with its BOS, groups cut and their remainder dropped: against the same in plain lists."""
    texts = load_texts(PARAGRAPHS, limit=7)
    texts = ["", *(text[:41] for text in texts)]
    blocks = mntp_blocks(texts, tokenizer, 16, group_size=3)
    expected = []
    for start in range(0, len(texts), 3):
        flat = list(chain.from_iterable(tokenizer(text).input_ids for text in texts[start : start + 3]))
        expected += [flat[at : at + 16] for at in range(0, len(flat) - 15, 16)]
    assert blocks.input_ids.tolist() == expected
    assert blocks.input_ids[0, :2].tolist() == [0, 0]  # the empty row is a lone BOS
    assert blocks.block_size == 16 and len(blocks) == len(expected)
    np.testing.assert_array_equal(blocks.special_mask, blocks.input_ids == 0)


@pytest.mark.parametrize("rows_per_call", [2, 1000])
def test_blocks_with_a_bos_each(tokenizer, rows_per_call, monkeypatch):
    monkeypatch.setattr(data, "TOKENIZE_ROWS", rows_per_call)
    texts = [text[:50] for text in load_texts(PARAGRAPHS, limit=9)]
    blocks = mntp_blocks(texts, tokenizer, 16, per_block_bos=True)
    flat = iter(tokenizer("".join(texts), add_special_tokens=False).input_ids)
    expected = []
    while len(body := list(islice(flat, 15))) == 15:
        expected.append([0, *body])
    assert blocks.input_ids.tolist() == expected
    assert blocks.special_mask[:, 0].all() and not blocks.special_mask[:, 1:].any()


def test_blocks_refuse_what_cannot_be_cut(tokenizer):
    with pytest.raises(DataError, match="2 rows of text with 8 tokens do not fill one block of 9"):
        mntp_blocks(["abc", "def"], tokenizer, 9)
    with pytest.raises(ValueError, match="block_size > 1"):
        mntp_blocks(["abc"], tokenizer, 1, per_block_bos=True)


def test_sentences_are_cut_at_the_tail(tokenizer):
    texts = ["abcdef", " ab ", "abcdefg"]
    sentences = sentence_ids(texts, tokenizer, 6)
    whole = [tokenizer(text.strip()).input_ids for text in texts]
    assert [sentences[i] for i in range(len(sentences))] == [ids[:6] for ids in whole]
    assert sentences.lengths.tolist() == [6, 3, 6]
    assert list(sentences) == [ids[:6] for ids in whole]
    with pytest.raises(DataError, match=r"text 1 .* is empty"):
        sentence_ids(["a", " ", "b"], tokenizer, 6)


def test_sts_forms(tmp_path):
    path = tmp_path / "pairs.csv"
    expected = [data.STSPair("a, b", "c", 5.0), data.STSPair("d", "e", 0.0)]
    for content in ('"a, b",c,5.0\nd,e,0\n', 'score,id,sentence2,sentence1\n5,1,c,"a, b"\n\n0,2,e,d\n'):
        path.write_text(content)
        assert load_sts(path) == expected
    tabs = tmp_path / "pairs.tsv"
    tabs.write_text("a, b\tc\t5\nd\te\t0\n")
    assert load_sts(tabs) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b,1\nc,d,5.5\n", "line 2: the score is '5.5'"),
        (b"a,b,1\nc,d,nan\n", "line 2: the score is 'nan'"),
        (b"a,b,1\nc,d,high\n", "line 2: the score is 'high'"),
        (b"a,b,1\n\nc,d\n", "line 3: 2 columns instead of 3"),
        (b"a,b,1\nc,\xff,2\n", "line 2: not UTF-8"),
        (b"sentence1,sentence2,score\nsentence1,sentence2,score\na,b,1\n", "line 2: the score is 'score'"),
        (b"", "holds no sentence pairs"),
        (b"sentence1,sentence2,score\n", "holds no sentence pairs"),
    ],
)
def test_bad_sts_files_are_named_with_the_line(tmp_path, content, message):
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"pairs.csv,? ?{message}"):
        load_sts(path)
    with pytest.raises(DataError, match="no file"):
        load_sts(tmp_path / "missing.csv")


def test_a_line_end_that_csv_does_not_know_is_named(tmp_path):
    (tmp_path / "pairs.csv").write_bytes(b"a,b,1\nc\rd,e,2\n")
    with pytest.raises(DataError, match=r"pairs\.csv, line 2: not a CSV file \(new-line character"):
        load_sts(tmp_path / "pairs.csv")


def test_sentences_are_counted_from_0_and_not_from_the_end():
    sentences = data.SentenceDataset(np.array([7, 8, 9], np.int32), np.array([0, 2, 3]))
    assert [*sentences] == [[7, 8], [9]] and sentences.lengths.tolist() == [2, 1]
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"sentence {index} of 2"):
            sentences[index]


def test_a_table_of_blank_texts_holds_none(tmp_path):
    (tmp_path / "t.csv").write_text('text,n\n" ",1\n"",2\n')
    with pytest.raises(DataError, match=r"t\.csv holds no texts: give"):
        load_texts(tmp_path / "t.csv", column="text", drop_empty=True)
