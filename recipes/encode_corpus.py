"""Embeds a corpus into one file, from a run or any other model; stopped or killed, the same command goes on.

    python recipes/encode_corpus.py --model runs/llm2vec-smollm2-135m --input corpus.jsonl --output embeddings.npy
    python recipes/encode_corpus.py … --input corpus.csv --column passage --id-column docid --output corpus.parquet
    torchrun --nproc_per_node=8 recipes/encode_corpus.py …                  # one process a GPU, the same file

Row i of an .npy is text i: ``numpy.load("embeddings.npy", mmap_mode="r")`` reads it without taking memory. Texts that
are in a .jsonl, .csv or .parquet file are not all held in memory, those of a .txt file (one a line) are. Beside the
output lies OUTPUT.json: the checksums and settings by which a later command knows it. Until it is whole the output is
a hidden folder; bivec/engine/corpus.py says more.

The instruction is put before every text (documents have none in the paper's evaluation; METHOD 7.1 limits them to 400
tokens: ``--max-text-length 400``).
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

from bivec.engine.corpus import DTYPES, SLICE_TEXTS, encode_corpus
from bivec.engine.cuts import named_dtype
from bivec.engine.data import load_texts
from bivec.engine.distributed import ALONE, World, launched, process_group
from bivec.engine.encoder import Encoder
from bivec.engine.errors import BivecError, ConfigError
from bivec.engine.inputs import resolve_model
from bivec.engine.recipe import RunOptions
from bivec.engine.run_files import chosen_device, device_type
from bivec.engine.trainer import is_out_of_memory
from bivec.kernels import BackendError


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a run directory, another model directory, a .gguf file or a hub id")
    add("--input", required=True, help=".txt (one text a line), .jsonl, .json, .csv, .tsv, .parquet or a hub id")
    add("--output", required=True, type=Path, help="the .npy or .parquet file to write")
    add("--column", help="the column with the texts (default: text, else the only one of strings)")
    add("--id-column", help="a column of names, for a .parquet output")
    add("--split", default="train", help="of a hub data set (default: %(default)s)")
    add("--limit", type=int, help="only so many texts")
    add("--instruction", help="put before every text, with its final colon; it is not pooled")
    add("--max-text-length", type=int, help="tokens of a text alone (the paper's documents: 400)")
    add("--normalize", action="store_true", help="embeddings of unit length")
    add("--output-dtype", choices=DTYPES, default="float32", help="of an .npy file (default: %(default)s)")
    add("--tokens-per-batch", type=int, help="memory grows with it, vectors do not change (default: 4096)")
    add(
        "--slice-texts",
        type=int,
        default=SLICE_TEXTS,
        help="texts lost by a kill, at most (default: %(default)s)",
    )
    add("--device", help="default: cuda where there is one")
    add("--dtype", help="of the weights (default: float32 on a CPU, elsewhere the checkpoint's)")
    add("--backend", choices=("torch", "triton"), help="of the kernels (default: chosen by device)")
    add(
        "--timeout",
        type=float,
        default=3600.0,
        help="seconds to wait for the slowest process (default: %(default)g)",
    )
    add("--overwrite", action="store_true", help="start anew, whatever there is of the output")
    return parser.parse_args(arguments)


def read(arguments: argparse.Namespace, world: World) -> tuple[Sequence[str], Sequence[str] | None]:
    """Texts and their ids. On every machine one process reads first: what it converts the others find in the cache."""
    for first in (True, False):
        if first == (world.local_rank == 0):
            options = {"split": arguments.split, "limit": arguments.limit, "argument": "--input"}
            texts = load_texts(arguments.input, column=arguments.column, **options)
            named = arguments.id_column is not None
            ids = load_texts(arguments.input, column=arguments.id_column, **options) if named else None
        world.barrier()
    return texts, ids


def run(arguments: argparse.Namespace, world: World) -> None:
    options = RunOptions(
        arguments.output, device=arguments.device, backend=arguments.backend, timeout=arguments.timeout
    )
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit is {arguments.limit}, expected at least 1")
    with ExitStack() as stack:
        if not world.is_main:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        stack.enter_context(process_group(world, device_type(options), arguments.timeout))
        texts, ids = read(arguments, world)
        encoder = Encoder.from_pretrained(
            resolve_model(arguments.model),
            dtype=named_dtype(arguments.dtype) if arguments.dtype else None,
            device=chosen_device(options, world),
            backend=arguments.backend,
        )
        begin = time.monotonic()
        path = encode_corpus(
            encoder,
            texts,
            arguments.output,
            ids=ids,
            instruction=arguments.instruction,
            tokens_per_batch=arguments.tokens_per_batch,
            max_text_length=arguments.max_text_length,
            normalize_embeddings=arguments.normalize,
            dtype=arguments.output_dtype,
            slice_texts=arguments.slice_texts,
            overwrite=arguments.overwrite,
            world=world,
        )
        print(f"{path}: {len(texts)} embeddings of {encoder.dimension}, {time.monotonic() - begin:.1f} s")


def main(arguments: Sequence[str] | None = None) -> None:
    world = ALONE
    try:
        options = parse(arguments)
        world = launched()
        run(options, world)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except (BivecError, BackendError, OSError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not isinstance(error, BivecError):
            if not is_out_of_memory(error):
                raise
            text = f"{text.splitlines()[0]}\ngive the same command a smaller --tokens-per-batch, and it goes on"
        print(f"{'' if world.is_main else f'rank {world.rank}: '}error: {text}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
