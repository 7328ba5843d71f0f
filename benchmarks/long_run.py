"""Two hours of training on a CPU: do memory, open files or speed drift, and how good is what comes out?

    python benchmarks/long_run.py --sick DIR           # MNTP, SimCSE, then supervised on SICK's triples
    python benchmarks/long_run.py                      # without the supervised stage
    python benchmarks/long_run.py --set simcse.optim.steps=60    # any other flag goes to the recipe

Runs recipes/llm2vec_smollm2.py with the settings of ``LONG``: the quick start's, but for those. SimCSE reads
the sentences of all corpora that ship: Wikipedia, UD-EWT (web) and WNUT-17 (tweets, comments). ``--sick`` is a folder
with SICK_train.txt and SICK_test_annotated.txt, as for benchmarks/supervised_sick.py. ``--resume`` goes on with a run
that was stopped; what was logged before is kept.

Every ten seconds the resident memory, the open files and the threads of the process are read from /proc (Linux only);
the speed is in the run's metrics.jsonl. Only training is judged: of every step the first reading counts, so that
evaluations and the writing of models do not, and the first fifth of what a process trains of a stage, in which memory
pools fill, is left out. Growth is the slope of a line through the memory, one slope for all processes and a height for
each; speed is shown as the medians of the first and of the last third. The triples' overlap with STS-B is counted as
benchmarks/supervised_sick.py counts it.
Writes long_run.{json,md,png} into benchmarks/results.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from quick_start import processor
from supervised_sick import overlap

from bivec.engine.data import load_sts

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
DATA = RECIPES / "data"
RESULTS = ROOT / "benchmarks" / "results"
LEAST_WORDS = 4  # shorter ones say little; of Wikipedia the sample has six at least
SECONDS = 10.0  # between two readings
SETTLING = 0.2  # of what a process trains of a stage, not judged

LONG = {
    "mntp.optim.steps": 120,
    "mntp.optim.warmup_steps": 12,
    "simcse.optim.steps": 510,
    "simcse.optim.warmup_steps": 20,
    "simcse.batch_size": 64,
    "simcse.attention_dropout": 0.5,  # with 0.3 the loss is gone after 40 of these steps
    "simcse.evaluate_every": 100,
    "supervised.optim.steps": 80,
    "supervised.optim.learning_rate": 3e-4,  # at 1e-3, the quick start's, this stage lost on STS-B
}


@dataclass(frozen=True)
class Reading:
    """Of the training process, at one moment."""

    seconds: float  # since the start, those of runs that were resumed included
    process: int  # 0, and one more for every --resume
    stage: str
    step: int
    resident_mib: float
    open_files: int
    threads: int


@dataclass(frozen=True)
class Drift:
    """What became of a stage's memory, files and speed between its settling and its end."""

    stage: str
    steps: int
    minutes: float
    resident_mib: tuple[float, float]  # median of the first and of the last third
    growth_mib_per_hour: float
    open_files: tuple[int, int]  # at the beginning and at the end
    threads: tuple[int, int]
    tokens_per_s: tuple[float, float]  # median of the first and of the last third


def words_of_rows(path: Path, column: int) -> Iterator[str]:
    """The sentences of a file with one word a line and an empty line between sentences."""
    words: list[str] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                words.append(line.rstrip("\n").split("\t")[column])
            elif words:
                yield plain_text(words)
                words = []
    if words:
        yield plain_text(words)


def plain_text(words: Sequence[str]) -> str:
    """Words as text: no space in front of closing marks and clitics, none behind opening ones."""
    text = " ".join(words)
    text = re.sub(r" (n't|'s|'re|'ve|'ll|'m|'d)\b", r"\1", text)
    text = re.sub(r" ([.,;:!?%)\]}])", r"\1", text)
    return re.sub(r"([(\[{$]) ", r"\1", text)


