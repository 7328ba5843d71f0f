"""Readers of words with labels: the three formats, and what can be wrong with a file."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from bivec.engine.errors import DataError
from bivec.engine.evaluation.word_data import (
    CONLL2003_LABELS,
    WordCorpus,
    read_conll2003,
    read_conll2003_directory,
    read_conllu,
    read_wnut17,
    to_bio,
)

DATA = Path(__file__).parents[3] / "recipes" / "data"
CONLL2003 = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC
call NN I-NP O
. . O O

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER

-DOCSTART- -X- O O

in IN I-PP O
Italy NNP I-NP I-LOC
France NNP B-NP B-LOC
"""
WNUT = "@paul\tO\nEmpire\tB-location\nState\tI-location\n\t\n\n\nin\tO\nBonn\tB-location\n"
CONLLU = """# sent_id = 1
# text = I don't go.
1\tI\tI\tPRON\tPRP\t_\t4\tnsubj\t_\t_
2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdo\tdo\tAUX\tVBP\t_\t4\taux\t_\t_
3\tn't\tnot\tPART\tRB\t_\t4\tadvmod\t_\t_
3.1\tever\tever\tADV\tRB\t_\t_\t_\t_\t_
4\tgo\tgo\tVERB\tVB\t_\t0\troot\t_\tSpaceAfter=No
5\t.\t.\tPUNCT\t.\t_\t4\tpunct\t_\t_

# only a comment

1\tNew York\tNew York\tPROPN\tNNP\t_\t0\troot\t_\t_
"""


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name: str = "data.conll") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def same(one: WordCorpus, other: WordCorpus) -> bool:
    return (one.sentences, one.labels, one.lines) == (other.sentences, other.labels, other.lines)


def test_conll2003_as_distributed(write):
    corpus = read_conll2003(write(CONLL2003))
    assert corpus.sentences == (
        ("EU", "rejects", "German", "call", "."),
        ("Peter", "Blackburn"),
        ("in", "Italy", "France"),
    )
    assert corpus.lines == (3, 9, 14)
    assert corpus.labels["pos"][0] == ("NNP", "VBZ", "JJ", "NN", ".")
    # IOB1 in the file, where B- stands only between spans that touch
    assert corpus.labels["chunking"] == (
        ("B-NP", "B-VP", "B-NP", "I-NP", "O"),
        ("B-NP", "I-NP"),
        ("B-PP", "B-NP", "B-NP"),
    )
    assert corpus.labels["ner"] == (
        ("B-ORG", "O", "B-MISC", "O", "O"),
        ("B-PER", "I-PER"),
        ("O", "B-LOC", "B-LOC"),
    )
    assert corpus.num_words == 10
    assert corpus.label_set("ner") == ("B-LOC", "B-MISC", "B-ORG", "B-PER", "I-PER", "O")


def test_conll2003_label_sets_have_the_sizes_and_order_of_the_original():
    assert {task: len(labels) for task, labels in CONLL2003_LABELS.items()} == {"pos": 47, "chunking": 23, "ner": 9}
    assert " ".join(CONLL2003_LABELS["ner"]) == "O B-PER I-PER B-ORG I-ORG B-LOC I-LOC B-MISC I-MISC"
    assert CONLL2003_LABELS["chunking"][:3] == ("O", "B-ADJP", "I-ADJP")
    assert CONLL2003_LABELS["chunking"].index("B-NP") == 11
    assert CONLL2003_LABELS["pos"].index("NN|SYM") == 25
    assert all(len(set(labels)) == len(labels) for labels in CONLL2003_LABELS.values())


def test_iob1_becomes_bio_and_bio_stays():
    assert to_bio(["I-A", "I-A", "B-A", "O", "I-A", "I-B"]) == ["B-A", "I-A", "B-A", "O", "B-A", "B-B"]
    bio = ["O", "B-A", "I-A", "B-B", "B-B", "I-B", "O"]
    assert to_bio(bio) == bio


def test_wnut17(write):
    corpus = read_wnut17(write(WNUT))
    assert corpus.sentences == (("@paul", "Empire", "State"), ("in", "Bonn"))
    assert corpus.labels == {"ner": (("O", "B-location", "I-location"), ("O", "B-location"))}
    assert corpus.lines == (1, 7)


