"""The figures of the READMEs' main tables are those of benchmarks/results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, BENCHMARKS = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "benchmarks/README.md"))
MIB = 2**20
OURS = "bivec"


def result(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def row(text: str, start: str) -> list[str]:
    """The cells behind the first one of the table row that begins so, without bold."""
    lines = [line.replace("**", "") for line in text.splitlines()]
    found = [line for line in lines if line.startswith(f"| {start} |")]
    assert len(found) == 1, f"{len(found)} rows begin with {start!r}"
    return [cell.strip() for cell in found[0].strip("|").split("|")[1:]]


def rounded(value: float, like: str) -> str:
    """With as many decimals as the first number of ``like``."""
    found = re.search(r"\d[\d,]*(?:\.(\d+))?", like)
    return f"{value:,.{len(found[1] or '')}f}"


def has(cell: str, *values: float) -> bool:
    """Whether the numbers of a cell are these, rounded as they stand there."""
    written = re.findall(r"\d[\d,]*(?:\.\d+)?", cell)
    return written == [rounded(value, text) for value, text in zip(values, written, strict=True)]


@pytest.mark.parametrize(
    ("start", "stage"),
    [
        ("decoder as it is (`uni`) | mean", "uni"),
        ("decoder, the best causal pooling | weighted mean", "uni weighted-mean"),
        ("bidirectional attention (`bi`) | mean", "bi"),
        ("+ MNTP | mean", "bi+mntp"),
        ("+ SimCSE | mean", "bi+mntp+simcse"),
    ],
)
def test_the_headline(start, stage):
    runs = result("quick_start.json")["runs"]
    assert len(runs) == 3
    for cell, split in zip(row(README, start)[1:], ("dev", "test"), strict=True):
        found = [s[f"sts_{split}_spearman"] for run in runs for s in run["stages"] if s["stage"] == stage]
        assert has(cell, *((mean(found), stdev(found)) if "±" in cell else (mean(found),)))


def test_the_whole_sets():
    encoders = result("quick_start_whole_sets.json")
    text = re.search(r"whole sets.*?\(`python benchmarks/sts.py", README, flags=re.DOTALL)[0]
    for split in ("dev", "test"):
        found = [one[split] for one in encoders]
        assert f"{mean(found):.1f} ± {stdev(found):.1f} {split}" in text


@pytest.mark.parametrize(("start", "stage"), [("MNTP, 8 x 512", "mntp"), ("SimCSE, 64 sentences", "simcse")])
def test_training_steps(start, stage):
    sides = result("train_step_cpu.json")["stages"][stage]["sides"]
    for cell, side in zip(row(README, start), (OURS, "transformers + peft", "transformers + peft, kept"), strict=True):
        if side not in sides:
            assert cell == "above 20 GiB"
            continue
        one = sides[side]
        peers = (one["ours_is_faster_by"], one["peak_bytes"] / MIB, one["ours_is_smaller_by"])
        assert has(cell, one["tokens_per_s"], *((one["peak_bytes"] / MIB,) if side == OURS else peers))


@pytest.mark.parametrize("workload", ["batches of 32", "batches of 128", "one call"])
def test_encoding(workload):
    order = "" if workload == "one call" else "given order, "
    ours, theirs, _ = row(README, f"encoding STS-B sentences, {order}{workload}")
    content = result("encode_cpu.json")
    found, version = content["workloads"][workload], content["peer"]["version"]
    assert has(ours, found["sides"][OURS]["sentences_per_s"])
    assert theirs.startswith(f"sentence-transformers {version}: ")
    peer = found["sides"]["sentence-transformers"]["sentences_per_s"]
    assert has(theirs.split(": ")[1], peer, found["ours_is_faster_by"])


STATES = ("uni", "echo", "bi", "bi+mntp", "bi+mntp+simcse", "uni+simcse", "bi+simcse")


@pytest.mark.parametrize(
    ("start", "pooling"),
    [
        ("STS-B test, all pairs, mean", "mean"),
        ("the same, weighted mean", "weighted_mean"),
        ("the same, EOS", "eos_token"),
    ],
)
def test_pooling(start, pooling):
    scores = {
        (one["variant"], one["pooling"]): one["spearman"] for one in result("reproduce/pooling.json")["data"]["scores"]
    }
    for cell, state in zip(row(README, start), STATES, strict=True):
        assert has(cell, scores[state, pooling]) if (state, pooling) in scores else cell == ""


def test_what_a_prefix_knows():
    found = result("reproduce/prefixes.json")["data"]["auc"]
    for cell, state in zip(row(README, "does a prefix know what follows? AUC"), STATES, strict=True):
        assert has(cell, found[state] / 100), state


@pytest.mark.parametrize("scale", [20, 50, 100])
def test_the_losses(scale):
    cells = row(BENCHMARKS, f"`info_nce`, scale {scale}")
    errors = {
        one["implementation"]: one["gradient_error"]
        for one in result("losses_cpu.json")["errors"]
        if (one["loss"], one["dtype"], one["scale"]) == ("info_nce", "bf16", scale) and "solved" in one["batch"]
    }
    for cell, side in zip(cells, (OURS, "torch", "sentence-transformers"), strict=False):
        assert has(cell, 100 * errors[side]), side


def test_the_huge_loss():
    found = result("losses_huge.json")
    text = " ".join(BENCHMARKS.split())
    minutes, mib = found["seconds"] / 60, found["peak_bytes"] / MIB
    pairs, dim = f"{found['rows']:,}", f"{found['dim']:,}"
    assert f"{pairs} pairs at D = {dim}, forward and backward, take {minutes:.0f} minutes and {mib:,.0f} MiB" in text


def test_a_figure_that_is_off_is_seen():
    assert has("144 tokens/s, 1,650 MiB", 143.73, 1649.8)
    assert not has("144 tokens/s, 1,650 MiB", 143.73, 1651.0)
    assert not has("85.0 ± 0.9", 85.04, 0.96)