def sentences() -> list[str]:
    """All different sentences that ship, in the order of the files."""
    with gzip.open(DATA / "wikipedia_sentences.txt.gz", "rt", encoding="utf-8") as lines:
        found = [line.strip() for line in lines]
    for name in ("train", "test"):
        found += words_of_rows(DATA / f"ud_ewt_{name}.conllu.gz", 1)
    for name in ("train", "dev", "test"):
        found += words_of_rows(DATA / f"wnut17_{name}.conll.gz", 0)
    return list(dict.fromkeys(text for text in found if len(text.split()) >= LEAST_WORDS))


def read_process(pid: int) -> tuple[float, int, int] | None:
    """Resident MiB, open files, threads; None where the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        values = {name: int(number) for name, number in re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE)}
        return values["VmRSS"] / 1024, files, values["Threads"]
    except (OSError, KeyError):  # a process that has ended has no VmRSS
        return None


def place(metrics: Path) -> tuple[str, int]:
    """The stage and step of the last whole line of a run's metrics."""
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
        last = json.loads(lines[-1])
    except (OSError, IndexError, ValueError):  # not begun, or a line half written
        return "start", 0
    return last["stage"], last["step"]


def read_log(log: Path) -> list[Reading]:
    """What an earlier process has logged; a last line that was not written to its end is taken off the file."""
    if not log.exists():
        return []
    text = log.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        log.write_text(text, encoding="utf-8")
    return [Reading(**json.loads(line)) for line in text.splitlines()]


def train(command: list[str], run: Path, log: Path) -> list[Reading]:
    """Runs the recipe; every reading is appended to ``log`` at once.

    Raises:
        SystemExit: the recipe failed.
    """
    readings = read_log(log)
    number = readings[-1].process + 1 if readings else 0
    begun = time.monotonic() - (readings[-1].seconds if readings else 0.0)
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            values = read_process(process.pid)
            stage, step = place(run / "metrics.jsonl")
            if values is not None and stage != "start":
                readings.append(Reading(round(time.monotonic() - begun, 1), number, stage, step, *values))
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(readings[-1])) + "\n")
            time.sleep(SECONDS)
    if process.returncode:
        sys.exit(f"the recipe ended with {process.returncode}; the same command with --resume goes on")
    return readings


