"""Would the tests notice a mistake? Mutation testing of packing, masking, losses and schedule.

    pip install cosmic-ray==8.7.0
    python benchmarks/mutation.py                     # all parts
    python benchmarks/mutation.py --only masking      # one; the other parts of the report stay as they are
    python benchmarks/mutation.py --sample 100        # at most so many mutants of a file, drawn with --seed
    python benchmarks/mutation.py --again             # the survivors of the report, after a test was added
    python benchmarks/mutation.py --sample 60 --seed 3 --name fresh --output DIR    # others, beside the report

Each mutant is a copy of the repository with one small change to one file (benchmarks/mutation_sites.py says which);
the tests of that file are run on it until the first failure. A mutant is killed when a test fails, or when its tests
do not end in their time; it survives when all pass. Survivors that no input tells from the original, survivors that
are left and those that a test was written for since are named with the reason in benchmarks/mutation_survivors.json;
any other is listed as unexplained.

Tests are written for survivors, so the rate after ``--again`` says little of other mutants: those of a fresh sample are
for that, and its first outcomes are what the report keeps. Writes mutation.json and mutation.md (``--name``) into
benchmarks/results, or ``--output DIR``.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mutation_sites import ZEROS, Site, diff_of, mutated, same_program, sites_of
from timing import describe_run

ROOT = Path(__file__).resolve().parents[1]
SURVIVORS = ROOT / "benchmarks" / "mutation_survivors.json"
SINCE = "tested since"  # a survivor for which a test was written after this run
AUTOCAST = "tests/kernels/test_autocast.py::test_autocast_changes_nothing"
INFO_NCE = ("tests/kernels/test_info_nce_arguments.py", "tests/kernels/test_info_nce.py", f"{AUTOCAST}[info_nce]")
OBJECTIVES = (
    "tests/engine/test_objectives.py",
    "tests/engine/test_properties.py::test_ranks_together_have_the_step_of_one",
)
CROSS_ENTROPY = ("tests/kernels/test_linear_cross_entropy.py", f"{AUTOCAST}[linear_cross_entropy]")
TRIPLES = ("tests/engine/test_supervised.py", "tests/engine/test_grad_cache.py")
PACKING = ("tests/engine/test_packing.py", "tests/models/test_batch.py", "tests/engine/test_triple_batches.py")
PARTS: dict[str, dict[str, tuple[str, ...]]] = {  # part -> file -> its tests
    "packing": {"engine/packing.py": PACKING, "models/batch.py": PACKING, "engine/triple_batches.py": PACKING},
    "masking": {"engine/masking.py": ("tests/engine/test_masking.py",)},
    "losses": {
        "kernels/info_nce.py": INFO_NCE,
        "kernels/info_nce_plan.py": INFO_NCE,
        "kernels/info_nce_torch.py": INFO_NCE,
        "kernels/linear_cross_entropy.py": CROSS_ENTROPY,
        "kernels/linear_cross_entropy_torch.py": CROSS_ENTROPY,
        "engine/objectives.py": OBJECTIVES,
    },
    "contrastive": {"engine/supervised.py": TRIPLES, "engine/grad_cache.py": TRIPLES},
    "schedule": {"engine/optim.py": ("tests/engine/test_optim.py",)},
}


def chosen_mutants(source: str, sample: int | None, seed: int) -> tuple[list[dict[str, Any]], int]:
    """The mutants of a file to be tested, and how many it has. Those of ``zeros`` are always among them."""
    sites = sites_of(source)
    zeros = [site for site in sites if site.operator == ZEROS]
    others = [site for site in sites if site.operator != ZEROS]
    if sample is not None and sample < len(others):
        others = [others[i] for i in np.random.default_rng(seed).permutation(len(others))[:sample]]
    chosen = []
    for site in (*zeros, *sorted(others, key=lambda site: (site.line, site.operator, site.occurrence))):
        changed = mutated(source, site)
        if same_program(source, changed):
            continue
        before, after = (site.name, "zeros") if site.operator == ZEROS else diff_of(source, changed)
        place = {"operator": site.operator, "occurrence": site.occurrence, "line": site.line}
        chosen.append(place | {"before": before, "after": after, "source": changed})
    return chosen, len(sites)


def run_jobs(jobs: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """Results of jobs as they come, by a process that sees the copy of the repository alone.

    Raises:
        RuntimeError: the process ended early.
    """
    sent, found = folder / "jobs", folder / "results"
    sent.write_text("".join(json.dumps(job) + "\n" for job in jobs), encoding="utf-8")
    found.write_text("", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTEST_ADDOPTS", None)  # options of the pytest that runs this one
    command = [sys.executable, str(ROOT / "benchmarks" / "mutation_worker.py"), str(sent), str(found)]
    with subprocess.Popen(command, cwd=folder / "repository", env=environment) as worker, found.open() as results:
        seen = 0
        while seen < len(jobs):
            line = results.readline()
            if line:
                seen += 1
                yield json.loads(line)
            elif worker.poll() is not None:
                raise RuntimeError(f"the worker ended with {worker.returncode} after {seen} of {len(jobs)} jobs")
            else:
                time.sleep(0.05)


def copied(folder: Path) -> None:
    """The files that git tracks or would, with their bytecode, and a folder from which they are imported."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "repository" / name)
    (folder / "site").mkdir()
    (folder / "site" / "bivec").symlink_to(folder / "repository")
    compileall.compile_dir(folder / "repository", quiet=2)


