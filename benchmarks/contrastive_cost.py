"""What does a contrastive step cost as its batch grows? Gradient caching from 64 to 4,096 triples.

    python benchmarks/contrastive_cost.py        # two layers of SmolLM2's widths; 15 minutes on one idle core
    python benchmarks/contrastive_cost.py --model DIR --batches 64 128 256
    python benchmarks/contrastive_cost.py --shape tiny --micro-batch-tokens 256 --batches 16 32 64

One step of the engine's own trainer and ``SupervisedObjective`` (query, positive, one hard negative; LoRA with dropout;
clipping, AdamW), in micro-batches of a fixed number of tokens, and the same step in one forward where that fits
(``--one-shot-bytes``). The texts are random tokens in the lengths of STS-B's sentences; every batch has the same
distribution of lengths, so a step's work is that of its tokens but for the loss, which compares all queries with all
documents. All sizes take turns, small ones several times a turn. Writes contrastive_cost_DEVICE.json and .png into
benchmarks/results, or ``--output DIR``.

* s: seconds of a step: median, least and most. The line is s = fixed + slope x tokens, fitted to the relative errors
  of the least times (what else a machine does only adds to them), and "off line" is how far a size is from it. With
  caching the fixed part is negative: one micro-batch is embedded once, all others twice.
* loss: of the step's time, what ``info_nce`` takes by itself, forward and gradient; it grows as the square.
* peak: the most memory above the model, by the allocator's record. emb.: the embeddings of all texts of the step and
  their gradients, [3 B, D] each. rest: the difference, which gradient caching keeps nearly the same. in loss: what the
  loss by itself takes above the embeddings: the logits of some queries, and gradients of the embeddings, for a moment
  more than once. It is taken while one micro-batch's activations are kept, and shows where it is more than the
  temporaries of a backward: with few layers, small micro-batches and thousands of triples.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from attention import QUERIES, drawn
from cpu_meter import CpuMeter
from timing import GpuMeter, Meter, describe_run, device_name
from workload import MASK_TOKEN, SHAPES, load_checkpoint

from bivec.engine.distributed import ALONE, World
from bivec.engine.errors import BivecError
from bivec.engine.grad_cache import StepRows, micro_batches
from bivec.engine.lora import Adapter, LoraConfig, add_lora
from bivec.engine.optim import OptimConfig
from bivec.engine.supervised import DocumentIds, SupervisedObjective
from bivec.engine.trainer import Intervals, train
from bivec.engine.triples import Triple
from bivec.models import Checkpoint, DecoderConfig

RESULTS = Path(__file__).resolve().parent / "results"
SMALL = "smollm2-2-layers"
SHAPES[SMALL] = DecoderConfig(  # widths and heads of SmolLM2-135M
    model_type="llama",
    vocab_size=8192,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=2,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    max_position_embeddings=2048,
)
BATCHES = (64, 128, 256, 512, 1024, 2048, 4096)
CACHED, ONE_SHOT, LOSS = "cached", "one forward", "loss"
Case = tuple[str, int]  # one of these, triples a step


@dataclass(frozen=True)
class RandomTriples:
    """Stands for ``TripleRows`` and its batches: every step is the same batch of random tokens."""

    triples_of_a_step: tuple[Triple, ...]
    step_rows: StepRows

    @classmethod
    def draw(cls, count: int, vocab_size: int, longest: int) -> RandomTriples:
        """``count`` triples; each of their three texts has the lengths of STS-B's sentences."""
        generator = np.random.default_rng(count)
        lengths = np.concatenate([generator.permutation(drawn(QUERIES, count, longest)) for _ in range(3)])
        ids = [generator.integers(MASK_TOKEN + 1, vocab_size, length).tolist() for length in lengths]
        spans = np.stack([np.zeros_like(lengths), lengths], axis=1)
        texts = [Triple(f"q{i}", f"p{i}", (f"n{i}",)) for i in range(count)]
        return cls(tuple(texts), StepRows(ids, spans, np.arange(3 * count)))

    @property
    def batches(self) -> RandomTriples:
        """Itself: it is both what draws triples and what makes rows of them."""
        return self

    def triples(self, step: int) -> list[Triple]:
        """The same ones in every step."""
        return list(self.triples_of_a_step)

    def of(self, step: int, triples: Sequence[Triple] | None = None, world: World = ALONE) -> StepRows:
        """Their token ids, made once."""
        return self.step_rows


@dataclass(frozen=True)
class Line:
    """Seconds = fixed + slope x tokens."""

    fixed: float
    slope: float
    off: tuple[float, ...]  # relative distance of every point: 0.1 = 10 % above


