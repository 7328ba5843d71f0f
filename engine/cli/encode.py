"""Embeds a file of texts into one .npy or .parquet file; stopped or killed, the command goes on when repeated.

Row i is text i. Tables (.jsonl, .csv, .parquet) are read slice by slice and never held in memory as a whole; lines of
a .txt file or of standard input are. Beside the output lies OUTPUT.json: the checksums and settings by which a later
command knows it. bivec/engine/corpus.py says more.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bivec.engine.cli.models import MODEL_HELP, add_model_flags, open_model
from bivec.engine.cli.output import command_parser, results_only, say, write_document

if TYPE_CHECKING:
    from bivec.engine.distributed import World
    from bivec.engine.encoder import Encoder

STDIN = "-"
EPILOG = """examples:
  bivec encode runs/llm2vec-smollm2-135m corpus.jsonl -o corpus.npy
  bivec encode RUN corpus.csv.gz --column passage --id-column docid -o corpus.parquet
  bivec encode RUN queries.txt --instruction "Retrieve text that answers the question:" --normalize -o queries.npy
  cut -f2 pairs.tsv | bivec encode RUN - -o second.npy --json
  torchrun --nproc_per_node=8 -m bivec.engine.cli encode RUN corpus.jsonl -o corpus.npy   # one process a GPU"""


@dataclass(frozen=True)
class Encoded:
    """What came of it."""

    output: str
    texts: int
    dimension: int
    dtype: str  # of the file
    normalized: bool
    seconds: float  # of encoding


def main(arguments: Sequence[str]) -> int:
    """Embeds a file of texts; returns the exit code."""
    given = _parser().parse_args(arguments)

    from bivec.engine.distributed import launched

    world = launched()
    with results_only() as stdout:
        try:
            done = encode(given, world)
        except KeyboardInterrupt:
            say("the same command without --overwrite goes on")
            raise
        if world.is_main and given.json:
            write_document(stdout, asdict(done))
        elif world.is_main:
            print(summary(done), file=stdout)
    return 0


def summary(done: Encoded) -> str:
    """One line of what was written."""
    return f"{done.output}: {done.texts} embeddings of {done.dimension}, {done.seconds:.1f} s"


def add_encode_flags(parser: argparse.ArgumentParser) -> None:
    """What may be said of a corpus and its vectors, beside model, input and output."""
    from_default = "(default: %(default)s)"
    add = parser.add_argument
    add("--column", help="the column with the texts (default: text, else the only one of strings)")
    add("--id-column", help="a column of names, for a .parquet output")
    add("--split", default="train", help=f"of a hub data set {from_default}")
    add("--limit", type=int, help="only so many texts")
    add("--instruction", help="put before every text, with its final colon; it is not pooled")
    add("--prompt", metavar="NAME", help="put before every text, to the letter, what the model keeps under this name")
    add("--max-text-length", type=int, help="tokens of a text alone (the paper's documents: 400)")
    unit = argparse.BooleanOptionalAction
    add("--normalize", action=unit, help="embeddings of unit length (default: as the model says)")
    add("--output-dtype", choices=("float32", "float16"), default="float32", help=f"of an .npy file {from_default}")
    add("--tokens-per-batch", type=int, help="memory grows with it, vectors do not change (default: 4096)")
    add("--slice-texts", type=int, help="texts lost by a kill, at most (default: 16384)")
    add("--timeout", type=float, default=3600.0, help="seconds to wait for the slowest process (default: %(default)g)")
    add("--overwrite", action="store_true", help="start anew, whatever there is of the output")
    add_model_flags(parser)


