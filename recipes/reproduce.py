"""The paper's evaluations and analyses on the quick start's encoder, and a report that says which trends hold.

    python recipes/llm2vec_smollm2.py                      # writes runs/llm2vec-smollm2-135m, in 10 minutes
    python recipes/reproduce.py                            # reads it, writes runs/reproduce/report.md, in an hour
    python recipes/reproduce.py --only prefixes,masks      # some of the parts, and the report of those that are there
    python recipes/reproduce.py --smoke                    # all of them on very little data: shows that they work

Every part keeps its result in ``--output-dir``; the same command goes on with a study that was stopped:

    baselines    SimCSE on Uni, on Bi, and on Bi+MNTP again, with STS along the way (three trainings)
    pooling      STS-B test by variant and pooling, Echo and MiniLM beside them      (METHOD 7.3, 7.4)
    tasks        an STS, a retrieval, a clustering and a pair task, run by mteb      (METHOD 7)
    words        chunking, NER and POS with a linear probe on frozen features        (METHOD 6)
    prefixes     does a prefix know what follows?                                    (METHOD 8.1)
    masks        hidden states under both masks                                      (METHOD 8.2)
    curves       STS by step of SimCSE                                               (METHOD 8.3)
"""

import argparse
import sys
from pathlib import Path

from bivec.engine.errors import BivecError, RunError
from bivec.engine.evaluation.parts import Part
from bivec.engine.evaluation.study import PARTS, Study
from bivec.engine.evaluation.study_report import write_report

HERE = Path(__file__).resolve().parent


def study_of(arguments: argparse.Namespace) -> Study:
    """The study that the command line asks for.

    Raises:
        RunError: ``--only`` names no part, or the run has not trained both stages.
    """
    asked = frozenset(name.strip() for name in arguments.only.split(","))
    if not asked <= set(PARTS):
        raise RunError(f"--only {min(asked - set(PARTS))!r}: choose of {', '.join(PARTS)}")
    smoke = {"pairs": 12, "sentences": 20, "seeds": (42,), "tasks_scale": 20, "texts": 1, "smoke": True}
    given = {"pairs": arguments.pairs, "sentences": arguments.sentences}
    return Study(
        run=arguments.run,
        recipe=HERE / "llm2vec_smollm2.py",
        data=HERE / "data",
        output=arguments.output_dir or Path("runs/reproduce-smoke" if arguments.smoke else "runs/reproduce"),
        asked=asked,
        **(smoke if arguments.smoke else given),
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/llm2vec-smollm2-135m"), help="of all three steps (default: %(default)s)")
    add("--output-dir", type=Path, help="default: runs/reproduce, with --smoke runs/reproduce-smoke")
    add(
        "--only",
        default=",".join(PARTS),
        help="parts to make; others are taken if they are there (default: all)",
    )
    add("--pairs", type=int, help="STS-B pairs (default: all 1,379)")
    add("--sentences", type=int, default=1500, help="of every word corpus, the first ones (default: %(default)s)")
    add("--smoke", action="store_true", help="very little of everything")
    arguments = parser.parse_args()
    try:
        study = study_of(arguments)
        parts: dict[str, Part] = {}
        for name in PARTS:
            part = getattr(study, name)()
            if part is not None:
                parts[name] = part
                kept = " (kept from before)" if part.reused else ""
                print(f"{name}: {part.seconds / 60:.1f} minutes{kept}", flush=True)
        report = write_report(study.output, study.run.name, parts, study.notes())
    except (BivecError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"\n{report.read_text(encoding='utf-8')}\nThe report is {report}")


if __name__ == "__main__":
    main()
