"""What does encoding a corpus cost beside the model? WikiText paragraphs, ours and sentence-transformers, in turns.

    python benchmarks/corpus.py                        # SmolLM2-135M, 300 paragraphs; some minutes on two idle cores
    python benchmarks/corpus.py --model DIR --texts 100

Four ways from the texts to embeddings, of the same saved checkpoint, bidirectional, plain mean:

* encode_corpus: sorted by token length, packed, into an .npy that survives a kill (slices of ``--slice-texts``, each
  forced to the disk), the next slice tokenised by a thread meanwhile.
* without thread: the same, but a slice is tokenised when its turn has come: the difference is what the thread gives.
* given order: calls of 32 texts as they come, packed but not sorted over more than these.
* sentence-transformers: one call, which sorts by length and pads batches of 32.

Writes corpus_DEVICE.json into benchmarks/results, or ``--output DIR``: seconds of all texts (median, least, most),
texts/s, tokens/s, and the share of tokenising: its time alone, of the time without thread. The exit status is 1 where
embeddings of ours differ from the peer's by more than 1e-3 in fp32 (|ours - theirs| / |theirs|, the worst), or 0.1 in a
half-precision dtype.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from encode import (
    DTYPES,
    PEER,
    RESULTS,
    TOLERANCE,
    in_batches,
    largest_difference,
    measure,
    missing,
    our_encoder,
    peer_encode,
    table,
)
from timing import describe_run, device_name
from workload import DATA, SHAPES

from bivec.engine import encoder as encoder_module
from bivec.engine.corpus import encode_corpus
from bivec.engine.data import load_texts
from bivec.engine.encoder import Encoder
from bivec.engine.errors import BivecError
from bivec.engine.packaged import PACKAGED_MODEL

CORPUS, NO_THREAD, GIVEN = "encode_corpus", "without thread", "given order"


def to_file(texts: list[str], encoder: Encoder, slice_texts: int, **_: int) -> np.ndarray:
    """A corpus into a new file, and the file."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"slice_texts": slice_texts, "show_progress_bar": False}
        return np.load(encode_corpus(encoder, texts, Path(folder) / "e.npy", **settings))


def without_thread(texts: list[str], encoder: Encoder, slice_texts: int, **_: int) -> np.ndarray:
    """The same into a file, tokenised and encoded in turn."""
    with mock.patch.object(encoder_module, "one_ahead", iter):
        return to_file(texts, encoder, slice_texts)


def tokenising_seconds(encoder: Encoder, texts: list[str], repeats: int) -> float:
    """All texts, nothing else; the median."""
    pairs, seconds = [("", text) for text in texts], []
    for _ in range(repeats):
        begin = time.perf_counter()
        encoder._tokenise(pairs)
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def run(options: argparse.Namespace, device: torch.device) -> int:
    """All ways; the exit status."""
    texts = load_texts(DATA / "wikitext2_paragraphs.txt.gz", limit=options.texts)
    encoder = our_encoder(options, device, texts)
    tokens = sum(len(row.input_ids) for row in encoder._tokenise([("", text) for text in texts]))
    name, absent = device_name(device), missing()
    sides = {
        CORPUS: partial(to_file, encoder=encoder, slice_texts=options.slice_texts),
        NO_THREAD: partial(without_thread, encoder=encoder, slice_texts=options.slice_texts),
        GIVEN: in_batches(partial(encoder.encode, show_progress_bar=False), 32),
    }
    difference = None
    if absent is None:
        sides[PEER] = peer_encode(encoder, device)
        difference = largest_difference(sides[CORPUS](texts), sides[PEER](texts))
    results = measure(sides, texts, tokens, options.repeats, device)
    tokenising = tokenising_seconds(encoder, texts, options.repeats)
    content = {
        **describe_run(device),
        "threads": torch.get_num_threads(),
        "model": options.shape or options.model,
        "dtype": options.dtype,
        "max_length": options.max_length,
        "texts": len(texts),
        "tokens": tokens,
        "slice_texts": options.slice_texts,
        "peer": {"absent": absent, "version": None if absent else importlib.metadata.version(PEER)},
        "tokenising_seconds": tokenising,
        "tokenising_share": tokenising / (results[NO_THREAD].timing.ms / 1e3),
        "largest_difference": difference,
        "sides": {side: asdict(result) for side, result in results.items()},
    }
    print(f"{content['model']} in {options.dtype} on {name}, {content['threads']} threads: {len(texts)} texts")
    print(table(results))
    print(f"tokenising alone: {tokenising:.3f} s, {100 * content['tokenising_share']:.1f} % of the time without thread")
    path = options.output / f"corpus_{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    if difference is not None and not difference <= TOLERANCE[options.dtype]:
        print(f"FAILED  the embeddings differ by {difference:.1e}, allowed are {TOLERANCE[options.dtype]:g}")
        return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what depends on the device is filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", default=PACKAGED_MODEL, help="a directory, a .gguf file or a hub id")
    source.add_argument("--shape", choices=SHAPES, help="instead: a random model of this shape")
    parser.add_argument("--texts", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--slice-texts", type=int, default=64, help="default: %(default)s, so that there are some")
    parser.add_argument("--max-length", type=int, default=512, help="in tokens, of both sides")
    parser.add_argument("--repeats", type=int, default=3, help="at least 3")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the file is written")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or ("float32" if torch.device(options.device).type == "cpu" else "bfloat16")
    for name, bound in {"texts": 1, "slice_texts": 1, "repeats": 3, "max_length": 2}.items():
        if getattr(options, name) < bound:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least {bound}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parse(arguments)
    try:
        return run(options, torch.device(options.device))
    except BivecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
