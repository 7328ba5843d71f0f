"""Where numbers stand in a Markdown file, and what they are held against: the parts of report.py that know no file.

A number of a document is in a generated table, or in a claim: a piece of the text with the figures left open, and the
values that belong there. A claim without figures is a setting, a definition or a name, and gives its reason. Code is no
prose, but the comments of shell commands are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from string import Formatter
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
TABLE = re.compile(r"(<!-- table: (?P<name>[\w ,.+-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
DIGITS = r"\d+(?:,\d{3})*(?:\.\d+)*(?:e[+-]?\d+)?"
# not sm_90, fp32, F1 or SmolLM2-135M: a letter in front, or in front of a hyphen, makes it a name
BEGINS = re.compile(r"(?<!\w)(?<!\d[.,])")
NUMBER = re.compile(rf"(?<!\w)(?<!\d[.,])(?<![A-Za-z0-9]-){DIGITS}")
SPELLED = re.compile(
    r"\b(?:two|three|four|five|six|seven|eight|nine|ten|twelve|fifteen|twenty|thirty|half|third|quarter)\b"
    r"(?: \w+){0,2} (?:seconds?|minutes?|hours?|percent|times|points)\b"
    r"|\b(?:twice|thrice|double|half|(?:a|two) (?:third|quarter|fifth|tenth)s?) (?:as|the|of)\b",
    re.IGNORECASE,
)
FENCE = re.compile(r"^```(\w*)\n.*?^```$", re.DOTALL | re.MULTILINE)
SHELL_COMMENT = re.compile(r"(?:^|  )# .*$")
NO_CLAIM = re.compile(
    r"<!--.*?-->"
    r"|`[^`\n]*`"  # code
    r"|\]\([^)\s]*\)|<https?:[^>]*>"  # where a link leads
    r"|(?<![\w&])#\d+"  # an issue
    r"|\b\d{4}-\d\d-\d\d\b|\b\d+\.\d+\.\d+\b"  # a date, a version
    r"|\bcommit [0-9a-f]{7,40}\b"
    r"|^(?:\*\*)?\d+\. "  # of a list, or of a step
    r"|\b(?:Tables?|Figures?|Sections?|METHOD|commands?) \d+(?:\.\d+)*|\bAppendix [A-Z](?:\.\d+)*",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Claim:
    """A piece of text with its figures.

    Attributes:
        text: as it stands, any white space for a space, and a field of ``str.format`` for each figure.
        values: of the fields.
        source: the file or the code that has the values, or why the numbers in the text need none.
    """

    text: str
    values: tuple[float | str, ...]
    source: str

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Of the text with any figures."""
        parts = []
        for literal, field, spec, _ in Formatter().parse(self.text):
            parts.append(r"\s+".join(re.escape(word) for word in re.split(r"\s+", literal)))
            if field is not None:
                parts.append(rf"({'[+-]' if '+' in (spec or '') else ''}{DIGITS})")
        return re.compile(rf"{''.join(parts)}(?!\w)(?![.,]\d)")

    def places(self, text: str) -> list[re.Match[str]]:
        """Where it stands, not as a part of a longer word or number."""
        # the boundary in front is looked at afterwards: before the text it would cost the search its fixed start
        return [found for found in self.pattern.finditer(text) if BEGINS.match(text, found.start())]

    @cached_property
    def figures(self) -> list[str]:
        """As they should stand."""
        fields = [spec or "" for _, field, spec, _ in Formatter().parse(self.text) if field is not None]
        return [format(value, spec) for value, spec in zip(self.values, fields, strict=True)]


def measured(source: str, text: str, *values: float | str) -> Claim:
    """A claim with figures of ``source``."""
    return Claim(text, values, source)


def given(why: str, *texts: str) -> list[Claim]:
    """Claims without figures: what stands there is no measurement."""
    return [Claim(text.replace("{", "{{").replace("}", "}}"), (), why) for text in texts]


@cache
def constant(file: str, pattern: str) -> float:
    """A number in a source that is not imported for it, by a regular expression with one group.

    Raises:
        ValueError: it is not there, or there twice.
    """
    found = re.findall(pattern, (RESULTS.parents[1] / file).read_text(encoding="utf-8"))
    if len(found) != 1:
        raise ValueError(f"{file} has {pattern!r} {len(found)} times, expected once")
    return float(found[0])


