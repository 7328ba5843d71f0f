"""Embeds a corpus into one file, from a run or any other model; stopped or killed, the command goes on when repeated.

    python recipes/encode_corpus.py --model runs/llm2vec-smollm2-135m --input corpus.jsonl --output embeddings.npy
    python recipes/encode_corpus.py … --input corpus.csv --column passage --id-column docid --output corpus.parquet
    torchrun --nproc_per_node=8 recipes/encode_corpus.py …                  # one process a GPU, the same file

Row i of an .npy is text i: ``numpy.load("embeddings.npy", mmap_mode="r")`` reads it without taking memory. Texts that
are in a .jsonl, .csv or .parquet file are not all held in memory, those of a .txt file (one a line) are. Beside the
output lies OUTPUT.json: the checksums and settings by which a later command knows it. Until it is whole the output is
a hidden folder; bivec/engine/corpus.py says more.

``bivec encode`` is the same command, for where there is no clone. The instruction is put before every text (documents
have none in the paper's evaluation; METHOD 7.1 limits them to 400 tokens: ``--max-text-length 400``).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bivec.engine.cli.encode import add_encode_flags, encode, summary
from bivec.engine.distributed import ALONE, launched
from bivec.engine.errors import BivecError, first_line
from bivec.engine.trainer import is_out_of_memory
from bivec.kernels import BackendError


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a run directory, another model directory, a .gguf file or a hub id")
    add("--input", required=True, help=".txt (one text a line), .jsonl, .json, .csv, .tsv, .parquet or a hub id")
    add("--output", required=True, type=Path, help="the .npy or .parquet file to write")
    add_encode_flags(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    world = ALONE
    try:
        options = parse(arguments)
        world = launched()
        done = encode(options, world)
        if world.is_main:
            print(summary(done))
    except KeyboardInterrupt:
        print("stopped; the same command without --overwrite goes on", file=sys.stderr)
        sys.exit(130)
    except (BivecError, BackendError, OSError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not isinstance(error, BivecError):
            if not is_out_of_memory(error):
                raise
            text = f"{first_line(error)}\nto go on, repeat it with a smaller --tokens-per-batch (no --overwrite)"
        print(f"{'' if world.is_main else f'rank {world.rank}: '}error: {text}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
