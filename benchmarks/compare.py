"""Has anything become slower? One run of a benchmark against a committed one, by ratios.

    python benchmarks/compare.py NEW.json benchmarks/results/losses_cpu.json
    python benchmarks/compare.py runs/gpu benchmarks/results/h100-2027-01-05      # every file that both folders have

What is compared is how much faster, and smaller, than each peer ours was in its own run: a quotient of two figures that
were taken in turns on one machine, so that a machine which is slower today changes none. A ratio that got worse by more
than ``--tolerance`` (10 %) is named, and the exit status is 1; one that only one of the runs has is named too, and
counts for nothing. Reads the JSON of attention.py, losses.py, train_step.py, encode.py, gpu_suite.py and (by
``--benchmark-json``) ops.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RATIOS = {"ours_is_faster_by": "time", "ours_is_smaller_by": "memory", "of_gemms": "share of the GEMMs' rate"}
MEASURED = {  # of a row of attention.py or losses.py: what is no name of its case
    *RATIOS,
    "timing",
    "tflops",
    "of_peak",
    "peak_bytes",
    "max_error",
    "relative_error",
    "error",
    "note",
}


def ratios(content: dict[str, Any]) -> dict[str, float]:
    """By name, how many times faster or smaller ours was than a peer; larger is better.

    Raises:
        ValueError: the file of no benchmark that is known here.
    """
    for key, read in READERS.items():
        if key in content:
            return read(content[key])
    raise ValueError("neither the rows of attention.py or losses.py nor the result of train_step.py or encode.py")


def _of_parts(parts: dict[str, Any]) -> dict[str, float]:
    found = {}
    for part, entry in parts.items():
        if "result" in entry:
            found |= {f"{part}: {name}": value for name, value in ratios(entry["result"]).items()}
    return found


def _of_rows(rows: list[dict[str, Any]]) -> dict[str, float]:
    found = {}
    for row in rows:
        case = " ".join(str(value) for key, value in row.items() if key not in MEASURED and value is not None)
        if row["implementation"] != "bivec":
            found |= _of(row, case)
    return found


def _of_stages(stages: dict[str, Any]) -> dict[str, float]:
    found = {}
    for stage, step in stages.items():
        for name, side in step["sides"].items():
            # of a peer's rate the ratios are enough; ours has none
            keys = [key for key in RATIOS if (key == "of_gemms") == (name == "bivec")]
            found |= _of({key: side.get(key) for key in keys}, f"{stage} {name}")
    return found


def _of_workloads(workloads: dict[str, Any]) -> dict[str, float]:
    found = {}
    for name, workload in workloads.items():
        found |= _of(workload, f"encode {name}")
    return found


def _of_ops(rows: list[dict[str, Any]]) -> dict[str, float]:
    medians = {(row["group"], row["implementation"]): row["median_s"] for row in rows}
    return {
        f"{group} {name}, time": median / medians[group, "bivec"]
        for (group, name), median in medians.items()
        if name != "bivec" and (group, "bivec") in medians
    }


def medians_of_ops(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Of what pytest-benchmark wrote for ops.py, all that is compared."""
    return [
        {"group": row["group"], "implementation": row["params"]["name"], "median_s": row["stats"]["median"]}
        for row in content["benchmarks"]
    ]


def _of(figures: dict[str, Any], case: str) -> dict[str, float]:
    return {f"{case}, {what}": figures[key] for key, what in RATIOS.items() if figures.get(key) is not None}


READERS = {  # by a key of the file; the first that is there decides
    "parts": _of_parts,  # of gpu_suite.py
    "rows": _of_rows,
    "stages": _of_stages,
    "workloads": _of_workloads,
    "benchmarks": lambda rows: _of_ops(medians_of_ops({"benchmarks": rows})),
    "ops": _of_ops,
}


def compare(new: dict[str, float], old: dict[str, float], tolerance: float) -> tuple[list[str], list[str]]:
    """What got worse, and what one of the two has not; in words."""
    worse = [
        f"{name}: {old[name]:.2f} x before, {new[name]:.2f} x now ({100 * (1 - new[name] / old[name]):.0f} % worse)"
        for name in old.keys() & new.keys()
        if new[name] < old[name] * (1 - tolerance)
    ]
    alone = [f"{name}: only in the {'new' if name in new else 'old'} run" for name in old.keys() ^ new.keys()]
    return sorted(worse), sorted(alone)


def pairs(new: Path, old: Path) -> list[tuple[Path, Path]]:
    """The files to compare: the two, or those of the same name in two folders."""
    if new.is_dir() and old.is_dir():
        return [(file, old / file.name) for file in sorted(new.glob("*.json")) if (old / file.name).is_file()]
    return [(new, old)]


def read(path: Path) -> dict[str, float]:
    """The ratios of a file.

    Raises:
        ValueError: it is of no benchmark that is known here.
    """
    return ratios(json.loads(path.read_text(encoding="utf-8")))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path, help="JSON of a run, or a folder of them")
    parser.add_argument("old", type=Path, help="the committed one")
    parser.add_argument("--tolerance", type=float, default=0.1, help="how much worse is no news (default: %(default)s)")
    options = parser.parse_args(arguments)
    chosen = pairs(options.new, options.old)
    if not chosen:
        print(f"{options.new} and {options.old} have no file of the same name", file=sys.stderr)
        return 2
    status, compared = 0, 0
    for new, old in chosen:
        try:
            found, before = read(new), read(old)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if len(chosen) > 1:
                print(f"{new.name}: left out ({error})")
                continue
            print(f"{new} and {old}: {error}", file=sys.stderr)
            return 2
        worse, alone = compare(found, before, options.tolerance)
        compared += len(found.keys() & before.keys())
        for line in worse:
            print(f"WORSE  {new.name}: {line}")
        for line in alone:
            print(f"{new.name}: {line}")
        status = max(status, int(bool(worse)))
    print(f"{compared} ratios compared, {'some got worse' if status else 'none got worse'}")
    return status if compared or status else 2


if __name__ == "__main__":
    sys.exit(main())
