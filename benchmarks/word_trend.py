"""Bi < Uni < Bi+MNTP on words (METHOD 6, Table 4), for SmolLM2-135M: trains MNTP for it, then probes.

    python benchmarks/word_trend.py                  # trains for a quarter of an hour, then probes as long
    python benchmarks/word_trend.py --held-out       # on sentences held out of the training data: to choose by
    python benchmarks/word_trend.py --run RUN        # the MNTP of another run, as runs/llm2vec-smollm2-135m
    python benchmarks/word_trend.py --set mntp.optim.steps=600 --work-dir runs/longer

The quick start's MNTP (40 steps, LoRA) is made for sentences and too short for words. Here all weights are trained, in
bfloat16 with fp32 masters, on the same text for 300 steps of 1,024 tokens; benchmarks/results/word_trend.md says what
else was tried. Run and word vectors are kept in ``--work-dir``; a run that was stopped goes on.

Writes word_trend_DEVICE.json into benchmarks/results, or ``--output DIR``: scores, and the claims of the paper decided
by them, all states read at their own tokens and as the paper reads them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from timing import describe_run, device_name

from bivec.engine.errors import BivecError, RunError
from bivec.engine.evaluation.trends import trends_table, word_trends
from bivec.engine.evaluation.variants import named_variants, run_variants
from bivec.engine.evaluation.word_probe import PRESETS
from bivec.engine.evaluation.word_tasks import (
    READINGS,
    accuracy_by_task,
    held_out_word_data,
    score_words,
    select_word_data,
    shipped_word_data,
    words_markdown,
)
from bivec.engine.run_files import RUN_FILE
from bivec.models.files import write_text_atomic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TASKS = ("chunking", "ner", "pos")
TRAINING = {
    "mntp.tuning": "full",
    "mntp.optim.learning_rate": "3e-4",
    "mntp.optim.steps": "300",
    "mntp.optim.warmup_steps": "20",
    "mntp.mask_probability": "0.3",
    "mntp.save_every": "100",
}


def train(directory: Path, model: str | None, changes: Sequence[str]) -> None:
    """MNTP by the quick start's recipe, in a process of its own."""
    flags = ["--stages", "bi,mntp", "--dtype", "bfloat16", *([] if model is None else ["--model", model])]
    for setting in (*(f"{key}={value}" for key, value in TRAINING.items()), *changes):
        flags += ["--set", setting]
    resume = ["--resume"] if (directory / RUN_FILE).is_file() else []
    recipe = ROOT / "recipes" / "llm2vec_smollm2.py"
    command = [sys.executable, str(recipe), *flags, "--output-dir", str(directory), *resume]
    if subprocess.run(command, check=False).returncode:
        raise RunError("training failed, its error is above")


def run(options: argparse.Namespace) -> None:
    """Trains, probes, prints and writes.

    Raises:
        BivecError: see what it calls.
    """
    directory = options.run or options.work_dir / "run"
    if options.run is None:
        train(directory, options.model, options.set)
    data = (held_out_word_data if options.held_out else shipped_word_data)(ROOT / "recipes" / "data")
    data = select_word_data(data, TASKS, sentences=options.sentences)
    probe = PRESETS["small"]
    found = {"config": probe, "seeds": options.seeds, "cache_dir": options.work_dir / "features"}
    scores = []
    for variant in named_variants(run_variants(directory), ("uni", "bi", "bi+mntp")):
        scores += score_words(variant.name, variant.load(), data, ["same_token", "next_token"], **found)
        print(words_markdown(scores), end="\n\n", flush=True)
    accuracy = {reading: accuracy_by_task(scores, read) for reading, read in READINGS.items()}
    trends = [trend for reading, tasks in accuracy.items() for trend in word_trends(tasks, reading)]
    trends = [trend for trend in trends if "SimCSE" not in trend.claim]  # it is not trained here
    content = {
        **describe_run(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "held_out": options.held_out,
        "recipe": json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))["recipe"]["mntp"],
        "probe": asdict(probe),
        "words": {one.name: [one.train.num_words, one.test.num_words] for one in data},
        "accuracy": accuracy,
        "scores": [score.to_dict() for score in scores],
        "trends": [asdict(trend) for trend in trends],
    }
    print(trends_table(trends))
    name = re.sub("[^a-z0-9]+", "-", device_name(torch.device("cpu")).lower())
    path = options.output / f"word_trend{'_held_out' if options.held_out else ''}_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, help="a run that has trained MNTP, instead of training one")
    add("--model", help="another decoder than the quick start's")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe, for the training")
    add("--held-out", action="store_true", help="score sentences held out of the training data, not the test sets")
    add("--sentences", type=int, help="of every corpus, the first ones (default: all)")
    add("--seeds", type=int, nargs="+", default=[42, 43, 44], help="of the probe (default: 42 43 44)")
    add("--work-dir", type=Path, default=Path("runs/word-trend"), help="default: %(default)s")
    add("--output", type=Path, default=RESULTS, metavar="DIR", help="where the file is written")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (BivecError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
