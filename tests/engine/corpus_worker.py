"""One process of tests/engine/test_corpus.py: embeds texts, and may kill itself on the way.

    python corpus_worker.py MODEL_DIR TEXTS.json OUTPUT [WHEN PLACE COUNT]
    python corpus_worker.py serve      reads such arguments from stdin, a JSON list a line, and forks a child for each

In the n-th call of PLACE the process gets a SIGKILL: "before" it does anything, "half" through a write, or "after".
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import NoReturn

import torch

from bivec.engine import corpus_files
from bivec.engine.corpus import encode_corpus
from bivec.engine.distributed import launched, process_group
from bivec.engine.encoder import Encoder

SETTINGS = {"slice_texts": 8, "tokens_per_batch": 100, "instruction": "Find:"}


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(when: str, place: str, count: int) -> None:
    """Puts the kill around a function of the module, or of the modules that it uses."""
    owner = {"replace": os, "fsync": os, "rmtree": shutil}.get(place, corpus_files)
    Path.replace = lambda path, target: os.replace(path, target)  # noqa: PLW0108 - a builtin is not bound to an instance
    function, calls = getattr(owner, place), 0

    def fatal(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls < count:
            return function(*arguments, **options)
        if when == "half":  # of the bytes of a write
            file, position, data = arguments
            function(file, position, data[: len(data) // 2])
        elif when == "after":
            function(*arguments, **options)
        return die()

    setattr(owner, place, fatal)


def main(arguments: list[str]) -> None:
    directory, texts, output, *kill = arguments
    torch.set_num_threads(1)
    if kill:
        kill_at(kill[0], kill[1], int(kill[2]))
    world = launched()
    with process_group(world, "cpu", timeout_seconds=60):
        encoder = Encoder.from_pretrained(directory)
        encode_corpus(encoder, json.loads(Path(texts).read_text("utf-8")), output, world=world, **SETTINGS)


def serve() -> None:
    """Answers each line with the child's exit code. Imports for seconds once; no operator runs before the forks."""
    import pyarrow.parquet
    import transformers

    assert transformers.PreTrainedTokenizerFast and pyarrow.parquet  # the attribute imports its module
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                main(json.loads(line))
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main(sys.argv[1:])
