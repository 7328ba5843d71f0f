"""How fast is Encoder.encode, and against whom? STS-B sentences in their given order, ours and sentence-transformers.

    python benchmarks/encode.py                        # SmolLM2-135M, 512 sentences; 10 minutes on two idle cores
    python benchmarks/encode.py --model DIR --sentences 200
    python benchmarks/encode.py --shape llama-1.3b     # random weights: no checkpoint, no network

Both encode the same saved checkpoint, bidirectional, with the same tokenizer, plain mean pooling and the same
``max_length``: sentence-transformers as its modules Transformer and Pooling, without the chat template that its release
6 would put around every text. They take turns, on these workloads:

* batches of 32 and of 128 (``--batch-sizes``): the sentences in their given order, a call for each batch, as a service
  or a stream gets them. sentence-transformers pads every batch to its longest sentence; ours pads nothing. (32 is its
  default; a longer call it would sort by length and cut into batches of 32.)
* one call: all sentences at once, which both sort by length; sentence-transformers in its default batches.

Writes encode_DEVICE.json and .png into benchmarks/results, or ``--output DIR``:

* s: seconds of all sentences, from text to numpy: median, least and most; ours is faster by the ratio of the medians.
* tokens/s: of true tokens, for both.
* memory: the most allocated above the model.
* largest difference: |ours - theirs| / |theirs| of the worst embedding; above 1e-3 in fp32, or 0.1 in a half-precision
  dtype, the exit status is 1. (SmolLM2-135M: the worst of ours is 8e-5 off float64, of theirs 3e-5.)

A random model gets a byte-level BPE of the sentences. Where sentence-transformers is missing, or with ``--no-peer``,
ours is measured alone, and the file says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from cpu_meter import CpuMeter
from timing import GpuMeter, Timing, describe_run, device_name, interleaved
from workload import DATA, SHAPES, load_checkpoint

from bivec.engine.data import load_sts
from bivec.engine.encoder import Encoder
from bivec.engine.encoder_config import EncoderConfig
from bivec.engine.errors import BivecError, first_line
from bivec.engine.packaged import PACKAGED_MODEL
from bivec.engine.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RESULTS = Path(__file__).resolve().parent / "results"
OURS, PEER = "bivec", "sentence-transformers"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUICK = {"sentences": 40, "batch_sizes": [16], "repeats": 3}
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}

Encode = Callable[..., np.ndarray]  # of a list of sentences; takes batch_size


@dataclass(frozen=True)
class SideResult:
    """One side."""

    timing: Timing
    sentences_per_s: float
    tokens_per_s: float
    peak_bytes: int | None  # above the model


def sts_sentences(count: int) -> list[str]:
    """The first sentences of the STS-B dev and test sets, in their given order."""
    pairs = chain(*(load_sts(DATA / f"stsb_{split}.csv.gz") for split in ("dev", "test")))
    found = list(chain.from_iterable((pair.sentence1, pair.sentence2) for pair in pairs))
    if count > len(found):
        raise BivecError(f"--sentences {count}: the sample that ships has {len(found)}")
    return found[:count]


def trained_tokenizer(sentences: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these sentences with a BOS in front, for models that have no tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sentences, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def our_encoder(options: argparse.Namespace, device: torch.device, sentences: Sequence[str]) -> Encoder:
    """The checkpoint as an encoder: bidirectional, plain mean."""
    checkpoint = load_checkpoint(options.model, options.shape, DTYPES[options.dtype], device)
    if options.shape is None:
        tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    else:
        tokenizer = trained_tokenizer(sentences, checkpoint.config.vocab_size)
    tokenizer.chat_template = None
    return Encoder(checkpoint.model, tokenizer, EncoderConfig(max_length=options.max_length))


def missing() -> str | None:
    """Why there is no peer; None where there is one."""
    return None if importlib.util.find_spec("sentence_transformers") else "sentence-transformers is not installed"


def peer_encode(encoder: Encoder, device: torch.device) -> Encode:
    """sentence-transformers on what our encoder saves."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=encoder.config.max_length)
        model = SentenceTransformer(modules=[transformer, Pooling(encoder.dimension, "mean")], device=str(device))
        model.to(encoder.model.embed_tokens.weight.dtype)
    return partial(model.encode, show_progress_bar=False)


def in_batches(encode: Encode, batch_size: int) -> Encode:
    """The same in calls of one batch each."""

    def encode_in_batches(sentences: list[str]) -> np.ndarray:
        starts = range(0, len(sentences), batch_size)
        return np.concatenate([encode(sentences[x : x + batch_size], batch_size=batch_size) for x in starts])

    return encode_in_batches


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected| of the worst row; infinite for NaN."""
    differences = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return float(np.nan_to_num(differences, nan=np.inf).max())


def measure(
    encoders: dict[str, Encode], sentences: list[str], tokens: int, repeats: int, device: torch.device
) -> dict[str, SideResult]:
    """All sides in turns; what they return is on the CPU, so the clock sees a GPU's work too."""
    runs = {name: partial(encode, sentences) for name, encode in encoders.items()}
    timings = interleaved(CpuMeter(), runs, budget_ms=1e12, max_repeats=repeats)
    meter = GpuMeter(device) if device.type == "cuda" else CpuMeter()
    return {
        name: SideResult(
            timing=timing,
            sentences_per_s=1e3 * len(sentences) / timing.ms,
            tokens_per_s=1e3 * tokens / timing.ms,
            peak_bytes=meter.peak_bytes(runs[name]),
        )
        for name, timing in timings.items()
    }


