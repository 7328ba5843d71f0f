"""One of two processes of tests/engine/test_rare_ranks.py, each in a folder of its own.

    python rare_ranks_worker.py corpora MODEL_DIR     other texts than the other process, then a disk that is not shared
    python rare_ranks_worker.py error                 rank 0 has an error of its own, rank 1 is alive

What calls raised goes to stdout, JSON a line.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from bivec.engine import corpus
from bivec.engine.corpus import encode_corpus
from bivec.engine.distributed import World, launched, process_group
from bivec.engine.encoder import Encoder
from bivec.engine.errors import RunError


def tell(error: Exception) -> None:
    print(json.dumps([type(error).__name__, str(error)]), flush=True)


def corpora(world: World, directory: str) -> None:
    corpus.PATIENCE_SECONDS = 0.5
    encoder = Encoder.from_pretrained(directory)
    with process_group(world, "cpu", timeout_seconds=200):
        try:
            encode_corpus(encoder, ["a", f"of {world.rank}"], "e.npy", world=world)
        except RunError as error:
            tell(error)
        encode_corpus(encoder, ["a", "b"], "e.npy", world=world)  # a name in the own folder


def error(world: World) -> None:
    with process_group(world, "cpu", timeout_seconds=200):
        world.barrier()
        if world.rank == 0:
            raise RuntimeError("of rank 0 alone")
        deadline = time.monotonic() + 200
        while not Path("../0/told").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        sys.exit(1)


def main() -> None:
    torch.set_num_threads(1)
    what, *rest = sys.argv[1:]
    try:
        {"corpora": corpora, "error": error}[what](launched(), *rest)
    except (RunError, RuntimeError) as caught:
        tell(caught)
        Path("told").touch()
        sys.exit(1)


if __name__ == "__main__":
    main()
