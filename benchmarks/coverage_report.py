"""What the tests do not run, file by file, each with the reason: nothing is left out without having been looked at.

    pytest -n 2 --dist loadfile --cov        # 20 minutes on two cores; writes .coverage into the repository's root
    python benchmarks/coverage_report.py     # the figures of that file

Lines and branches of engine/, kernels/ and models/; bodies of Triton kernels are left out, which run rewritten in the
interpreter, and so are processes that tests start (see REASONS). Writes coverage.json and coverage.md into
benchmarks/results and ends with 1 where a file has gaps and no reason here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

RANKS = "several processes: tests/engine/test_ranks.py and others start them, and they are not measured"
CHILD = "runs in a process that tests start, which is not measured"
GPU = "needs a GPU"
COMPILED = "traced by torch.compile, which coverage does not see"
ABSENT = "a package or file that is there wherever tests run"
REFUSED = "an error of the disk, the machine or another library that no test brings about"
SINCE = "tested since that run, by tests/engine/test_rare_errors.py"
WITHOUT = "a branch that skips an optional value; with it is tested"

REASONS: dict[str, tuple[str, ...]] = {
    "engine/checkpoint.py": (RANKS,),
    "engine/cli/__init__.py": (CHILD,),
    "engine/cli/__main__.py": (CHILD,),
    "engine/cli/checks.py": (GPU, WITHOUT),
    "engine/cli/config_file.py": (WITHOUT,),
    "engine/cli/convert.py": (RANKS,),
    "engine/cli/encode.py": (RANKS, CHILD),
    "engine/cli/evaluate.py": (CHILD,),
    "engine/cli/selftest.py": (CHILD,),
    "engine/cli/versions.py": (ABSENT,),
    "engine/corpus.py": (RANKS, ABSENT),
    "engine/corpus_files.py": (REFUSED,),
    "engine/data.py": (REFUSED,),
    "engine/data_files.py": (ABSENT, REFUSED),
    "engine/distributed.py": (RANKS,),
    "engine/encoder_config.py": (REFUSED,),
    "engine/entailment.py": (SINCE, WITHOUT),
    "engine/evaluation/auto_encoder.py": (WITHOUT, REFUSED),
    "engine/evaluation/chunks.py": (WITHOUT,),
    "engine/evaluation/echo.py": (WITHOUT,),
    "engine/evaluation/future_tokens.py": (WITHOUT,),
    "engine/evaluation/local_tasks.py": (WITHOUT,),
    "engine/evaluation/mteb_run.py": (REFUSED,),
    "engine/evaluation/study.py": (ABSENT, WITHOUT),
    "engine/evaluation/word_data.py": (REFUSED,),
    "engine/foreign_settings.py": (WITHOUT,),
    "engine/gguf_export.py": (REFUSED, WITHOUT),
    "engine/grad_cache.py": (RANKS,),
    "engine/inputs.py": (CHILD,),
    "engine/integrations/sentence_transformers.py": (RANKS,),
    "engine/integrations/transformers.py": (WITHOUT, REFUSED),
    "engine/integrations/transformers_layers.py": (REFUSED,),
    "engine/layouts.py": (REFUSED,),
    "engine/lora.py": (RANKS,),
    "engine/model_card.py": (WITHOUT,),
    "engine/origin.py": (REFUSED,),
    "engine/planner.py": (GPU, REFUSED),
    "engine/recipe.py": (SINCE,),
    "engine/recipe_arguments.py": (REFUSED,),
    "engine/records.py": (WITHOUT,),
    "engine/run.py": (RANKS,),
    "engine/run_files.py": (GPU, ABSENT),
    "engine/run_start.py": (RANKS, CHILD),
    "engine/run_weights.py": (RANKS,),
    "engine/sentence_transformers_files.py": (WITHOUT,),
    "engine/sentencepiece_bpe.py": (WITHOUT,),
    "engine/sharding.py": (RANKS,),
    "engine/text_format.py": (REFUSED,),
    "engine/tokenizer.py": (REFUSED, WITHOUT),
    "engine/trainer.py": (GPU, RANKS),
    "kernels/__init__.py": (CHILD,),
    "kernels/aot.py": (CHILD,),
    "kernels/aot_binary.py": (CHILD,),
    "kernels/aot_cases.py": (CHILD,),
    "kernels/aot_cases_layers.py": (CHILD,),
    "kernels/aot_cases_lora.py": (CHILD,),
    "kernels/attention_layout.py": (WITHOUT,),
    "kernels/attention_triton.py": (REFUSED,),
    "kernels/backend.py": (COMPILED,),
    "kernels/gemm.py": (GPU,),
    "kernels/info_nce.py": (COMPILED,),
    "kernels/info_nce_triton.py": (COMPILED,),
    "kernels/launch.py": (GPU,),
    "kernels/linear_cross_entropy_torch.py": (WITHOUT,),
    "kernels/linear_cross_entropy_triton.py": (COMPILED,),
    "kernels/overwriting.py": (COMPILED,),
    "kernels/rms_norm.py": (WITHOUT,),
    "kernels/rotary_triton.py": (WITHOUT, COMPILED),
    "models/gguf.py": (WITHOUT, REFUSED),
    "models/gguf_file.py": (REFUSED,),
    "models/weights.py": (ABSENT,),
}


def measured() -> dict[str, Any]:
    """The totals and the files with gaps, of coverage's own JSON."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "coverage.json"
        command = [sys.executable, "-m", "coverage", "json", "-q", "-o", str(file)]
        subprocess.run(command, cwd=ROOT, check=True)
        found = json.loads(file.read_text(encoding="utf-8"))
    files = {}
    for name, of_file in sorted(found["files"].items()):
        branches = [f"{start}->{'exit' if end < 0 else end}" for start, end in of_file["missing_branches"]]
        if of_file["missing_lines"] or branches:
            files[name] = {
                "percent": of_file["summary"]["percent_covered"],
                "lines": ranges(of_file["missing_lines"]),
                "branches": branches,
            }
    names = ("num_statements", "missing_lines", "num_branches", "missing_branches", "percent_covered")
    return {
        "command": "pytest -n 2 --dist loadfile --cov; python benchmarks/coverage_report.py",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "coverage": found["meta"]["version"],
        "totals": {name: found["totals"][name] for name in names},
        "files": files,
    }