def fitted_line(tokens: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line that makes the sum of the squared relative errors least; two points at least."""
    x, y = np.asarray(tokens, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if len(x) < 2:
        raise ValueError(f"a line needs two points, got {len(x)}")
    scaled = np.stack([1 / y, x / y], axis=1)  # relative: both sides divided by y
    (fixed, slope), *_ = np.linalg.lstsq(scaled, np.ones_like(y), rcond=None)
    return Line(float(fixed), float(slope), tuple((y / (fixed + slope * x) - 1).tolist()))


def growth(values: Sequence[float]) -> float:
    """By how much the largest exceeds the smallest: 0.1 = 10 %."""
    return max(values) / min(values) - 1


def take_turns(meter: Meter, runs: Mapping[Case, Callable[[], object]], turns: int) -> dict[Case, dict[str, Any]]:
    """Times all calls in turns, those of small batches up to eight times a turn; ms by case."""
    largest = max(count for _, count in runs)
    taken: dict[Case, list[float]] = {case: [] for case in runs}
    for _ in range(turns):
        for case, run in runs.items():
            taken[case] += [meter.time(run).ms for _ in range(min(8, max(1, largest // (4 * case[1]))))]
    return {
        case: {"ms": median(times), "ms_min": min(times), "ms_max": max(times), "repeats": len(times)}
        for case, times in taken.items()
    }


def step_of(model: torch.nn.Module, adapter: Adapter, rows: RandomTriples, tokens: int | None, device: torch.device):
    """A call that makes one step of the trainer."""
    objective = SupervisedObjective(model, adapter, rows, seed=1, device=device, micro_batch_tokens=tokens)
    optim = OptimConfig(1e-4, steps=1)
    intervals = Intervals(log=1, save=0)
    return partial(
        train, "supervised", objective, adapter.named_parameters(), optim, intervals=intervals, progress=False
    )


def loss_of(objective: SupervisedObjective, count: int, width: int, device: torch.device) -> Callable[[], object]:
    """A call that takes the loss of random embeddings and its gradient."""
    ids = DocumentIds.of(objective.rows.triples(0), device)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(3 * count, width, generator=generator).to(device).requires_grad_()
    return lambda: torch.autograd.grad(objective.loss_of(embeddings, [1] * count, ids), embeddings)


def loss_flops(count: int, width: int) -> float:
    """Scores of ``count`` queries with twice as many documents, and two products of the gradient."""
    return 3 * 2.0 * count * (2 * count) * width


def measure(
    checkpoint: Checkpoint, options: argparse.Namespace, device: torch.device, meter: Meter
) -> list[dict[str, Any]]:
    """A row for every size."""
    model, config = checkpoint.model, checkpoint.config
    width = config.hidden_size
    adapter = add_lora(model, LoraConfig(dropout=options.lora_dropout), options.seed)
    runs: dict[Case, Callable[[], object]] = {}
    peaks: dict[Case, int] = {}
    tokens_of: dict[int, int] = {}
    cut: dict[int, int] = {}
    per_token = 0.0  # bytes of a step in one forward, of the last size that was tried
    for count in options.batches:
        rows = RandomTriples.draw(count, config.vocab_size, options.longest)
        tokens_of[count] = int(rows.step_rows.lengths.sum())
        cut[count] = len(micro_batches(rows.step_rows.lengths, options.micro_batch_tokens))
        objective = SupervisedObjective(model, adapter, rows, seed=1, device=device)
        tried = {CACHED: step_of(model, adapter, rows, options.micro_batch_tokens, device)}
        tried[LOSS] = loss_of(objective, count, width, device)
        if per_token * tokens_of[count] <= options.one_shot_bytes:
            tried[ONE_SHOT] = step_of(model, adapter, rows, None, device)
        for name, run in tried.items():
            runs[name, count], peaks[name, count] = run, meter.peak_bytes(run)
        if ONE_SHOT in tried:
            per_token = peaks[ONE_SHOT, count] / tokens_of[count]
        print(f"  {count}: {tokens_of[count]:,} tokens, peak {peaks[CACHED, count] / 2**20:.0f} MiB", flush=True)
    timings = take_turns(meter, runs, options.turns)
    embeddings = {count: 2 * 3 * count * width * model.embed_tokens.weight.element_size() for count in options.batches}
    rows = []
    for count in options.batches:
        cases = [(name, count) for name in (CACHED, ONE_SHOT, LOSS) if (name, count) in runs]
        sides = {case[0]: {**timings[case], "peak_bytes": peaks[case]} for case in cases}
        rows.append(
            {
                "batch": count,
                "tokens": tokens_of[count],
                "micro_batches": cut[count],
                "embedding_bytes": embeddings[count],
                "rest_bytes": peaks[CACHED, count] - embeddings[count],
                "loss_flops": loss_flops(count, width),
                "loss_share": timings[LOSS, count]["ms_min"] / timings[CACHED, count]["ms_min"],
                "sides": sides,
            }
        )
    return rows


def verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether time is linear and the rest of the memory flat."""
    line = fitted_line([row["tokens"] for row in rows], [row["sides"][CACHED]["ms_min"] / 1e3 for row in rows])
    return {
        "line": asdict(line),
        "time_off_the_line": max(map(abs, line.off)),
        "time_per_token_growth": growth([row["sides"][CACHED]["ms_min"] / row["tokens"] for row in rows]),
        "rest_growth": growth([row["rest_bytes"] for row in rows]),
    }


def report(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> str:
    """As it is printed."""
    header = (
        f"{'batch':>6} {'tokens':>8} {'parts':>6} {'s':>8} {'min':>8} {'max':>8} {'us/token':>9} {'off line':>9} "
        f"{'loss':>7} {'peak':>7} {'emb.':>6} {'rest':>7} {'in loss':>7} | one forward: {'s':>7} {'MiB':>6}"
    )
    lines = [header]
    for row, off in zip(rows, found["line"]["off"], strict=True):
        cached, whole = row["sides"][CACHED], row["sides"].get(ONE_SHOT)
        loss = row["sides"][LOSS]["peak_bytes"]
        sizes = (cached["peak_bytes"], row["embedding_bytes"], row["rest_bytes"], loss)
        memory = " ".join(f"{size / 2**20:{width}.1f}" for size, width in zip(sizes, (7, 6, 7, 7), strict=True))
        seconds = " ".join(f"{cached[key] / 1e3:8.2f}" for key in ("ms", "ms_min", "ms_max"))
        us = 1e3 * cached["ms_min"] / row["tokens"]
        lines.append(
            f"{row['batch']:6} {row['tokens']:8,} {row['micro_batches']:6} {seconds} {us:9.1f} "
            f"{100 * off:+8.1f}% {100 * row['loss_share']:6.2f}% {memory} | "
            + ("" if whole is None else f"{'':>13}{whole['ms'] / 1e3:7.2f} {whole['peak_bytes'] / 2**20:6.0f}")
        )
    lines.append(
        f"time: within {100 * found['time_off_the_line']:.1f} % of a line ({found['line']['fixed']:+.2f} s + "
        f"{1e6 * found['line']['slope']:.1f} us a token); memory beyond the embeddings: the most is "
        f"{100 * found['rest_growth']:.1f} % above the least"
    )
    return "\n".join(lines)


def draw(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Time and memory against the batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    figure.suptitle(title)
    time, memory = figure.subplots(1, 2)
    for name, style in ((CACHED, "o-"), (ONE_SHOT, "s--"), (LOSS, "^:")):
        some = [row for row in rows if name in row["sides"]]
        batches = [row["batch"] for row in some]
        time.loglog(batches, [row["sides"][name]["ms_min"] / 1e3 for row in some], style, label=name)
        if name != LOSS:
            memory.loglog(batches, [row["sides"][name]["peak_bytes"] / 2**20 for row in some], style, label=name)
    batches = [row["batch"] for row in rows]
    memory.loglog(batches, [row["rest_bytes"] / 2**20 for row in rows], "C0.:", label="cached, embeddings aside")
    memory.loglog(batches, [row["embedding_bytes"] / 2**20 for row in rows], "k:", label="embeddings and gradients")
    time.set(xlabel="triples a step", ylabel="s", title="time of a step, least")
    memory.set(xlabel="triples a step", ylabel="MiB", title="peak memory above the model")
    for axes in (time, memory):
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="a directory, a .gguf file or a hub id")
    source.add_argument("--shape", choices=SHAPES, default=SMALL, help="a random model (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="triples a step")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--longest", type=int, default=64, help="tokens of the longest text")
    parser.add_argument("--lora-dropout", type=float, default=0.05)
    parser.add_argument("--one-shot-bytes", type=int, default=3 * 2**30, help="no single forward that needs more")
    parser.add_argument("--turns", type=int, default=2, help="of all sizes, after one that records the memory")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the files are written")
    options = parser.parse_args(arguments)
    if options.model:
        options.shape = None
    options.batches = sorted(set(options.batches))
    if min(options.turns, options.micro_batch_tokens) < 1 or options.longest < 2:
        parser.error("--turns and --micro-batch-tokens: 1 at least; --longest: 2 at least")
    if len(options.batches) < 2 or options.batches[0] < 1:
        parser.error("--batches: give two sizes at least, each of 1 or more")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parse(arguments)
    device = torch.device(options.device)
    meter = GpuMeter(device) if device.type == "cuda" else CpuMeter()
    try:
        checkpoint = load_checkpoint(options.model, options.shape, torch.float32, device)
    except BivecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = device_name(device)
    content = {
        **describe_run(device),
        "threads": torch.get_num_threads(),
        "model": options.shape or options.model,
        "micro_batch_tokens": options.micro_batch_tokens,
        "lora_dropout": options.lora_dropout,
        "seed": options.seed,
    }
    print(
        f"{content['model']} in float32 on {name}, {content['threads']} threads, micro-batches of "
        f"{options.micro_batch_tokens:,} tokens"
    )
    content["rows"] = measure(checkpoint, options, device, meter)
    content["verdict"] = verdict(content["rows"])
    print(report(content["rows"], content["verdict"]))
    path = options.output / f"contrastive_cost_{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    title = f"{content['model']}, fp32, {name}, micro-batches of {options.micro_batch_tokens:,} tokens"
    draw(path.with_suffix(".png"), content["rows"], title)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