def test_conllu_skips_comments_ranges_and_empty_nodes(write):
    corpus = read_conllu(write(CONLLU))
    assert corpus.sentences == (("I", "do", "n't", "go", "."), ("New York",))
    assert corpus.labels["pos"] == (("PRP", "VBP", "RB", "VB", "."), ("NNP",))
    assert corpus.labels["upos"] == (("PRON", "AUX", "PART", "VERB", "PUNCT"), ("PROPN",))
    assert corpus.labels["chunking"] == (("B-NP", "B-VP", "I-VP", "I-VP", "O"), ("B-NP",))
    assert corpus.lines == (3, 13)


@pytest.mark.parametrize(
    ("reader", "content"), [(read_conll2003, CONLL2003), (read_wnut17, WNUT), (read_conllu, CONLLU)]
)
def test_bytes_around_the_content_change_nothing(write, reader, content):
    plain = reader(write(content))
    assert same(reader(write(content.replace("\n", "\r\n"))), plain)
    assert same(reader(write(b"\xef\xbb\xbf" + content.encode())), plain)
    assert same(reader(write(gzip.compress(content.encode()), "data.conll.gz")), plain)
    assert same(reader(write(content.rstrip("\n"))), plain)
    assert same(reader(write(content.replace("\n", "  \n"))), plain)
    assert same(reader(write(content + "\n \n\n")), plain)  # empty sentences at the end are none


def test_columns_of_tabs_or_spaces(write):
    assert same(read_conll2003(write(CONLL2003.replace(" ", "\t"))), read_conll2003(write(CONLL2003)))
    assert same(read_wnut17(write(WNUT.replace("\t", "  "))), read_wnut17(write(WNUT)))


def test_a_no_break_space_is_no_separator(write):
    assert read_wnut17(write("10\u00a0km\tO\n\u00a0\tO\n")).sentences == (("10\u00a0km", "\u00a0"),)


@pytest.mark.parametrize(
    ("reader", "content", "line", "says"),
    [
        (read_conll2003, "EU NNP I-NP\n", 1, "3 columns"),
        (read_conll2003, "\nEU NNP I-NP I-ORG extra\n", 2, "5 columns"),
        (read_conll2003, "EU NNP I-NP I-ORG\nin XX I-PP O\n", 2, "'XX' is no pos label"),
        (read_conll2003, "EU NNP I-NP I-org\n", 1, "'I-org' is no ner label"),
        (read_wnut17, "a\tO\nb\n", 2, "1 columns"),
        (read_wnut17, "a\tO\n\tO\n", 2, "columns"),
        (read_wnut17, "a\tO\nb\tB-\n", 2, "no BIO label"),
        (read_conllu, CONLLU.replace("\t", " "), 3, "separated by tabs"),
        (read_conllu, CONLLU.replace("\t4\taux", "\t9\taux"), 5, "head '9'"),
        (read_conllu, CONLLU.replace("\t4\taux", "\t2\taux"), 5, "head '2'"),
        (read_conllu, CONLLU.replace("\n5\t.", "\n6\t."), 9, "number is 6, expected 5"),
        (read_conllu, CONLLU.replace("\t0\troot\t_\tSp", "\t1\troot\t_\tSp"), 3, "circle"),
        (read_conllu, CONLLU.replace("1\tI", "x\tI"), 3, "no word"),
        (read_wnut17, b"a\tO\n\xff\tO\n", 2, "UTF-8"),
    ],
)
def test_errors_name_file_and_line(write, reader, content, line, says):
    path = write(content)
    with pytest.raises(DataError) as error:
        reader(path)
    assert f"{path}, line {line}:" in str(error.value)
    assert says in str(error.value)


@pytest.mark.parametrize("reader", [read_conll2003, read_wnut17, read_conllu])
@pytest.mark.parametrize("content", ["", "\n\n \n", None])
def test_nothing_to_read(write, tmp_path, reader, content):
    path = tmp_path / "missing.conll" if content is None else write(content)
    with pytest.raises(DataError, match="is no file" if content is None else "holds no sentences"):
        reader(path)