def table(sides: dict[str, SideResult]) -> str:
    """A line for each side."""
    lines = [f"  {'':<22} {'s':>8} {'min':>8} {'max':>8} {'sentences/s':>12} {'tokens/s':>9} {'memory MiB':>11}"]
    for name, side in sides.items():
        seconds = "".join(f" {ms / 1e3:8.3f}" for ms in (side.timing.ms, side.timing.ms_min, side.timing.ms_max))
        lines.append(
            f"  {name:<22}{seconds} {side.sentences_per_s:12.1f} {side.tokens_per_s:9.0f} "
            f"{side.peak_bytes / 2**20:11.1f}"
        )
    return "\n".join(lines)


def draw(path: Path, workloads: dict[str, dict[str, SideResult]], title: str) -> None:
    """Sentences a second of every workload."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.4), layout="constrained")
    figure.suptitle(title)
    for axis, (name, sides) in zip(figure.subplots(1, len(workloads)), workloads.items(), strict=True):
        values = [side.sentences_per_s for side in sides.values()]
        axis.bar_label(axis.barh(list(sides), values, color=["C0", "C1"]), fmt="%.0f", padding=4)
        axis.margins(x=0.2)
        axis.set(xlabel="sentences/s", title=name)
    figure.savefig(path, dpi=120)


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Both sides; the exit status."""
    sentences = sts_sentences(options.sentences)
    encoder = our_encoder(options, device, sentences)
    lengths = [
        len(ids) for ids in encoder.tokenizer(sentences, truncation=True, max_length=options.max_length).input_ids
    ]
    encoders: dict[str, Encode] = {OURS: partial(encoder.encode, show_progress_bar=False)}
    absent = "--no-peer" if options.no_peer else missing()
    name = device_name(device)
    content: dict[str, Any] = {
        **describe_run(device),
        "threads": torch.get_num_threads(),
        "model": options.shape or options.model,
        "dtype": options.dtype,
        "max_length": options.max_length,
        "sentences": len(sentences),
        "tokens": sum(lengths),
        "batch_sizes": options.batch_sizes,
        "peer": {"absent": absent},
        "workloads": {},
    }
    print(
        f"{content['model']} in {options.dtype} on {name}, {content['threads']} threads: {len(sentences)} sentences of "
        f"{sum(lengths) / len(lengths):.1f} tokens, {content['versions']}"
    )
    if absent is None:
        encoders[PEER] = peer_encode(encoder, device)
        content["peer"]["version"] = importlib.metadata.version("sentence-transformers")
    else:
        print(f"without {PEER}: {absent}")
    ways = {f"batches of {size}": partial(in_batches, batch_size=size) for size in options.batch_sizes}
    workloads, differences = {}, []
    for workload, way in (ways | {"one call": lambda encode: encode}).items():
        calls = {side: way(encode) for side, encode in encoders.items()}
        if PEER in calls:
            differences.append(largest_difference(calls[OURS](sentences), calls[PEER](sentences)))
        sides = workloads[workload] = measure(calls, sentences, sum(lengths), options.repeats, device)
        faster = sides[PEER].timing.ms / sides[OURS].timing.ms if PEER in sides else None
        content["workloads"][workload] = {
            "ours_is_faster_by": faster,
            "sides": {side: asdict(result) for side, result in sides.items()},
        }
        print(f"\n{workload}" + (f": ours is faster by {faster:.2f} x" if faster else ""))
        print(table(sides), flush=True)
    difference = content["largest_difference"] = max(differences, default=None)
    if difference is not None:
        print(f"\nlargest difference of the embeddings: {difference:.1e}")
    path = options.output / f"encode_{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    else:
        draw(path.with_suffix(".png"), workloads, f"{content['model']}, {len(sentences)} STS-B sentences, {name}")
    print(f"\nwrote {path}")
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
    parser.add_argument("--sentences", type=int, help="default: 512")
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="N", help="default: 32 128")
    parser.add_argument("--max-length", type=int, default=512, help="in tokens, of both sides")
    parser.add_argument("--repeats", type=int, help="at least 3 (default: 5)")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--quick", action="store_true", help="few sentences and repeats")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the files are written")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device}: not usable here ({first_line(error)})")
    options.dtype = options.dtype or ("float32" if torch.device(options.device).type == "cpu" else "bfloat16")
    for name, value in (QUICK if options.quick else {"sentences": 512, "batch_sizes": [32, 128], "repeats": 5}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name, bound in {"sentences": 1, "batch_sizes": 1, "repeats": 3, "max_length": 2}.items():
        if np.min(getattr(options, name)) < bound:
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
