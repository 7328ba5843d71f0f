"""Triples from files and tables: what is read, that nothing is held, and which errors name which line and field."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from bivec.engine.errors import DataError
from bivec.engine.triples import ECHO_INSTRUCTIONS, Triple, TripleSet, load_triples

GOOD = {"query": "q", "positive": "p"}


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    """The cache of ``datasets`` away from the home of whoever runs the tests."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def load_one(source, **options) -> TripleSet:
    [triples] = load_triples(source, **options)
    return triples


def test_every_form_of_a_row(tmp_path):
    rows = [
        {"query": "none", "positive": "p", "score": 0.3, "meta": {"unknown": [1]}},
        {"query": "one", "positive": "p", "negative": "n"},
        {"query": "empty", "positive": "p", "negatives": []},
        {"query": "two", "positive": "p", "negatives": ["n", "m"], "instruction": " Find it ", "negative": None},
        {"query": "ids", "positive": "p", "negatives": ["n", "m"], "positive_id": 7, "negative_ids": [8, "nine"]},
        {"query": "id", "positive": "p", "negative": "n", "positive_id": "d1", "negative_id": 0},
        {"query": " kept as it is ", "positive": "p", "instruction": "", "positive_id": None, "negative_ids": None},
    ]
    triples = load_one(write_jsonl(tmp_path / "my.set.jsonl", rows))
    assert list(triples) == [
        Triple("none", "p"),
        Triple("one", "p", ("n",)),
        Triple("empty", "p"),
        Triple("two", "p", ("n", "m"), "Find it"),
        Triple("ids", "p", ("n", "m"), "", "7", ("8", "nine")),
        Triple("id", "p", ("n",), "", "d1", ("0",)),
        Triple(" kept as it is ", "p"),
    ]
    assert (triples.name, triples.bad_lines, len(triples)) == ("my.set", 0, 7)
    for row in (7, -1):
        with pytest.raises(IndexError, match=rf"triple {row} of 7 of my.set"):
            triples[row]


BAD_ROWS = [
    ('{"query": "q", "positive":', "not JSON (Expecting value at column 27)"),
    ("[" * 100_000, "not JSON that can be read"),
    ("[1]", "a row must be an object with query and positive, this is a list"),
    ('{"positive": "p"}', "the field 'query' must be a string, this is missing"),
    ('{"query": null, "positive": "p"}', "the field 'query' must be a string, this is missing"),
    ('{"query": "q"}', "the field 'positive' must be a string, this is missing"),
    ('{"query": "q", "positive": " \\n"}', "the field 'positive' is blank"),
    ('{"query": "", "positive": "p"}', "the field 'query' is blank"),
    ('{"query": 3, "positive": "p"}', "the field 'query' must be a string, this is a number"),
    ('{"query": ["q"], "positive": "p"}', "the field 'query' must be a string, this is a list"),
    ('{"query": "q\\ud83d", "positive": "p"}', "the field 'query' holds half a surrogate pair at character 1"),
    ('{"query": "q", "positive": "p", "negative": ["n"]}', "the field 'negative' must be a string, this is a list"),
    ('{"query": "q", "positive": "p", "negative": ""}', "the field 'negative' is blank"),
    ('{"query": "q", "positive": "p", "negatives": "n"}', "the field 'negatives' must be a list, this is a string"),
    ('{"query": "q", "positive": "p", "negatives": ["n", " "]}', "the field 'negatives[1]' is blank"),
    ('{"query": "q", "positive": "p", "negatives": [null]}', "the field 'negatives[0]' must be a string"),
    (
        '{"query": "q", "positive": "p", "negative": "n", "negatives": []}',
        "the fields 'negative' and 'negatives' are both",
    ),
    ('{"query": "q", "positive": "p", "instruction": 1}', "the field 'instruction' must be a string"),
    ('{"query": "q", "positive": "p", "positive_id": 1.0}', "the field 'positive_id' must be a string or an integer"),
    (
        '{"query": "q", "positive": "p", "positive_id": true}',
        "the field 'positive_id' must be a string or an integer, this is a boolean",
    ),
    ('{"query": "q", "positive": "p", "positive_id": ""}', "the field 'positive_id' is blank"),
    ('{"query": "q", "positive": "p", "negative_id": 1}', "1 ids of negatives for 0 negatives"),
    ('{"query": "q", "positive": "p", "negative": "n", "negative_ids": []}', "0 ids of negatives for 1 negatives"),
    (
        '{"query": "q", "positive": "p", "negatives": ["n", "m"], "negative_ids": [1, null]}',
        "the field 'negative_ids[1]' must be a string or an integer, this is missing",
    ),
]