def ranges(numbers: list[int]) -> list[str]:
    """[3, 4, 5, 9] as ["3-5", "9"]."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found]


def markdown(content: Mapping[str, Any]) -> str:
    """The page: totals, then the files with gaps."""
    totals = content["totals"]
    rows = []
    for name, one in content["files"].items():
        lines, why = ", ".join(one["lines"]) or "all run", "; ".join(REASONS.get(name, ()))
        rows.append(f"| {name} | {one['percent']:.0f} % | {lines} | {why} |")
    told = (
        f"`{content['command']}`, {content['date']}, coverage {content['coverage']}: "
        f"**{totals['percent_covered']:.1f} %** of {totals['num_statements']:,} statements and "
        f"{totals['num_branches']:,} branches of engine/, kernels/ and models/; {totals['missing_lines']} statements "
        f"and {totals['missing_branches']} branches are not run. Bodies of Triton kernels are left out, and processes "
        "that tests start are not measured."
    )
    head = ["| file | covered | lines not run | why |", "|---|---|---|---|"]
    return "\n".join(["# What the tests do not run", "", told, "", *head, *rows, ""])


def main() -> int:
    """The command line; 1 where a file has gaps and no reason."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    content = measured()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "coverage.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "coverage.md").write_text(markdown(content), encoding="utf-8")
    print(markdown(content).partition("\n| file")[0])
    unexplained = sorted(content["files"].keys() - REASONS.keys())
    if unexplained:
        print(f"without a reason: {', '.join(unexplained)}", file=sys.stderr)
    return int(bool(unexplained))


if __name__ == "__main__":
    sys.exit(main())
