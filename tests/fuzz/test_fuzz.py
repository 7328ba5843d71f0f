"""No reader of ours takes a damaged file for another one, nor ends in anything but an error of ours.

A worker (worker.py) reads mutants of small valid files, see there for what is a finding. Here a fixed seed and a few
hundred mutants a reader; BIVEC_LONG_TESTS=1 reads ten thousand in all. With BIVEC_RECORD=1 beside it their counts are
written into benchmarks/results/fuzz.json, of which `python benchmarks/report.py` makes the table in fuzz.md.
"""

import collections
import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest

for package in ("gguf", "sentencepiece", "datasets", "yaml", "regex"):
    pytest.importorskip(package)

WORKER = Path(__file__).with_name("worker.py")
LONG, RECORD = "BIVEC_LONG_TESTS", "BIVEC_RECORD"
FIGURES = Path(__file__).parents[2] / "benchmarks" / "results" / "fuzz.json"
SEED = 0
COUNTS = {  # mutants; those of CI are as many as a second or two allow
    "safetensors": (100, 500),
    "sharded": (100, 400),
    "config": (150, 500),
    "families": (300, 600),
    "gguf": (60, 500),
    "encoder": (60, 400),
    "sentence_transformers": (60, 500),
    "llm2vec": (60, 400),
    "adapter": (300, 500),
    "tokenizer": (60, 400),
    "sentencepiece": (100, 400),
    "texts": (300, 400),
    "csv": (80, 400),
    "jsonl": (60, 400),
    "parquet": (100, 500),
    "sts": (300, 400),
    "triples": (300, 400),
    "triples_parquet": (100, 400),
    "entailment": (300, 400),
    "words": (300, 500),
    "settings": (100, 400),
    "checkpoint": (100, 500),
    "run": (300, 500),
    "corpus": (80, 400),
}
CI_MUTANTS = sum(few for few, _ in COUNTS.values())
assert sum(both[1] for both in COUNTS.values()) >= 10_000
FINE = {"refused", "accepted", "same"}
CANARIES = {"crash": "crash", "exit": "crash", "hang": "hang", "memory": "memory", "write": "write", "wrong": "wrong"}


def fuzz(llama: Path, folder: Path, job: dict) -> dict:
    """The worker's report: reader -> {"seconds", "results"}."""
    report = folder / "report.json"
    command = [sys.executable, str(WORKER), str(llama), str(folder), str(report), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return json.loads(report.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(tiny_llama_dir, tmp_path_factory):
    counts = {name: both[bool(os.environ.get(LONG))] for name, both in COUNTS.items()}
    found = fuzz(tiny_llama_dir, tmp_path_factory.mktemp("fuzz"), {"seed": SEED, "counts": counts})
    if os.environ.get(LONG) and os.environ.get(RECORD):
        record(found)
    return found


def record(found: dict) -> None:
    """Replaces the counts of every reader in the committed figures; what was found before the mends stays."""
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    figures |= {"date": datetime.now(timezone.utc).date().isoformat(), "ci_mutants": CI_MUTANTS}
    for row in figures["readers"]:
        results = found[row["reader"]]["results"]
        outcomes = collections.Counter(result["outcome"] for result in results)
        row |= {"mutants": len(results), "cpu_s": round(found[row["reader"]]["seconds"], 1)}
        row |= {"refused": outcomes["refused"], "accepted": outcomes["accepted"], "as_it_was": outcomes["same"]}
        row["findings"] = sum(count for outcome, count in outcomes.items() if outcome not in FINE)
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def test_the_committed_figures_are_of_these_counts(tmp_path, monkeypatch):
    """And a recorded run writes them again."""
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    assert figures["ci_mutants"] == CI_MUTANTS and figures["seed"] == SEED
    assert {row["reader"]: row["mutants"] for row in figures["readers"]} == {k: many for k, (_, many) in COUNTS.items()}
    file = tmp_path / "fuzz.json"
    file.write_text(json.dumps(figures | {"ci_mutants": 0}), encoding="utf-8")
    monkeypatch.setitem(globals(), "FIGURES", file)
    results = [{"outcome": outcome} for outcome in ("refused", "refused", "accepted", "same", "hang")]
    record({reader: {"seconds": 1.25, "results": results} for reader in COUNTS})
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written.keys() == figures.keys() and written["ci_mutants"] == CI_MUTANTS
    counted = {"mutants": 5, "cpu_s": 1.2, "refused": 2, "accepted": 1, "as_it_was": 1, "findings": 1}
    assert written["readers"] == [row | counted for row in figures["readers"]]


@pytest.mark.slow
@pytest.mark.parametrize("reader", COUNTS)
def test_mutants_are_refused_or_read_as_they_are(reader, report):
    results = report[reader]["results"]
    bad = [result for result in results if result["outcome"] not in FINE]
    assert not bad, "\n\n".join(
        f"{result['outcome']} {result.get('file')}: {result.get('detail')}" for result in bad[:5]
    )
    outcomes = collections.Counter(result["outcome"] for result in results)
    # a reader that refuses, or takes, everything is not tested by this
    assert outcomes["refused"] >= len(results) / 5 and outcomes["accepted"] >= 2


@pytest.mark.slow
def test_the_worker_finds_what_it_looks_for(tiny_llama_dir, tmp_path):
    """Readers that are bad on purpose, one for every kind of finding."""
    found = fuzz(tiny_llama_dir, tmp_path, {"seed": SEED, "counts": {f"bad_{kind}": 3 for kind in CANARIES}})
    for kind, outcome in CANARIES.items():
        results = found[f"bad_{kind}"]["results"]
        assert [result["outcome"] for result in results] == [outcome] * 3, results