@pytest.mark.parametrize(("line", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_rows_are_named_or_skipped(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n{json.dumps(GOOD)}\n")
    with pytest.raises(DataError) as error:
        load_triples(path)
    assert f"rows.jsonl, line 3: {message}" in str(error.value)
    assert "--on-bad-line skip" in str(error.value)
    triples = load_one(path, on_bad_line="skip")
    assert (list(triples), triples.bad_lines) == ([Triple("q", "p")] * 2, 1)


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"query": "q", "positive": "p"}\n{"query": "caf\xe9", "positive": "p"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl, line 2: not UTF-8 \(byte 0xe9 at column 15\)"):
        load_triples(path)
    assert load_one(path, on_bad_line="skip").bad_lines == 1


def test_one_malformed_line_in_100_000(tmp_path):
    path = tmp_path / "many.jsonl"
    lines = [f'{{"query": "{i}", "positive": "p"}}\n' for i in range(100_000)]
    lines[77_776] = '{"query": "77776, "positive": "p"}\n'
    path.write_text("".join(lines))
    with pytest.raises(DataError, match=r"many.jsonl, line 77777: not JSON \(Expecting ',' delimiter at column 20\)"):
        load_triples(path)
    triples = load_one(path, on_bad_line="skip")
    assert (len(triples), triples.bad_lines) == (99_999, 1)
    assert [triples[i].query for i in (0, 77_775, 77_776, 99_998)] == ["0", "77775", "77777", "99999"]
    assert len(pickle.dumps(triples)) < 8 * 100_000 + 2_000  # 8 bytes a row, and nothing of the text


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", ["", "\n"])
def test_offsets_are_right(tmp_path, ending, mark, last):
    """Multi-byte text, blank lines, a byte-order mark, a last line with and without its end."""
    queries = ["Zürich", "北京 🙂", "line\u2028separator", "x" * 5000, "end"]
    lines = [json.dumps({"query": query, "positive": "ß"}, ensure_ascii=False) for query in queries]
    lines[2:2] = ["", "  \t"]
    path = tmp_path / "rows.jsonl"
    path.write_bytes((mark + ending.join(lines) + last).encode())
    triples = load_one(path)
    assert [triples[i].query for i in (4, 0, 3, 1, 2)] == [queries[i] for i in (4, 0, 3, 1, 2)]
    assert [triple.positive for triple in triples] == ["ß"] * 5


def test_a_text_of_100_000_characters(tmp_path):
    text = "ü7" * 50_000
    path = write_jsonl(tmp_path / "long.jsonl", [GOOD, {**GOOD, "negatives": [text, "n"]}, GOOD])
    assert load_one(path)[1].negatives == (text, "n")


def test_skipped_rows_keep_the_order_and_the_row_numbers(tmp_path):
    """Runs of bad rows at the start, in the middle and at the end; the instruction follows the row of the file."""
    bad = {0, 1, 4, 6, 7, 8, 11}
    lines = ["broken" if i in bad else json.dumps({"query": str(i), "positive": "p"}) for i in range(12)]
    lines.insert(3, "")  # no row
    path = tmp_path / "allnli.jsonl"
    path.write_text("\n".join(lines))
    triples = load_one(path, on_bad_line="skip")
    good = [i for i in range(12) if i not in bad]
    assert [triple.query for triple in triples] == list(map(str, good))
    assert [triple.instruction for triple in triples] == [ECHO_INSTRUCTIONS["allnli"][i % 2] for i in good]
    assert triples.bad_lines == len(bad)


def test_an_echo_folder(tmp_path):
    for stem in (*ECHO_INSTRUCTIONS, "mine"):
        write_jsonl(tmp_path / f"{stem}.jsonl", [{"query": f"{stem} {i}", "positive": "p"} for i in range(3)])
    write_jsonl(tmp_path / "nq.jsonl", [GOOD, {**GOOD, "instruction": "Own"}, {**GOOD, "instruction": ""}])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "._nq.jsonl").write_bytes(b"\x00\x05\x16\x07 what macOS leaves")
    (tmp_path / "folder.jsonl").mkdir()
    sets = load_triples(tmp_path)
    assert len(ECHO_INSTRUCTIONS) == 14
    assert [triples.name for triples in sets] == sorted([*ECHO_INSTRUCTIONS, "mine"])
    found = {triples.name: [triple.instruction for triple in triples] for triples in sets}
    premise, similar = (
        "Given a premise, retrieve a hypothesis that is entailed by the premise",
        "Retrieve semantically similar text",
    )
    assert found["allnli"] == [premise, similar, premise]
    assert found["quora_duplicates"][1] == "Find questions that have the same meaning as the input question"
    assert found["squad"] == ["Retrieve Wikipedia passages that answer the question"] * 3
    assert found["nq"] == ["Given a question, retrieve Wikipedia passages that answer the question", "Own", ""]
    assert found["mine"] == [""] * 3
    assert {triples.name for triples in sets if triples[0].symmetric} == {"allnli", "quora_duplicates"}


def test_a_row_may_say_that_it_is_symmetric(tmp_path):
    """Against its set, and without one; a word is no answer."""
    path = write_jsonl(tmp_path / "allnli.jsonl", [{**GOOD, "symmetric": False}, {**GOOD, "symmetric": None}])
    assert [triple.symmetric for triple in load_triples(path)[0]] == [False, True]
    path = write_jsonl(tmp_path / "mine.jsonl", [{**GOOD, "symmetric": True}, GOOD])
    assert [triple.symmetric for triple in load_triples(path)[0]] == [True, False]
    path = write_jsonl(tmp_path / "bad.jsonl", [{**GOOD, "symmetric": "yes"}])
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1: the field 'symmetric' must be true or false"):
        load_triples(path)


def test_rows_that_the_echo_archive_holds_twice_are_taken_once(tmp_path):
    for stem in ("allnli", "allnli_split1", "allnli_split2", "quora_duplicates_split1", "mine_split1", "mine"):
        write_jsonl(tmp_path / f"{stem}.jsonl", [GOOD])
    with pytest.warns(UserWarning, match=r"left out allnli_split1.jsonl, allnli_split2.jsonl, whose rows"):
        names = [triples.name for triples in load_triples(tmp_path)]
    assert names == ["allnli", "mine", "mine_split1", "quora_duplicates_split1"]


def test_parquet(tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    rows = [
        {"query": "a", "positive": "p", "negatives": ["n", "m"], "positive_id": 1, "negative_ids": [2, 3], "x": 0.5},
        {"query": "b", "positive": "p", "negatives": [], "positive_id": None, "negative_ids": None, "x": 0.5},
        {"query": "c", "positive": "p", "negatives": None, "positive_id": 4, "negative_ids": [], "x": 0.5},
    ]
    write_parquet(folder / "b.parquet", rows)
    write_parquet(folder / "allnli.parquet", [GOOD, GOOD])
    plain, lists = load_triples(folder)
    assert list(lists) == [
        Triple("a", "p", ("n", "m"), "", "1", ("2", "3")),
        Triple("b", "p"),
        Triple("c", "p", (), "", "4", ()),
    ]
    assert [triple.instruction for triple in plain] == list(ECHO_INSTRUCTIONS["allnli"])
    assert list(pickle.loads(pickle.dumps(lists))) == list(lists)
    assert [triple.query for triple in load_one(folder / "b.parquet", limit=2)] == ["a", "b"]


def test_bad_rows_of_parquet(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", [{**GOOD, "query": query} for query in ("a", " ", "b", None)])
    with pytest.raises(DataError, match=r"rows.parquet, row 2: the field 'query' is blank"):
        load_triples(path)
    triples = load_one(path, on_bad_line="skip")
    assert ([triple.query for triple in triples], triples.bad_lines) == (["a", "b"], 2)
    write_parquet(path, [{"question": "q", "negative": "n"}])
    with pytest.raises(DataError, match=r"has no column query and no positive; it has question, negative"):
        load_triples(path, on_bad_line="skip")
    write_parquet(path, [{**GOOD, "query": 5}])
    with pytest.raises(DataError, match=r"row 1: the field 'query' must be a string, this is a number"):
        load_triples(path)


def test_hub_ids(monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, /, **options):
        calls.append((path, options))
        return datasets.Dataset.from_list([{"query": "q", "positive": "p", "negative": "n", "more": 1}] * 3)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    triples = load_one("owner/fever:triplets", split="dev", limit=2)
    assert calls == [("owner/fever", {"split": "dev", "name": "triplets"})]
    assert (triples.name, list(triples)) == ("owner/fever:triplets", [Triple("q", "p", ("n",))] * 2)


@pytest.mark.parametrize("source", ["missing.jsonl", "/no/such/folder", "a b"])
def test_missing_sources_never_reach_the_hub(source, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match=r"does not exist: give --supervised-data a .jsonl or .parquet file"):
        load_triples(source, argument="--supervised-data")


def test_sources_that_are_refused(tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    with pytest.raises(DataError, match=r"sets holds no .jsonl and no .parquet file: give --data"):
        load_triples(folder)
    (folder / "a.csv").write_text("query,positive\nq,p\n")
    with pytest.raises(DataError, match=r"a.csv is of a kind that is not read: give --data"):
        load_triples(folder / "a.csv")
    (folder / "a.jsonl.gz").write_bytes(b"")
    for source in (folder, folder / "a.jsonl.gz"):
        with pytest.raises(DataError, match=r"a.jsonl.gz is compressed.*gunzip a.jsonl.gz"):
            load_triples(source)
    write_jsonl(folder / "a.jsonl", [GOOD])
    assert [triples.name for triples in load_triples(folder)] == ["a"]  # the unpacked file beside it is there
    write_parquet(folder / "a.parquet", [GOOD])
    with pytest.raises(DataError, match=r"a.jsonl and a.parquet would be sets of one name"):
        load_triples(folder)
    with pytest.raises(ValueError, match="got 'ignore' and None"):
        load_triples(folder, on_bad_line="ignore")
    with pytest.raises(ValueError, match="got 'error' and 0"):
        load_triples(folder, limit=0)


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff"])
def test_empty_sets(tmp_path, content):
    (tmp_path / "empty.jsonl").write_text(content, encoding="utf-8")
    write_jsonl(tmp_path / "full.jsonl", [GOOD])
    with pytest.raises(DataError, match=r"empty.jsonl holds no triples: every row is an object"):
        load_triples(tmp_path)


def test_nothing_left_after_skipping(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [1, 2])
    with pytest.raises(DataError, match=r"all its 2 rows were skipped; the first: .*bad.jsonl, line 1: a row must"):
        load_triples(path, on_bad_line="skip")


def test_limit(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"query": str(i), "positive": "p"}) for i in range(5)]
    path.write_text("\n".join([lines[0], "broken", *lines[1:], "broken too"]))
    triples = load_one(path, on_bad_line="skip", limit=3)
    assert ([triple.query for triple in triples], triples.bad_lines) == (["0", "1", "2"], 1)
    assert len(load_one(path, limit=1)) == 1
    assert len(load_one(path, on_bad_line="skip", limit=50)) == 5


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_fingerprints_tell_data_apart(tmp_path, suffix):
    write = write_jsonl if suffix == "jsonl" else write_parquet
    variants = [[GOOD, {**GOOD, "query": "r"}], [{**GOOD, "query": "r"}, GOOD], [GOOD], [{**GOOD, "negative": "n"}]]
    paths = [write(tmp_path / f"rows{i}.{suffix}", rows) for i, rows in enumerate([*variants, variants[0]])]
    prints = [load_one(path).fingerprint() for path in paths]
    assert len(set(prints)) == 4 and prints[0] == prints[4]
    assert prints[0].startswith("2 triples, crc32 ")
    assert load_one(paths[0], limit=1).fingerprint() != prints[0]


def test_pickled_and_forked_sets_read_on(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl", [{"query": str(i), "positive": "p" * i} for i in range(1, 51)])
    monkeypatch.chdir(tmp_path)
    triples = load_one("rows.jsonl")
    expected = list(triples)  # the file is open now
    copy = pickle.loads(pickle.dumps(triples))
    monkeypatch.chdir(tmp_path.parent)
    assert list(copy) == expected and copy.fingerprint() == triples.fingerprint()
    child = os.fork()
    if child == 0:  # reads the file opened by the parent, backwards, while the parent reads it forwards
        status = 1
        try:
            status = int(any([triples[i] for i in range(49, -1, -1)] != expected[::-1] for _ in range(20)))
        finally:
            os._exit(status)
    assert all(list(triples) == expected for _ in range(20))
    assert os.waitpid(child, 0)[1] == 0


def test_files_that_change_after_they_were_opened(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD] * 3)
    content = path.read_text()
    triples = load_one(path)
    path.write_text(content + content)
    with pytest.raises(DataError, match=r"rows.jsonl has changed since it was opened \(row 1 .* 192 bytes instead of"):
        triples[1]
    path.write_text(content[:40] + "?" + content[41:])
    assert triples[0] == triples[2] == Triple("q", "p")
    with pytest.raises(DataError, match=r"has changed since it was opened \(row 1 .* not JSON"):
        triples[1]
    other = load_one(shutil.copy(write_jsonl(path, [GOOD]), tmp_path / "other.jsonl"))
    (tmp_path / "other.jsonl").unlink()
    with pytest.raises(DataError, match=r"other.jsonl: can no longer be read \(No such file or directory\)"):
        other[0]
