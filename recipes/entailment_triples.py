"""Makes triples for supervised training from entailment data: SICK, SNLI, MultiNLI, AllNLI, SimCSE's CSV.

    python recipes/entailment_triples.py SICK_train.txt SICK_test_annotated.txt --output triples.jsonl
    python recipes/entailment_triples.py snli_1.0_train.jsonl multinli_1.0_train.jsonl --output nli.jsonl --pairs

What a sentence entails is its positive, what contradicts it its hard negative; bivec/engine/entailment.py says exactly
how. The output is the general format of bivec/engine/triples.py: one JSON object a line.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bivec.engine.entailment import entailment_triples
from bivec.engine.errors import BivecError, DataError
from bivec.engine.triples import Triple
from bivec.models.files import write_text_atomic


def convert(files: Sequence[Path], output: Path, with_pairs: bool) -> str:
    """Writes the triples of the files, and says how many there are."""
    if not output.parent.is_dir():
        raise DataError(f"--output {output}: the folder {output.parent} does not exist")
    if output.resolve() in {file.resolve() for file in files}:
        raise DataError(f"--output {output}: would overwrite what is read; give another name")
    triples, pairs = entailment_triples(files)
    if not triples and not with_pairs:
        raise DataError(f"no sentence both entails and contradicts another; --pairs writes the {len(pairs)} pairs")
    written = [*triples, *pairs] if with_pairs else triples
    write_text_atomic(output, "".join(json.dumps(row(triple), ensure_ascii=False) + "\n" for triple in written))
    anchors = len({triple.query for triple in triples})
    left = "written too" if with_pairs else "left out (--pairs writes them)"
    return f"{output}: {anchors} anchors with {len(triples)} triples; {len(pairs)} pairs without a negative, {left}"


def row(triple: Triple) -> dict[str, str | list[str]]:
    """The JSON object of a triple."""
    return {"query": triple.query, "positive": triple.positive, "negatives": list(triple.negatives)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="entailment data: .txt, .tsv, .csv or .jsonl, also .gz")
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--pairs", action="store_true", help="also write entailments of sentences without a negative")
    arguments = parser.parse_args()
    try:
        print(convert(arguments.files, arguments.output, arguments.pairs))
    except (BivecError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