def encode(given: argparse.Namespace, world: World) -> Encoded:
    """Embeds ``given.input`` into ``given.output``, by one process of several.

    Raises:
        BivecError: bad flags, texts or files, a model or device that is not here, a full disk.
    """
    from bivec.engine.corpus import SLICE_TEXTS, encode_corpus
    from bivec.engine.distributed import only_main_prints, process_group
    from bivec.engine.errors import ConfigError
    from bivec.engine.run_files import chosen_device, device_type

    if given.limit is not None and given.limit < 1:
        raise ConfigError(f"--limit is {given.limit}, expected at least 1")
    if given.input == STDIN and world.size > 1:
        raise ConfigError(f"{world.size} processes cannot share standard input; give a file")
    with ExitStack() as stack:
        stack.enter_context(only_main_prints(world))
        stack.enter_context(process_group(world, device_type(given.device), given.timeout))
        texts, ids = read(given, world)
        encoder = open_model(given, chosen_device(given.device, given.backend, world))
        begin = time.monotonic()
        encode_corpus(
            encoder,
            texts,
            given.output,
            ids=ids,
            instruction=given.instruction,
            prompt=_prompt(given, encoder),
            tokens_per_batch=given.tokens_per_batch,
            max_text_length=given.max_text_length,
            normalize_embeddings=given.normalize,
            dtype=given.output_dtype,
            slice_texts=SLICE_TEXTS if given.slice_texts is None else given.slice_texts,
            overwrite=given.overwrite,
            world=world,
        )
    seconds = time.monotonic() - begin
    unit = encoder.config.normalize if given.normalize is None else given.normalize
    return Encoded(str(given.output), len(texts), encoder.dimension, given.output_dtype, unit, round(seconds, 2))


def read(given: argparse.Namespace, world: World) -> tuple[Sequence[str], Sequence[str] | None]:
    """Texts and their ids. On every machine one process reads first: what it converts the others find in the cache."""
    from bivec.engine.data import load_texts
    from bivec.engine.hub import prefer_offline

    if given.input == STDIN:
        return _lines(given), None
    prefer_offline([given.input])
    for first in (True, False):
        if first == (world.local_rank == 0):
            options = {"split": given.split, "limit": given.limit, "argument": "the input"}
            texts = load_texts(given.input, column=given.column, **options)
            named = given.id_column is not None
            ids = load_texts(given.input, column=given.id_column, **options) if named else None
        world.barrier()
    return texts, ids


def _lines(given: argparse.Namespace) -> list[str]:
    """Standard input, a text a line, empty ones included."""
    from bivec.engine.errors import ConfigError, DataError

    if given.column is not None or given.id_column is not None:
        raise ConfigError("standard input is plain text, a text a line: it has no --column and no --id-column")
    texts: list[str] = []
    try:
        for line in sys.stdin.buffer:
            texts.append(line.decode("utf-8").rstrip("\r\n"))  # noqa: PERF401 - counted for the error
    except UnicodeDecodeError as error:
        raise DataError(f"standard input, line {len(texts) + 1}: not UTF-8 (column {error.start + 1})") from error
    return texts[: given.limit]


def _prompt(given: argparse.Namespace, encoder: Encoder) -> str | None:
    """By the name under which the model keeps it; None = none."""
    from bivec.engine.errors import ConfigError

    if given.prompt is None:
        return None
    if given.instruction is not None:
        raise ConfigError("--instruction and --prompt say the same thing; give one")
    if given.prompt not in encoder.prompts:
        names = ", ".join(encoder.prompts) or "none"
        raise ConfigError(f"--prompt {given.prompt}: {given.model} keeps {names}; give --instruction TEXT")
    return encoder.prompts[given.prompt]


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("encode", __doc__, EPILOG)
    add = parser.add_argument
    add("model", help=MODEL_HELP)
    add(
        "input",
        help="texts: .txt (one a line), .jsonl, .csv, .tsv (also .gz), .parquet, a hub id; - = standard input",
    )
    add("-o", "--output", required=True, type=Path, help="the .npy or .parquet file to write")
    add_encode_flags(parser)
    add("--json", action="store_true", help="print a summary as JSON")
    return parser
