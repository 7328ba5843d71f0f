"""How good is an encoder on STS-B? Spearman x 100 on the dev and test sets that ship, whole or their first pairs.

    python benchmarks/sts.py runs/llm2vec-smollm2-135m             # 1,500 and 1,379 pairs
    python benchmarks/sts.py runs/a runs/b --pairs 500 --json out.json

Takes whatever ``Encoder.from_pretrained`` takes: a run, a Hugging Face directory, a .gguf file or a hub id.
"""

import argparse
import json
from pathlib import Path

from bivec import Encoder
from bivec.engine.data import load_sts
from bivec.engine.evaluation import sts_spearman

DATA = Path(__file__).resolve().parent.parent / "recipes" / "data"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="encoders")
    parser.add_argument("--pairs", type=int, help="first pairs of each set (default: all)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    figures = []
    print("| model | STS-B dev | STS-B test |\n|---|---|---|")
    for model in arguments.models:
        encoder = Encoder.from_pretrained(model)
        scores = {
            split: sts_spearman(encoder.encode, load_sts(DATA / f"stsb_{split}.csv.gz")[: arguments.pairs])
            for split in ("dev", "test")
        }
        figures.append({"model": model, "pairs": arguments.pairs, **scores})
        print(f"| {model} | {scores['dev']:.1f} | {scores['test']:.1f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
