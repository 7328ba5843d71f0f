"""Words with labels: CoNLL-2003 as distributed, WNUT-17 and CoNLL-U files, for chunking, NER and part-of-speech tags.

What is common to the readers:

* UTF-8 with or without a byte-order mark, line ends LF or CRLF, ``.gz`` or not, a last line with or without its end.
* A line of white space alone ends a sentence; several of them in a row make no empty sentence.
* A line of another form raises a DataError with file and line.
* Span labels come out as BIO (IOB2): every span begins with B-. Files in IOB1, as those of CoNLL-2003 once were, have
  B- only where a span touches another one of its type; an I- that continues no span of its type becomes B-. IOB2
  stays as it is.

CoNLL-2003 and WNUT-17 columns are separated by tabs or spaces, CoNLL-U columns by single tabs alone (a form may hold
spaces there).

Source: METHOD 6.1, 6.3; Tjong Kim Sang & De Meulder, 2003; Derczynski et al., 2017; universaldependencies.org/format.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bivec.engine.data_files import decoded_lines
from bivec.engine.errors import DataError
from bivec.engine.evaluation.chunks import Token, base_phrases

TASKS = ("chunking", "ner", "pos")
SPAN_TASKS = ("chunking", "ner")  # their labels are BIO: F1 over spans has a meaning

CONLL2003_POS = (
    "\" '' # $ ( ) , . : `` CC CD DT EX FW IN JJ JJR JJS LS MD NN NNP NNPS NNS NN|SYM PDT POS PRP PRP$ RB RBR RBS RP "
    "SYM TO UH VB VBD VBG VBN VBP VBZ WDT WP WP$ WRB"
)
CONLL2003_LABELS: dict[str, tuple[str, ...]] = {  # METHOD 6.3, in its order
    "pos": tuple(CONLL2003_POS.split()),
    "chunking": (
        "O",
        *(
            f"{mark}-{kind}"
            for kind in ("ADJP", "ADVP", "CONJP", "INTJ", "LST", "NP", "PP", "PRT", "SBAR", "UCP", "VP")
            for mark in "BI"
        ),
    ),
    "ner": ("O", *(f"{mark}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for mark in "BI")),
}
CONLL2003_FILES = {  # the names that its distributions use
    "train": ("eng.train", "train.txt", "train.conll"),
    "dev": ("eng.testa", "valid.txt", "dev.txt", "testa.txt", "dev.conll"),
    "test": ("eng.testb", "test.txt", "testb.txt", "test.conll"),
}
DOCUMENT_MARK = "-DOCSTART-"
SPACES = re.compile(r"[ \t]+")  # not \s: a no-break space may be a word, or part of one
BIO = re.compile(r"O|[BI]-\S+")


@dataclass(frozen=True)
class WordCorpus:
    """Sentences as words, with one label a word for every task."""

    source: str  # the file, for messages
    sentences: tuple[tuple[str, ...], ...]  # N sentences of one word at least
    labels: dict[str, tuple[tuple[str, ...], ...]]  # task -> N sequences, as long as their sentences
    lines: tuple[int, ...]  # N: the line of every sentence's first word, counted from 1

    def __len__(self) -> int:
        return len(self.sentences)

    @property
    def num_words(self) -> int:
        """Of all sentences."""
        return sum(map(len, self.sentences))

    def label_set(self, task: str) -> tuple[str, ...]:
        """The labels that occur, sorted.

        Raises:
            DataError: the corpus has no labels of this task.
        """
        if task not in self.labels:
            raise DataError(f"{self.source} has no labels for {task!r}, only for {', '.join(self.labels)}")
        return tuple(sorted({label for sentence in self.labels[task] for label in sentence}))

    def select(self, rows: Sequence[int]) -> WordCorpus:
        """Some of the sentences."""
        return replace(
            self,
            sentences=tuple(self.sentences[i] for i in rows),
            labels={task: tuple(sequences[i] for i in rows) for task, sequences in self.labels.items()},
            lines=tuple(self.lines[i] for i in rows),
        )

    def fingerprint(self) -> str:
        """Size and checksum of the words, not of the labels: what features depend on."""
        words = "\n".join("\t".join(sentence) for sentence in self.sentences)
        return f"{len(self)} sentences, {self.num_words} words, crc32 {zlib.crc32(words.encode()):08x}"


@dataclass(frozen=True)
class _Line:
    number: int
    columns: tuple[str, ...]


def read_conll2003(path: str | Path) -> WordCorpus:
    """A CoNLL-2003 file as distributed: word, POS, chunk and NER columns, ``-DOCSTART-`` lines, blank lines between.

    Args:
        path: the file, also ``.gz``.

    Returns:
        The corpus with the tasks "pos", "chunking" and "ner", the last two in BIO.

    Raises:
        DataError: a missing, empty, broken or non-UTF-8 file; a line without four columns, or a label that is none of
            CoNLL-2003 (with the line).
    """
    path = Path(path).expanduser()
    form = "CoNLL-2003 has four columns a line (word, POS, chunk, NER), separated by spaces or tabs"
    blocks = list(_column_blocks(path, 4, form))
    tasks = {"pos": 1, "chunking": 2, "ner": 3}
    for line in (line for block in blocks for line in block):
        for task, column in tasks.items():
            if line.columns[column] not in CONLL2003_LABELS[task]:
                raise DataError(
                    f"{path}, line {line.number}: {line.columns[column]!r} is no {task} label of CoNLL-2003 "
                    f"({', '.join(CONLL2003_LABELS[task])}); {form}"
                )
    return _corpus(path, blocks, tasks, form)


def read_conll2003_directory(directory: str | Path) -> dict[str, WordCorpus]:
    """The three files of CoNLL-2003, under one of the names that its distributions use (``CONLL2003_FILES``).

    Returns:
        "train", "dev" and "test".

    Raises:
        DataError: one is missing; see also :func:`read_conll2003`.
    """
    directory = Path(directory).expanduser()
    found = {}
    for split, names in CONLL2003_FILES.items():
        paths = [directory / (name + end) for name in names for end in ("", ".gz")]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise DataError(f"{directory} has no {split} file of CoNLL-2003: it must be named {', '.join(names)} (.gz)")
        found[split] = read_conll2003(path)
    return found


def read_wnut17(path: str | Path) -> WordCorpus:
    """A WNUT-17 file: word and BIO label, separated by a tab.

    Args:
        path: the file, also ``.gz``.

    Returns:
        The corpus with the task "ner".

    Raises:
        DataError: a missing, empty, broken or non-UTF-8 file; a line without two columns or with a label that is not
            BIO (with the line).
    """
    path = Path(path).expanduser()
    form = "WNUT-17 has two columns a line, a word and a BIO label (O, B-person, I-person …), separated by a tab"
    blocks = list(_column_blocks(path, 2, form))
    for line in (line for block in blocks for line in block):
        if not BIO.fullmatch(line.columns[1]):
            raise DataError(f"{path}, line {line.number}: {line.columns[1]!r} is no BIO label; {form}")
    return _corpus(path, blocks, {"ner": 1}, form)


def read_conllu(path: str | Path) -> WordCorpus:
    """A treebank in CoNLL-U: syntactic words, their tags, and base phrases made from the tree.

    Comments, multiword ranges (``1-2``) and empty nodes (``1.1``) are skipped: the words are the syntactic ones ("do",
    "n't"), as the Penn Treebank's and CoNLL's are.

    Args:
        path: the file, also ``.gz``.

    Returns:
        The corpus with the tasks "pos" (XPOS: the Penn Treebank's tags in English treebanks, as CoNLL-2003 has them),
        "upos" (universal tags) and "chunking" (see ``chunks.py``); a treebank without XPOS has no task "pos".

    Raises:
        DataError: a missing, empty, broken or non-UTF-8 file; a line without ten columns, word numbers that do not
            count up, a head that is no word of the sentence, a tree with a cycle (with the line).
    """
    path = Path(path).expanduser()
    form = "CoNLL-U has ten columns a line, separated by tabs"
    sentences, lines = [], []
    labels: dict[str, list[tuple[str, ...]]] = {"pos": [], "upos": [], "chunking": []}
    for block in _blocks(path):
        rows = [line for line in (_conllu_line(path, *row, form) for row in block) if line is not None]
        if not rows:
            continue  # a sentence of comments and empty nodes
        tokens = _tokens(path, rows)
        sentences.append(tuple(row.columns[1] for row in rows))
        lines.append(rows[0].number)
        labels["upos"].append(tuple(token.upos for token in tokens))
        labels["pos"].append(tuple(token.xpos for token in tokens))
        labels["chunking"].append(tuple(base_phrases(tokens)))
    if not sentences:
        raise DataError(f"{path} holds no sentences; {form}")
    if {tag for row in labels["pos"] for tag in row} == {"_"}:
        del labels["pos"]
    return WordCorpus(str(path), tuple(sentences), {task: tuple(found) for task, found in labels.items()}, tuple(lines))


def to_bio(labels: Sequence[str]) -> list[str]:
    """One sentence's IOB1 or IOB2 labels as IOB2 (BIO): an I- that continues no span of its own type becomes B-."""
    converted = []
    before = "O"
    for label in labels:
        begins = label.startswith("I-") and before[2:] != label[2:]
        converted.append(f"B-{label[2:]}" if begins else label)
        before = label
    return converted


def _blocks(path: Path) -> Iterator[list[tuple[int, str]]]:
    """Runs of lines between blank ones, numbered, without line ends and what white space is in front of them."""
    if not path.is_file():
        raise DataError(f"{path} is no file")
    block: list[tuple[int, str]] = []
    for number, raw in enumerate(decoded_lines(path), start=1):
        line = raw.rstrip(" \t\r\n")
        if line:
            block.append((number, line))
        elif block:
            yield block
            block = []
    if block:
        yield block


def _column_blocks(path: Path, width: int, form: str) -> Iterator[list[_Line]]:
    """Sentences of lines with so many columns; a document mark ends a sentence, too."""
    for block in _blocks(path):
        sentence: list[_Line] = []
        for number, text in block:
            columns = tuple(text.split("\t")) if text.count("\t") == width - 1 else tuple(SPACES.split(text))
            if columns[0] == DOCUMENT_MARK:
                if sentence:
                    yield sentence
                sentence = []
                continue
            columns = tuple(column.strip(" ") for column in columns)
            if len(columns) != width or not all(columns):
                raise DataError(f"{path}, line {number}: {len(columns)} columns in {text[:80]!r}; {form}")
            sentence.append(_Line(number, columns))
        if sentence:
            yield sentence


def _corpus(path: Path, blocks: Iterable[list[_Line]], tasks: dict[str, int], form: str) -> WordCorpus:
    sentences, lines = [], []
    labels: dict[str, list[tuple[str, ...]]] = {task: [] for task in tasks}
    for block in blocks:
        sentences.append(tuple(line.columns[0] for line in block))
        lines.append(block[0].number)
        for task, column in tasks.items():
            sequence = [line.columns[column] for line in block]
            labels[task].append(tuple(to_bio(sequence) if task in SPAN_TASKS else sequence))
    if not sentences:
        raise DataError(f"{path} holds no sentences; {form}")
    return WordCorpus(str(path), tuple(sentences), {task: tuple(found) for task, found in labels.items()}, tuple(lines))


def _conllu_line(path: Path, number: int, text: str, form: str) -> _Line | None:
    """The ten columns of a word; None for what is none."""
    if text.startswith("#"):
        return None
    columns = tuple(text.split("\t"))
    if len(columns) != 10:
        raise DataError(f"{path}, line {number}: {len(columns)} columns in {text[:80]!r}; {form}")
    if re.fullmatch(r"\d+(-|\.)\d+", columns[0]):
        return None
    if not columns[0].isdecimal() or not columns[1]:
        raise DataError(f"{path}, line {number}: {columns[0]!r} with the form {columns[1]!r} is no word; {form}")
    return _Line(number, columns)


def _tokens(path: Path, rows: Sequence[_Line]) -> list[Token]:
    """The words of a sentence with their heads, checked: 1, 2, 3 …, one tree."""
    tokens = []
    for position, row in enumerate(rows, start=1):
        number, _, _, upos, xpos, _, head, deprel = row.columns[:8]
        if int(number) != position:
            raise DataError(f"{path}, line {row.number}: the word's number is {number}, expected {position}")
        if not head.isdecimal() or int(head) > len(rows) or int(head) == position:
            raise DataError(f"{path}, line {row.number}: the head {head!r} is no other word of the sentence and not 0")
        tokens.append(Token(row.columns[1], upos, xpos, int(head) - 1, deprel))
    for start in range(len(tokens)):
        node = start
        for _ in tokens:
            if node < 0:
                break
            node = tokens[node].head
        if node >= 0:
            raise DataError(f"{path}, line {rows[start].number}: the heads above this word run in a circle")
    return tokens
