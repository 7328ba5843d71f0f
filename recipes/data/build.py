r"""Makes the samples of this folder from the raw public files. Standard library only, the same text every time.

    python recipes/data/build.py --wikitext valid.txt test.txt --stsb-dev dev.csv --stsb-test test.csv \
        --ud-ewt en_ewt-ud-dev.conllu en_ewt-ud-test.conllu \
        --wnut17 wnut17train.conll emerging.dev.conll emerging.test.annotated

``--wikitext`` takes the word-tokenised files of WikiText-2, ``--stsb-dev`` and ``--stsb-test`` the STS benchmark in
English as ``sentence1,sentence2,score`` without a header, ``--ud-ewt`` two files of the English Web Treebank, of which
the first becomes our training data, ``--wnut17`` the three of WNUT-17 (README.md names the places where they come
from). What is not given is left as it is.

From WikiText to text:

1. A line is a paragraph; headings (`` = Title = ``) and empty lines go.
2. WikiText stands a token ``.``, ``!`` or ``?`` apart only where a sentence may end (``H. americanus`` and ``No. 2``
   keep their dots), so a sentence ends after such a token and the closing quote or brackets right behind it, unless the
   next token starts with a lower-case letter or with punctuation that opens no sentence (comma, colon, dash …).
3. Sentences with ``<unk>`` go, the rest of their paragraph stays.
4. Detokenising, see ``detokenise``.
5. Paragraphs: what is left of each, joined by spaces, five words at least. Sentences: those of 6 to 60 words (split at
   spaces) that open and close as many double quotes and brackets and end in ``.``, ``!``, ``?``, a quote or a bracket,
   each once, in the order of the text.

From CoNLL-U: comments, multiword ranges and empty nodes go, and of the ten columns lemma, features, enhanced
dependencies and notes become ``_``; every sentence stays. From WNUT-17: words and labels as they are, lines of white
space alone become empty ones, one between two sentences.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

SENTENCE_END = {".", "!", "?"}
CLOSING = {")", "]", "'", "”", "’"}
OPENS_NO_SENTENCE = set(",;:.!?-–—/&")
MIN_PARAGRAPH_WORDS = 5
MIN_SENTENCE_WORDS = 6
MAX_SENTENCE_WORDS = 60


def paragraphs(lines: Iterable[str]) -> Iterator[list[str]]:
    """The lines that are neither empty nor headings, as lists of tokens."""
    for line in lines:
        tokens = line.split()
        if tokens and not (tokens[0] == "=" and tokens[-1] == "="):
            yield tokens


def split_sentences(tokens: list[str]) -> Iterator[list[str]]:
    """Cuts the tokens of a paragraph behind its sentence ends (rule 2 of the module docstring)."""
    start, position, quote_open = 0, 0, False
    while position < len(tokens):
        quote_open ^= tokens[position] == '"'
        end = position + 1
        if tokens[position] in SENTENCE_END:
            while end < len(tokens) and (tokens[end] in CLOSING or (tokens[end] == '"' and quote_open)):
                quote_open ^= tokens[end] == '"'
                end += 1
            if end == len(tokens) or not (tokens[end][0].islower() or tokens[end][0] in OPENS_NO_SENTENCE):
                yield tokens[start:end]
                start = end
        position = end
    if start < len(tokens):
        yield tokens[start:]


def detokenise(tokens: list[str]) -> str:
    """Tokens of WikiText as ordinary text.

    `` @-@ ``, `` @,@ `` and `` @.@ `` are joined; no space before ``.,;:!?%)]'’”`` nor after ``([$£‘“``; straight
    double quotes open and close in turn and lean on what they enclose; dashes between numbers, slashes between words
    and ``° C`` are joined.
    """
    text = re.sub(r" @([-,.])@ ", r"\1", " ".join(tokens))
    text = re.sub(r" ([.,;:!?%)\]'’”])", r"\1", text)
    text = re.sub(r"([(\[$£‘“]) ", r"\1", text)
    text = re.sub(r"(?<=\d) – (?=\d)", "–", text)
    text = re.sub(r"(?<=\w) / (?=\w)", "/", text)
    text = re.sub(r"° (?=[CF]\b)", "°", text)
    return re.sub(r'" ([^"]*?) ?"', r'"\1"', text)


def clean_sentences(tokens: list[str]) -> list[str]:
    """The sentences of a paragraph without ``<unk>``, detokenised."""
    return [detokenise(sentence) for sentence in split_sentences(tokens) if "<unk>" not in sentence]


def is_training_sentence(sentence: str) -> bool:
    """True for a whole, balanced sentence of 6 to 60 words."""
    balanced = sentence.count('"') % 2 == 0 and sentence.count("(") == sentence.count(")")
    finished = sentence[-1] in ".!?\")'”’"
    return balanced and finished and MIN_SENTENCE_WORDS <= len(sentence.split()) <= MAX_SENTENCE_WORDS


def write_gzip(path: Path, text: str) -> None:
    """Writes UTF-8 text compressed, with neither time stamp nor file name: equal texts give equal files."""
    path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))


def build_wikitext(sources: list[Path], output_dir: Path) -> dict[str, int]:
    """Writes the paragraphs and the sentences; returns how many lines each file holds."""
    kept_paragraphs: list[str] = []
    kept_sentences: dict[str, None] = {}  # a dict keeps the order of the text and drops repetitions
    for source in sources:
        with source.open(encoding="utf-8") as lines:
            for tokens in paragraphs(lines):
                sentences = clean_sentences(tokens)
                kept_sentences.update(dict.fromkeys(filter(is_training_sentence, sentences)))
                paragraph = " ".join(sentences)
                if len(paragraph.split()) >= MIN_PARAGRAPH_WORDS:
                    kept_paragraphs.append(paragraph)
    files = {"wikitext2_paragraphs.txt.gz": kept_paragraphs, "wikipedia_sentences.txt.gz": list(kept_sentences)}
    for name, texts in files.items():
        write_gzip(output_dir / name, "".join(text + "\n" for text in texts))
    return {name: len(texts) for name, texts in files.items()}


def build_stsb(source: Path, target: Path) -> int:
    """Writes one split with a header line, rows and order as they are; returns how many pairs it holds."""
    with source.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["sentence1", "sentence2", "score"], *rows])
    write_gzip(target, text.getvalue())
    return len(rows)


def slim_conllu(line: str) -> str | None:
    """Number, form, UPOS, XPOS, head and relation of a line of a treebank; "" between sentences, None for the rest."""
    if not line.strip():
        return ""
    columns = line.rstrip("\r\n").split("\t")
    if len(columns) != 10 or not columns[0].isdecimal():
        return None
    number, form, _, upos, xpos, _, head, deprel, _, _ = columns
    return f"{number}\t{form}\t_\t{upos}\t{xpos}\t_\t{head}\t{deprel}\t_\t_"


def build_words(source: Path, target: Path, slim: Callable[[str], str | None]) -> int:
    """Writes sentences of one word a line with an empty line behind each; returns how many there are."""
    sentences: list[list[str]] = [[]]
    with source.open(encoding="utf-8") as lines:
        for line in map(slim, lines):
            if line:
                sentences[-1].append(line)
            elif line == "" and sentences[-1]:
                sentences.append([])
    kept = [sentence for sentence in sentences if sentence]
    write_gzip(target, "".join("\n".join(sentence) + "\n\n" for sentence in kept))
    return len(kept)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Makes the data samples of the recipes from the raw public files.")
    parser.add_argument("--wikitext", type=Path, nargs="+", help="WikiText-2 files, word-tokenised")
    parser.add_argument("--stsb-dev", type=Path, help="STS benchmark dev pairs, CSV without a header")
    parser.add_argument("--stsb-test", type=Path, help="STS benchmark test pairs, CSV without a header")
    parser.add_argument("--ud-ewt", type=Path, nargs=2, help="CoNLL-U files for training and test")
    parser.add_argument("--wnut17", type=Path, nargs=3, help="WNUT-17 files for training, development and test")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent, help="where the samples go")
    args = parser.parse_args()
    counts = build_wikitext(args.wikitext, args.output_dir) if args.wikitext else {}
    jobs: list[tuple[str, Path | None, Callable[[Path, Path], int]]] = [
        ("stsb_dev.csv.gz", args.stsb_dev, build_stsb),
        ("stsb_test.csv.gz", args.stsb_test, build_stsb),
    ]
    for split, source in zip(("train", "test"), args.ud_ewt or (), strict=False):
        jobs.append((f"ud_ewt_{split}.conllu.gz", source, partial(build_words, slim=slim_conllu)))
    for split, source in zip(("train", "dev", "test"), args.wnut17 or (), strict=False):
        jobs.append((f"wnut17_{split}.conll.gz", source, partial(build_words, slim=str.strip)))
    for name, source, build in jobs:
        if source is not None:
            counts[name] = build(source, args.output_dir / name)
    for name, count in counts.items():
        print(f"{name}: {count} rows, {(args.output_dir / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
