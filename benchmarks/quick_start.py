"""How good is the quick start, and how much does it vary? Runs recipes/llm2vec_smollm2.py once a seed and averages.

    python benchmarks/quick_start.py    # seeds 42, 43, 44; 10 minutes each on 2 cores
    python benchmarks/quick_start.py --set simcse.optim.steps=15   # any other flag goes to the recipe

Writes benchmarks/results/quick_start.{json,md,png}; ``--name`` chooses another file name. Nothing else should run on
the machine at the same time: two busy processes on two cores are five times slower, not two.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "llm2vec_smollm2.py"


def processor() -> str:
    """The processor's name where /proc tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def run_seed(seed: int, directory: Path, flags: list[str]) -> dict:
    """Runs the recipe in a process of its own (peak memory is the process's) and returns its results."""
    command = [sys.executable, str(RECIPE), "--seed", str(seed), "--output-dir", str(directory), *flags]
    subprocess.run(command, check=True)
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    run = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {"seed": seed, **results, "versions": run["versions"], "metrics": [json.loads(line) for line in lines]}


def table(runs: list[dict]) -> str:
    """One row a stage: mean and standard deviation over the seeds, dev and test."""

    def cell(stage: int, split: str) -> str:
        values = [run["stages"][stage][f"sts_{split}_spearman"] for run in runs]
        return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")

    rows = ["| stage | pooling | STS-B dev | STS-B test |", "|---|---|---|---|"]
    for index, stage in enumerate(runs[0]["stages"]):
        rows.append(f"| {stage['stage']} | {stage['pooling']} | {cell(index, 'dev')} | {cell(index, 'test')} |")
    return "\n".join(rows)


def report(content: dict) -> str:
    """The whole Markdown file."""
    runs = content["runs"]
    minutes = [run["seconds"] / 60 for run in runs]
    memory = max(run["peak_memory_bytes"] for run in runs) / 2**30
    cost = f"{min(minutes):.1f} to {max(minutes):.1f} minutes, peak memory {memory:.1f} GiB"
    return f"{table(runs)}\n\n{cost}; {content['machine']}; flags: {content['flags']}\n"


def draw(path: Path, runs: list[dict]) -> None:
    """Stages as bars (mean over the seeds, one dot a seed) and the loss curves of all seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    bars, *curves = figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
    names = [stage["stage"] for stage in runs[0]["stages"]]
    values = [[run["stages"][i]["sts_dev_spearman"] for run in runs] for i in range(len(names))]
    drawn = bars.barh(names, [mean(v) for v in values], color="#2f6fb5")
    bars.bar_label(drawn, fmt="%.1f", padding=6)
    for i, v in enumerate(values):
        bars.plot(v, [i] * len(v), "k.", markersize=4)
    bars.invert_yaxis()
    bars.set(xlim=(0, 100), xlabel="STS-B dev, Spearman x 100", title=f"{len(runs)} seeds")
    for axis, stage in zip(curves, ("mntp", "simcse"), strict=True):
        for run in runs:
            points = [(m["step"], m["loss"]) for m in run["metrics"] if m["stage"] == stage]
            axis.plot(*zip(*points, strict=True), linewidth=1, label=f"seed {run['seed']}")
        axis.set(title=f"{stage} loss", xlabel="step")
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quick_start", help="where the runs are written")
    parser.add_argument("--name", default="quick_start", help="of the files in benchmarks/results")
    arguments, flags = parser.parse_known_args()
    runs = [run_seed(seed, arguments.runs / f"seed-{seed}", flags) for seed in arguments.seeds]
    machine = f"{processor()}, {os.cpu_count()} cores"
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    content = {"date": datetime.now(timezone.utc).date().isoformat(), "machine": machine, "flags": flags, "runs": runs}
    (results / f"{arguments.name}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    (results / f"{arguments.name}.md").write_text(report(content), encoding="utf-8")
    draw(results / f"{arguments.name}.png", runs)
    print(f"\n{report(content)}", end="")


if __name__ == "__main__":
    main()
