"""The tables and numbers of results/*.md, and all tables by the name that stands in their marker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import quick_start
import report_tables as readmes
import round_trips
import supervised_sick
from report_text import RESULTS, Claim, given, measured, result, table

LEFT = "one to the left"
WORD_COLUMNS = [column for task in ("chunking", "POS", "NER") for column in (f"{task}, own tokens", LEFT)]


def compiled(kernels: str) -> str:
    """Attention for sm_90: ours or the peer's."""
    found = result("attention_static_sm_90.json")
    return table(found["columns"], [[_grouped(cell) for cell in row] for row in found[kernels]])


def _grouped(cell: int | str) -> str:
    return f"{cell:,}" if isinstance(cell, int) else cell


def fuzz() -> str:
    """What the readers do with damaged files."""
    found = result("fuzz.json")["readers"]
    counts = ("mutants", "refused", "accepted", "as_it_was", "findings")
    before: Counter[str] = Counter()
    for row in found:
        before.update(row["before"])
    rows = [
        [row["reader"], *(row[key] for key in counts), _kinds(row["before"]), f"{row['cpu_s']:.1f}"] for row in found
    ]
    sums = [sum(row[key] for row in found) for key in counts]
    rows.append(["all", *sums, _kinds(before), f"{sum(row['cpu_s'] for row in found):.0f}"])
    return table(["reader", *(key.replace("_", " ") for key in counts), "before", "CPU s"], rows)


def _kinds(findings: Mapping[str, int]) -> str:
    if not findings:
        return "0"
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(findings).most_common())
    return f"{sum(findings.values())} ({kinds})"


def simcse_search() -> str:
    """Steps and batches of SimCSE for the quick start."""
    pairs = [readmes.rows_of(f"stsb_{split}.csv.gz") for split in ("dev", "test")]
    head = ["MNTP steps", "SimCSE", "dev", "test", f"dev, all {pairs[0]:,}", f"test, all {pairs[1]:,}"]
    return table(head, result("quick_start_search.json")["simcse"]["rows"])


def mntp_search() -> str:
    """Blocks of MNTP for the quick start; one run failed, and is bold."""
    rows = result("quick_start_search.json")["mntp"]["rows"]
    cells = [
        [blocks, rate, seed, f"**{dev}**" if (rate, dev < 10) == ("3e-3", True) else dev, after or "not run"]
        for blocks, rate, seed, dev, after in rows
    ]
    return table(["blocks", "rate", "seed", "dev after MNTP", "after 45 x 32 of SimCSE"], cells)


def word_trend() -> str:
    """Bi, Uni and Bi+MNTP on the test sets."""
    scores = {(o["model"], o["task"], o["alignment"]): o for o in result("word_trend_cpu.json")["scores"]}
    columns = [(task, read) for task in ("chunking", "pos", "ner") for read in ("same_token", "next_token")]
    states = {"uni": "Uni", "bi": "Bi, no training", "bi+mntp": "Bi+MNTP: all weights, bf16, 3e-4, 30 %, 300 steps"}
    rows = [[name, *(_word(scores[(state, *column)]) for column in columns)] for state, name in states.items()]
    return table(["state", *WORD_COLUMNS], rows)


def _word(score: Mapping[str, Any]) -> str:
    return _accuracy([score["accuracy"]] if score["task"] == "pos" else [score["accuracy"], score["f1"]])


def _accuracy(found: Sequence[float]) -> str:
    return f"{found[0]:.2f}" + (f" ({found[1]:.1f})" if len(found) > 1 else "")


def word_search() -> str:
    """The same on sentences held out of the training data, for every MNTP that was tried."""
    rows = result("word_trend_search.json")["rows"]
    keys = [f"{task}{read}" for task in ("chunking", "pos", "ner") for read in ("", "_left")]
    cells = [
        [row["mntp"], *(_accuracy(row[key] if isinstance(row[key], list) else [row[key]]) for key in keys)]
        for row in rows
    ]
    return table(["MNTP", *WORD_COLUMNS], cells)


def reproduction(text: str) -> str:
    """results/reproduce/report.md: as the engine writes it of the parts, under the head that the run wrote."""
    from bivec.engine.evaluation.parts import Part
    from bivec.engine.evaluation.study_report import study_report

    kept = {name: result(f"reproduce/{name}.json") for name in readmes.PARTS}
    parts = {name: Part(name, part["data"], part["seconds"], reused=True) for name, part in kept.items()}
    whole = study_report("", parts, [path.name for path in (RESULTS / "reproduce").glob("*.png")], [])
    first, last = "## Which trends", "## Time\n"
    minutes = result("reproduce/clock.json")["minutes"]
    clock = table(["part", "minutes"], [[part, f"{spent:.1f}"] for part, spent in minutes.items()])
    body = whole[whole.index(first) : whole.index(last)]
    return f"{text[: text.index(first)]}{body}{last}\n{clock}\n"


TABLES: dict[str, Callable[[], str]] = {
    "quick start": readmes.quick_start,
    "speed": readmes.speed,
    "evaluations": readmes.evaluations,
    "losses": readmes.losses,
    "recipes": readmes.recipes,
    "cards": readmes.cards,
    "recomputation": readmes.recomputation,
    "samples": readmes.samples,
    "attention": lambda: compiled("bivec"),
    "attention of fla-core": lambda: compiled("fla-core"),
    "fuzz": fuzz,
    "simcse search": simcse_search,
    "mntp search": mntp_search,
    "word trend": word_trend,
    "word search": word_search,
}
# files that a script writes whole: the text as it should be, of the text as it is
WHOLE: dict[str, Callable[[str], str]] = {
    "benchmarks/results/quick_start.md": lambda _: quick_start.report(result("quick_start.json")),
    "benchmarks/results/round_trips.md": lambda _: round_trips.markdown(result("round_trips.json")),
    "benchmarks/results/supervised_sick.md": lambda _: supervised_sick.report(result("supervised_sick.json")),
    "benchmarks/results/reproduce/report.md": reproduction,
}
RESULT_CLAIMS: dict[str, Callable[[], Iterator[Claim]]] = {}
