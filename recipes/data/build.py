"""Makes the four samples of this folder from the raw public files. Standard library only, the same text every time.

    python recipes/data/build.py --wikitext valid.txt test.txt --stsb-dev dev.csv --stsb-test test.csv

``--wikitext`` takes the word-tokenised files of WikiText-2, ``--stsb-dev`` and ``--stsb-test`` the STS benchmark in
English as ``sentence1,sentence2,score`` without a header (README.md names the places where they come from).

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
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import re
from collections.abc import Iterable, Iterator
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
    for name, lines in files.items():
        write_gzip(output_dir / name, "".join(line + "\n" for line in lines))
    return {name: len(lines) for name, lines in files.items()}


def build_stsb(source: Path, target: Path) -> int:
    """Writes one split with a header line, rows and order as they are; returns how many pairs it holds."""
    with source.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["sentence1", "sentence2", "score"], *rows])
    write_gzip(target, text.getvalue())
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the data samples of the recipes from the raw public files.")
    parser.add_argument("--wikitext", type=Path, nargs="+", required=True, help="WikiText-2 files, word-tokenised")
    parser.add_argument("--stsb-dev", type=Path, required=True, help="STS benchmark dev pairs, CSV without a header")
    parser.add_argument("--stsb-test", type=Path, required=True, help="STS benchmark test pairs, CSV without a header")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent, help="where the samples go")
    args = parser.parse_args()
    counts = build_wikitext(args.wikitext, args.output_dir)
    counts["stsb_dev.csv.gz"] = build_stsb(args.stsb_dev, args.output_dir / "stsb_dev.csv.gz")
    counts["stsb_test.csv.gz"] = build_stsb(args.stsb_test, args.output_dir / "stsb_test.csv.gz")
    for name, count in counts.items():
        print(f"{name}: {count} rows, {(args.output_dir / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