def thirds(values: Sequence[float]) -> tuple[float, float]:
    """Median of the first and of the last third."""
    count = max(1, len(values) // 3)
    return median(values[:count]), median(values[-count:])


def drift(stage: str, readings: Sequence[Reading], metrics: Sequence[dict[str, Any]]) -> Drift:
    """How a stage went.

    Args:
        stage: its name.
        readings: of the whole run.
        metrics: lines of the run's metrics.jsonl.

    Raises:
        ValueError: the stage was too short for three readings.
    """
    own = [reading for reading in readings if reading.stage == stage]
    first = {(reading.process, reading.step): reading for reading in reversed(own)}  # of every step
    training = sorted(first.values(), key=lambda reading: reading.seconds)
    parts = [[one for one in training if one.process == number] for number in {one.process: 0 for one in training}]
    parts = [part[int(SETTLING * len(part)) :] for part in parts]
    settled = [reading for part in parts for reading in part]
    if len(settled) < 3:
        raise ValueError(f"{stage} gave {len(settled)} readings after its settling, too few to judge")
    hours, memory = (
        np.concatenate([values - values.mean() for values in map(np.array, columns)])  # each process by itself
        for columns in (
            [[one.seconds / 3600 for one in part] for part in parts],
            [[one.resident_mib for one in part] for part in parts],
        )
    )
    steps = [line for line in metrics if line["stage"] == stage]
    speeds = [line["tokens_per_s"] for line in steps if line["step"] > SETTLING * len(steps)]
    return Drift(
        stage=stage,
        steps=len(steps),
        minutes=(training[-1].seconds - training[0].seconds) / 60,
        resident_mib=thirds([reading.resident_mib for reading in settled]),
        growth_mib_per_hour=float(hours @ memory / (hours @ hours)),
        open_files=(settled[0].open_files, settled[-1].open_files),
        threads=(settled[0].threads, settled[-1].threads),
        tokens_per_s=thirds(speeds),
    )


def tables(content: dict[str, Any]) -> str:
    """The result as Markdown: quality by stage, then what drifted."""
    rows = ["| stage | pooling | STS-B dev | STS-B test |", "|---|---|---|---|"]
    rows += [
        f"| {row['stage']} | {row['pooling']} | {row['sts_dev_spearman']:.1f} | {row['sts_test_spearman']:.1f} |"
        for row in content["stages"]
    ]
    names = ("resident MiB", "MiB an hour", "open files", "threads", "tokens/s")
    rows += ["", f"| stage | steps | minutes | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for row in content["drift"]:
        memory, files, threads, speed = (
            f"{row[name][0]:,.0f}, {row[name][1]:,.0f}"
            for name in ("resident_mib", "open_files", "threads", "tokens_per_s")
        )
        cells = (row["stage"], row["steps"], f"{row['minutes']:.1f}", memory, f"{row['growth_mib_per_hour']:+.1f}")
        rows.append(f"| {' | '.join(map(str, (*cells, files, threads, speed)))} |")
    note = "Memory and speed: medians of the first and of the last third of a stage without its first fifth. "
    note += "MiB an hour is the slope of memory, which in a stage of a few minutes is that of a few MiB. "
    note += "With triples one file more is open, from which they are read."
    return "\n".join([*rows, "", note])


def page(content: dict[str, Any]) -> str:
    """The report."""
    last, versions = Reading(**content["readings"][-1]), content["versions"]
    command = ["python benchmarks/long_run.py", *(["--sick DIR"] if content["overlap"] else []), *content["flags"]]
    told = (
        f"`{' '.join(command)}`, {content['date']}, {content['machine']}: {last.seconds / 3600:.1f} hours in "
        f"{last.process + 1} process{'es' if last.process else ''}. torch {versions['torch']}, "
        f"Python {versions['python']}. STS-B on all pairs, Spearman x 100."
    )
    lines = ["# The long run", "", told, "", tables(content), ""]
    if content["overlap"]:
        seen = [
            f"{one['pairs_with_a_sentence_in_the_triples']:,} of {one['pairs']:,} in {split}"
            for split, one in content["overlap"].items()
        ]
        lines += [f"Pairs of STS-B with a sentence of SICK's triples, but for case and marks: {', '.join(seen)}.", ""]
    return "\n".join([*lines, "![Memory, speed, losses and quality](long_run.png)", ""])


def draw(path: Path, content: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> None:
    """Memory, files and speed over time; the losses; the quality of every stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    (memory, speed), (losses, quality) = figure.subplots(2, 2)
    readings = [Reading(**reading) for reading in content["readings"]]
    minutes = [reading.seconds / 60 for reading in readings]
    memory.plot(minutes, [reading.resident_mib for reading in readings], color="#2f6fb5")
    memory.set(title="resident memory, MiB (blue); open files (grey)", xlabel="minutes", ylim=(0, None))
    files = memory.twinx()
    files.plot(minutes, [reading.open_files for reading in readings], color="#999999", linewidth=1)
    files.set(ylim=(0, None))
    for stage in dict.fromkeys(line["stage"] for line in metrics):
        own = [line for line in metrics if line["stage"] == stage]
        shares = [line["step"] / len(own) for line in own]
        speed.plot(shares, [line["tokens_per_s"] for line in own], label=stage, linewidth=0.8)
        losses.semilogy(shares, [line["loss"] for line in own], label=stage, linewidth=0.8)
    speed.set(title="tokens a second", xlabel="share of the stage", ylim=(0, None))
    losses.set(title="loss", xlabel="share of the stage")
    for axis in (speed, losses):
        axis.legend(frameon=False)
    names = [row["stage"] for row in content["stages"]]
    bars = quality.barh(names, [row["sts_test_spearman"] for row in content["stages"]], color="#2f6fb5")
    quality.bar_label(bars, fmt="%.1f", padding=4)
    quality.invert_yaxis()
    quality.set(xlim=(0, 100), title="STS-B test, all pairs, Spearman x 100")
    figure.savefig(path, dpi=130)


def recipe_command(run: Path, flags: Sequence[str], triples: Path | None) -> list[str]:
    """The recipe with the settings of ``LONG``; ``flags`` come later and win."""
    data = run.parent / "long_run_sentences.txt"
    data.write_text("\n".join(sentences()) + "\n", encoding="utf-8")
    command = [sys.executable, str(RECIPES / "llm2vec_smollm2.py"), "--output-dir", str(run), "--full-eval"]
    command += ["--simcse-data", str(data), *(f"--set={key}={value}" for key, value in LONG.items())]
    if triples is not None:
        command += ["--stages", "bi,mntp,simcse,supervised", "--supervised-data", str(triples)]
    return [*command, *flags]


def make_triples(sick: Path, output: Path) -> Path:
    """SICK's triples, by recipes/entailment_triples.py."""
    files = [str(sick / name) for name in ("SICK_train.txt", "SICK_test_annotated.txt")]
    command = [sys.executable, str(RECIPES / "entailment_triples.py"), *files, "--output", str(output)]
    subprocess.run(command, check=True)
    return output


def overlaps(triples: Path | None) -> dict[str, dict[str, int]]:
    """How much of STS-B stands in the triples."""
    if triples is None:
        return {}
    rows = [json.loads(line) for line in triples.read_text(encoding="utf-8").splitlines()]
    return {split: overlap(rows, load_sts(DATA / f"stsb_{split}.csv.gz")) for split in ("dev", "test")}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sick", type=Path, help="folder of SICK's two files; without it no supervised stage")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "long_run", help="where the run is written")
    parser.add_argument("--name", default="long_run", help="of the files in benchmarks/results")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    log = arguments.run.parent / f"{arguments.run.name}_readings.jsonl"
    if log.exists() and "--resume" not in flags:
        parser.error(f"{log} is there: give --resume to go on with that run, or another --run")
    arguments.run.parent.mkdir(parents=True, exist_ok=True)
    triples = arguments.sick and make_triples(arguments.sick, arguments.run.parent / "sick_triples.jsonl")
    readings = train(recipe_command(arguments.run, flags, triples), arguments.run, log)
    results = json.loads((arguments.run / "results.json").read_text(encoding="utf-8"))
    logs = [arguments.run / name for name in ("metrics.jsonl", "evaluations.jsonl")]
    metrics, evaluations = (
        [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
        for log in logs
    )
    started = json.loads((arguments.run / "run.json").read_text(encoding="utf-8"))
    recipe = started["recipe"]
    content = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "versions": started["versions"],
        "settings": {stage: recipe[stage] for stage in ("mntp", "simcse", "supervised")},
        "flags": flags,
        "stages": results["stages"],
        "overlap": overlaps(triples),
        "drift": [asdict(drift(stage, readings, metrics)) for stage in dict.fromkeys(m["stage"] for m in metrics)],
        "readings": [asdict(reading) for reading in readings],
        "metrics": metrics,
        "evaluations": evaluations,
    }
    arguments.results.mkdir(exist_ok=True)
    for suffix, text in (("json", json.dumps(content) + "\n"), ("md", page(content))):
        (arguments.results / f"{arguments.name}.{suffix}").write_text(text, encoding="utf-8")
    draw(arguments.results / f"{arguments.name}.png", content, metrics)
    print(f"\n{tables(content)}")


if __name__ == "__main__":
    main()