def test_file(file: str, tests: Sequence[str], sample: int | None, seed: int, folder: Path) -> dict[str, Any]:
    """Tests mutants of one file."""
    mutants, possible = chosen_mutants((ROOT / file).read_text(encoding="utf-8"), sample, seed)
    run_mutants(file, tests, mutants, folder)
    return {"tests": list(tests), "possible": possible, "mutants": mutants}


def test_again(file: str, tests: Sequence[str], found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Tests the survivors of an earlier run.

    Raises:
        RuntimeError: the file is another one by now.
    """
    source = (ROOT / file).read_text(encoding="utf-8")
    alive = [one for one in found["mutants"] if one["outcome"] == "survived"]
    for one in alive:
        name = one["before"] if one["operator"] == ZEROS else ""
        one["source"] = mutated(source, Site(one["operator"], one["occurrence"], one["line"], name))
        if one["operator"] != ZEROS and diff_of(source, one["source"]) != (one["before"], one["after"]):
            raise RuntimeError(f"{file} has changed: run all of its mutants")
        del one["kind"], one["reason"]
    if alive:
        run_mutants(file, tests, alive, folder)
    return found


def run_mutants(file: str, tests: Sequence[str], mutants: Sequence[dict[str, Any]], folder: Path) -> None:
    """Replaces the ``source`` of every mutant by its ``outcome``, and ``by`` which test it was killed.

    Raises:
        RuntimeError: the tests fail on the file as it is.
    """
    job = {"file": str(folder / "repository" / file), "tests": list(tests)}
    results = run_jobs([job | {"source": None}, *(job | {"source": one["source"]} for one in mutants)], folder)
    whole = next(results)
    if whole["outcome"] != "survived":
        raise RuntimeError(f"{file}: its tests fail as it is: {whole}")
    for number, (one, result) in enumerate(zip(mutants, results, strict=True), 1):
        del one["source"]
        one |= {"outcome": result["outcome"], "by": result["by"].rpartition("/")[2]}
        if one["outcome"] != "killed" or number % 50 == 0:
            place = f"{file}:{one['line']} {number}/{len(mutants)}"
            print(f"{place} {one['outcome']}: {one['before']} -> {one['after']}", flush=True)


def explained(file: str, mutants: Sequence[dict[str, Any]], known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mutants, the survivors with their ``kind``, "equivalent", "left", SINCE or "unexplained", and its ``reason``."""
    reasons = {(one["file"], one["before"], after): one for one in known for after in one["after"]}
    found = []
    for one in mutants:
        reason = reasons.get((file, one["before"], one["after"]), {"kind": "unexplained", "reason": ""})
        extra = {} if one["outcome"] != "survived" else {"kind": reason["kind"], "reason": reason["reason"]}
        found.append(one | extra)
    return found


def counts_of(mutants: Sequence[dict[str, Any]]) -> Counter[str]:
    """How many of each outcome; survivors by their kind."""
    return Counter(one.get("kind", one["outcome"]) for one in mutants)


def kill_rate(counts: Counter[str]) -> float:
    """Killed, timeouts among them, of all that are not equivalent; in percent."""
    killed, alive = counts["killed"] + counts["timeout"], counts["left"] + counts[SINCE] + counts["unexplained"]
    return 100 * killed / (killed + alive)


def row_of(name: str, possible: int, mutants: Sequence[dict[str, Any]]) -> str:
    """A row of the table."""
    counts = counts_of(mutants)
    zeros = [one for one in mutants if one["operator"] == ZEROS]
    noticed = sum(one["outcome"] != "survived" for one in zeros)
    columns = [name, possible, len(mutants), counts["killed"], counts["timeout"], counts["equivalent"]]
    columns += [
        counts["left"],
        counts[SINCE],
        counts["unexplained"],
        f"{kill_rate(counts):.1f} %",
        f"{noticed} of {len(zeros)}",
    ]
    return "| " + " | ".join(map(str, columns)) + " |"


def markdown(document: dict[str, Any]) -> str:
    """The report."""
    lines = [
        "# Mutation testing",
        "",
        "Would the tests notice a mistake? One small change to one file at a time, then the tests of that file until",
        "the first failure. Columns: mutants the file has, tested (a seeded sample where fewer), killed by a test,",
        "stopped by the limit of time (killed as well), equivalent (no input tells them from the original), left (they",
        "change speed, memory or what other tests see), met by a test written since, unexplained; killed in",
        "this run of those not equivalent; and of the public functions how many fail their tests when they give zeros.",
        "`zeros` and `removed` (a statement is left out) are ours, the other operators cosmic-ray's.",
        "",
    ]
    for name, part in document["parts"].items():
        run, again = part["run"], part.get("again")
        versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        lines.append(
            f"* {name}: `{run['command']}`, {run['date'][:10]}, commit {run['commit']}, {run['host']}; {versions}."
        )
        if again:
            lines.append(f"  With the tests that its survivors asked for: `{again['command']}`, {again['date'][:10]}.")
        lines += [f"  {note}" for note in part.get("notes", ())]
    head = "| | mutants | tested | killed | time | equivalent | left | tested since | unexplained | kill rate "
    head += "| zeros noticed |"
    lines += ["", head, "|---|" + "---|" * 10]
    for name, part in document["parts"].items():
        everything = [one for file in part["files"].values() for one in file["mutants"]]
        possible = sum(file["possible"] for file in part["files"].values())
        lines.append(row_of(f"**{name}**", possible, everything))
        if len(part["files"]) > 1:
            lines += [row_of(file, found["possible"], found["mutants"]) for file, found in part["files"].items()]
    lines += ["", "## Every survivor", ""]
    for part in document["parts"].values():
        for file, found in part["files"].items():
            lines += _survivors(file, found["mutants"])
    return "\n".join(lines).rstrip() + "\n"


def _survivors(file: str, mutants: Sequence[dict[str, Any]]) -> list[str]:
    alive: dict[tuple[str, str, str], list[str]] = {}
    for one in mutants:
        if one["outcome"] == "survived":
            alive.setdefault((one["before"], one["kind"], one["reason"]), []).append(one["after"])
    if not alive:
        return []
    lines = [f"### {file}", ""]
    for (before, kind, reason), after in alive.items():
        lines.append(f"* {kind}{f': {reason}' if reason else ''}")
        lines += ["  ```diff", f"  - {before}", *(f"  + {text}" for text in after), "  ```"]
    return [*lines, ""]


def main() -> None:
    """Tests, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default: all)")
    parser.add_argument("--sample", type=int, help="mutants of a file (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="test the survivors of the report's mutants again")
    parser.add_argument("--explain", action="store_true", help="test nothing, read the reasons of survivors again")
    parser.add_argument("--name", default="mutation", help="of the two files (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="default: %(default)s")
    given = parser.parse_args()
    target = given.output / f"{given.name}.json"
    if given.again and not target.exists():
        parser.error(f"--again: there is no report {target} whose survivors could be tested")
    document = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {"parts": {}}
    for name in () if given.explain else given.only:
        with tempfile.TemporaryDirectory() as folder:
            copied(Path(folder))
            if given.again:
                part = document["parts"][name]
                for file, found in part["files"].items():
                    test_again(file, PARTS[name][file], found, Path(folder))
                part["again"] = described()
                _write(document, target)
                continue
            part = document["parts"][name] = {"run": described(), "files": {}}
            for file, tests in PARTS[name].items():
                part["files"][file] = test_file(file, tests, given.sample, given.seed, Path(folder))
                _write(document, target)
    _write(document, target)
    print(target.with_suffix(".md").read_text(encoding="utf-8").partition("## Every")[0])


def described() -> dict[str, Any]:
    """Of this run: command, date, machine, versions of what matters here."""
    import importlib.metadata

    run = describe_run(torch.device("cpu"))
    for package in ("pytest", "hypothesis", "cosmic_ray"):
        run["versions"][package] = importlib.metadata.version(package)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    run["versions"] = {key: run["versions"][key] for key in ("python", "torch", "pytest", "hypothesis", "cosmic_ray")}
    return {key: run[key] for key in ("command", "date", "host", "versions")} | {"commit": commit.stdout.strip()}


def _write(document: dict[str, Any], target: Path) -> None:
    document["parts"] = {name: document["parts"][name] for name in PARTS if name in document["parts"]}
    known = json.loads(SURVIVORS.read_text(encoding="utf-8"))
    for part in document["parts"].values():
        for file, found in part["files"].items():
            found["mutants"] = explained(file, found["mutants"], known)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(markdown(document), encoding="utf-8")


if __name__ == "__main__":
    main()