@cache
def result(name: str) -> Any:
    """A JSON file of results/."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; None is an empty cell.

    Raises:
        ValueError: a row has more or fewer cells than the header.
    """
    head = list(header)
    lines = [_row(head), "|" + "---|" * len(head)]
    for row in rows:
        cells = ["" if cell is None else str(cell) for cell in row]
        if len(cells) != len(head):
            raise ValueError(f"{len(cells)} cells under {len(head)} columns: {cells}")
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def updated(text: str, tables: Mapping[str, Callable[[], str]], claims: Iterable[Claim]) -> str:
    """The document with its tables and figures made again.

    Claims that are not there change nothing, nor do those that contradict each other: see ``contradictions``.

    Raises:
        KeyError: a marker names a table that nobody makes.
    """
    text = TABLE.sub(lambda found: f"{found[1]}{tables[found['name']]()}\n{found[4]}", text)
    for end, figures in sorted(_figures(text, claims).items(), reverse=True):
        if len(figures) == 1:
            ((start, figure),) = figures
            text = text[:start] + figure + text[end:]
    return text


def _figures(text: str, claims: Iterable[Claim]) -> dict[int, dict[tuple[int, str], Claim]]:
    """For every figure in the document, by where it ends: where it begins and what should stand there, by which claim.

    A sign belongs to some figures, so that two claims for one place may begin at different ones.
    """
    readable, wanted = _outside(text), {}
    for claim in claims:
        for found in claim.places(readable):
            for i, figure in enumerate(claim.figures, 1):
                wanted.setdefault(found.end(i), {}).setdefault((found.start(i), figure), claim)
    return wanted


def contradictions(text: str, claims: Iterable[Claim]) -> Iterator[tuple[int, str]]:
    """Figures that two claims want otherwise, or of which one takes the sign in and one does not: line, and the claims.

    The text of one of them is too short to stand in one place alone.
    """
    for end, figures in sorted(_figures(text, claims).items()):
        if len(figures) > 1:
            told = ", ".join(f"{figure} by {claim.text!r}" for (_, figure), claim in figures.items())
            yield text.count("\n", 0, end) + 1, told


def missing(text: str, claims: Iterable[Claim]) -> Iterator[Claim]:
    """Those whose text is not in the document."""
    readable = _outside(text)
    return (claim for claim in claims if not claim.places(readable))


def undeclared(text: str, claims: Iterable[Claim]) -> Iterator[tuple[int, str]]:
    """The numbers that nothing vouches for: line, and the number with what stands around it."""
    readable = _outside(text)
    covered = bytearray(len(text))
    for claim in claims:
        for found in claim.places(readable):
            covered[found.start() : found.end()] = b"\1" * (found.end() - found.start())
    for found in numbers(text):
        if not all(covered[found.start() : found.end()]):
            around = text[max(0, found.start() - 40) : found.end() + 40]
            yield text.count("\n", 0, found.start()) + 1, f"{found[0]!r} in … {' '.join(around.split())} …"


def numbers(text: str, *, of_tables: bool = False) -> list[re.Match[str]]:
    """The numbers of the prose, those in generated tables left out or not; words for them where a unit follows."""
    prose = NO_CLAIM.sub(_blank, _outside(text, tables=not of_tables))
    return sorted([*NUMBER.finditer(prose), *SPELLED.finditer(prose)], key=re.Match.start)


def _outside(text: str, *, tables: bool = True) -> str:
    """Blanks generated tables and fenced code, but for the comments of commands; every position stays."""
    if tables:
        text = TABLE.sub(_blank, text)
    return FENCE.sub(_comments, text)


def _comments(fence: re.Match[str]) -> str:
    if fence[1] != "bash":
        return _blank(fence)
    lines = []
    for line in fence[0].split("\n"):
        comment = SHELL_COMMENT.search(line)
        start = comment.start() if comment else len(line)
        lines.append(" " * start + line[start:])
    return "\n".join(lines)


def _blank(found: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", found[0])