def test_conll2003_directory_takes_the_names_of_the_distributions(tmp_path):
    for name in ("eng.train", "valid.txt"):
        (tmp_path / name).write_text(CONLL2003)
    with pytest.raises(DataError, match=r"no test file.*eng\.testb"):
        read_conll2003_directory(tmp_path)
    (tmp_path / "eng.testb.gz").write_bytes(gzip.compress(CONLL2003.encode()))
    corpora = read_conll2003_directory(tmp_path)
    assert [corpora[split].source for split in ("train", "dev", "test")] == [
        str(tmp_path / name) for name in ("eng.train", "valid.txt", "eng.testb.gz")
    ]


def test_selection_fingerprint_and_missing_task(write):
    corpus = read_conll2003(write(CONLL2003))
    part = corpus.select([2, 0])
    assert part.sentences == (corpus.sentences[2], corpus.sentences[0])
    assert part.labels["ner"] == (corpus.labels["ner"][2], corpus.labels["ner"][0])
    assert part.lines == (14, 3)
    assert part.fingerprint() != corpus.fingerprint() == read_conll2003(write(CONLL2003, "other")).fingerprint()
    with pytest.raises(DataError, match="no labels for 'upos', only for pos, chunking, ner"):
        corpus.label_set("upos")


def test_shipped_samples():
    train, test = (read_conllu(DATA / f"ud_ewt_{split}.conllu.gz") for split in ("train", "test"))
    assert [(len(one), one.num_words) for one in (train, test)] == [(2001, 25147), (2077, 25094)]
    kinds = {label[2:] for label in test.label_set("chunking") if label != "O"}
    assert kinds == {"ADJP", "ADVP", "CONJP", "INTJ", "LST", "NP", "PP", "PRT", "SBAR", "VP"}
    parts = [read_wnut17(DATA / f"wnut17_{split}.conll.gz") for split in ("train", "dev", "test")]
    assert [(len(one), one.num_words) for one in parts] == [(3394, 62730), (1009, 15733), (1287, 23394)]
    assert len(parts[0].label_set("ner")) == 13
    assert sum(file.stat().st_size for file in DATA.glob("*.gz")) < 1_500_000


def test_a_treebank_without_penn_tags_has_no_pos_task(tmp_path):
    columns = [["1", "Dogs", "_", "NOUN", "_", "_", "2", "nsubj", "_", "_"]]
    columns += [["2", "bark", "_", "VERB", "_", "_", "0", "root", "_", "_"]]
    file = tmp_path / "bank.conllu"
    file.write_text("".join("\t".join(row) + "\n" for row in columns) + "\n")
    assert sorted(read_conllu(file).labels) == ["chunking", "upos"]
    columns[0][4] = "NNS"
    file.write_text("".join("\t".join(row) + "\n" for row in columns) + "\n")
    assert read_conllu(file).labels["pos"] == (("NNS", "_"),)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [("1", "Dogs", "2"), ("2", "bark", "3"), ("3", "loudly", "2")],
            "line 1: the heads above this word run in a circle",
        ),
        ([("1", "Dogs", "2"), ("3", "bark", "0")], "line 2: the word's number is 3, expected 2"),
        ([("1", "Dogs", "7")], "line 1: the head '7' is no other word of the sentence and not 0"),
        ([("1", "", "0")], "line 1: '1' with the form '' is no word"),
    ],
    ids=["circle", "number", "head", "form"],
)
def test_what_is_no_tree(words, message, tmp_path):
    file = tmp_path / "bank.conllu"
    rows = [[number, form, "_", "NOUN", "NN", "_", head, "dep", "_", "_"] for number, form, head in words]
    file.write_text("".join("\t".join(row) + "\n" for row in rows) + "\n")
    with pytest.raises(DataError, match=message):
        read_conllu(file)


def test_what_is_not_all_of_conll2003(tmp_path):
    (tmp_path / "eng.train").write_text(CONLL2003)
    with pytest.raises(DataError, match=r"has no dev file of CoNLL-2003: it must be named eng\.testa, valid\.txt"):
        read_conll2003_directory(tmp_path)
    (tmp_path / "eng.train").write_text(CONLL2003.replace("I-ORG", "I-PLACE"))
    with pytest.raises(DataError, match=r"eng\.train, line 3: 'I-PLACE' is no ner label of CoNLL-2003"):
        read_conll2003_directory(tmp_path)
