"""Scores an encoder: STS pairs (Spearman x 100), and, where asked for, MTEB tasks and word tasks.

Without --sts, --tasks and --words: STS-B dev and test, as the recipes evaluate. The tasks "local" need no hub.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bivec.engine.cli.models import MODEL_HELP, add_model_flags, open_model
from bivec.engine.cli.output import command_parser, count, results_only, say, write_document

if TYPE_CHECKING:
    from bivec.engine.encoder import Encoder

WORD_TASKS = ("chunking", "ner", "pos")
EPILOG = """examples:
  bivec eval runs/llm2vec-smollm2-135m                            # STS-B dev and test, all pairs
  bivec eval RUN --sts my_pairs.csv --pairs 500 --json
  bivec eval RUN --tasks local                                    # four small MTEB tasks on data that ships
  bivec eval RUN --tasks SICK-R SciFact --output-dir runs/mteb    # of the hub; subset15 and full56 are the paper's
  bivec eval RUN --words ner pos --sentences 500                  # linear probes on frozen word vectors

The exit code is 1 where a task has no score."""


def main(arguments: Sequence[str]) -> int:
    """Scores an encoder; returns the exit code."""
    given = _parser().parse_args(arguments)
    with results_only() as stdout:
        encoder = open_model(given)
        report: dict[str, Any] = {"model": given.model, "pooling": encoder.config.pooling}
        if given.sts or not (given.tasks or given.words is not None):
            report["sts"] = sts_scores(encoder, given)
        if given.tasks:
            report["tasks"], report["failed"] = task_scores(encoder, given)
        if given.words is not None:
            report["words"] = word_scores(encoder, given)
        if given.json:
            write_document(stdout, report)
        else:
            print(table(report), file=stdout)
    for name, reason in report.get("failed", {}).items():
        say(f"error: {name}: {reason}")
    return 1 if report.get("failed") else 0


def sts_scores(encoder: Encoder, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Spearman x 100 of every file of pairs."""
    from bivec.engine.data import load_sts
    from bivec.engine.evaluation import evaluate_sts
    from bivec.engine.presets import STS_DEV, STS_TEST

    files = {"STS-B dev": STS_DEV, "STS-B test": STS_TEST} if not given.sts else {name: name for name in given.sts}
    pairs = {name: load_sts(file)[: given.pairs] for name, file in files.items()}  # all read before any work
    found = []
    embed = partial(encoder.encode, instruction=given.instruction)
    for name, rows in pairs.items():
        result = evaluate_sts(embed, rows)
        found.append({"data": name, "pairs": result.num_pairs, "spearman": result.spearman})
    return found


def task_scores(encoder: Encoder, given: argparse.Namespace) -> tuple[dict[str, float], dict[str, str]]:
    """Main scores x 100 by task, and why others have none."""
    from bivec.engine.evaluation.local_tasks import LOCAL_INSTRUCTIONS, local_tasks
    from bivec.engine.evaluation.mteb_run import named_tasks, run_tasks
    from bivec.engine.presets import DATA

    tasks = named_tasks(given.tasks, local_tasks(DATA))
    told = not given.no_instructions
    model = encoder.as_mteb(
        instructions=LOCAL_INSTRUCTIONS if told else None,
        paper_instructions=told,
        name="-".join(part for part in (Path(given.model).name, given.pooling) if part),
        tokens_per_batch=given.tokens_per_batch,
    )
    outcome = run_tasks(model, tasks, given.output_dir)
    return outcome.scores, outcome.failed


def word_scores(encoder: Encoder, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Token accuracy and span F1 x 100 of linear probes, by task and alignment."""
    from bivec.engine.evaluation.word_probe import PRESETS
    from bivec.engine.evaluation.word_tasks import score_words, select_word_data, shipped_word_data
    from bivec.engine.presets import DATA

    data = select_word_data(shipped_word_data(DATA), given.words or WORD_TASKS, sentences=given.sentences)
    alignments = ("same_token", "next_token")
    seeds = (42, 43, 44)
    scores = score_words(Path(given.model).name, encoder, data, alignments, config=PRESETS["small"], seeds=seeds)
    return [score.to_dict() for score in scores]


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = []
    if "sts" in report:
        lines += ["| pairs | number | Spearman x 100 |", "|---|---:|---:|"]
        lines += [f"| {one['data']} | {one['pairs']} | {one['spearman']:.1f} |" for one in report["sts"]]
    if "tasks" in report:
        lines += ["", "| task | main score x 100 |", "|---|---:|"]
        lines += [f"| {name} | {score:.2f} |" for name, score in report["tasks"].items()]
    if "words" in report:
        lines += ["", "| words | read at | accuracy | F1 |", "|---|---|---:|---:|"]
        for one in report["words"]:
            f1 = "" if one["f1"] is None else f"{one['f1']:.2f}"
            lines.append(f"| {one['task']} | {one['alignment'].replace('_', ' ')} | {one['accuracy']:.2f} | {f1} |")
    return "\n".join(lines).strip()


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("eval", __doc__, EPILOG)
    add = parser.add_argument
    add("model", help=MODEL_HELP)
    add("--sts", nargs="+", metavar="FILE", help="CSV or TSV of sentence1, sentence2, score (default: STS-B)")
    add("--pairs", type=count, metavar="N", help="only the first N of every file (default: all)")
    add("--instruction", help="put before the sentences of STS pairs, with its final colon")
    add("--tasks", nargs="+", metavar="TASK", help="MTEB tasks: names of mteb's, local, subset15, full56")
    add("--no-instructions", action="store_true", help="of --tasks: leave out the paper's and the local tasks'")
    add(
        "--output-dir",
        type=Path,
        default=Path("runs/mteb"),
        help="of --tasks: where mteb keeps results, which are not computed again (default: %(default)s)",
    )
    add("--words", nargs="*", choices=WORD_TASKS, metavar="TASK", help="chunking, ner, pos, on data that ships")
    add("--sentences", type=count, metavar="N", help="of --words: the first N of every corpus (default: all)")
    add("--tokens-per-batch", type=count, help="memory grows with it, scores do not change (default: 4096)")
    add_model_flags(parser)
    add("--json", action="store_true", help="print the scores as JSON")
    return parser
