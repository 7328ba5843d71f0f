"""What a training step could cost on a named GPU: FLOPs, bytes and the bound of every op. Needs no GPU.

    python benchmarks/roofline.py                                      # Mistral-7B, MNTP 32 x 512, on an H100
    python benchmarks/roofline.py --gpu A100 --shape llama-1.3b --stage simcse
    python benchmarks/roofline.py --recompute layer --micro-batch-tokens 16384

An op takes the longer of two times: its FLOPs at the rate that the vendor's GEMMs reach, or its bytes (each tensor read
and written once, as our kernels do) at the bandwidth that a copy reaches; both rates are fractions of the data sheet's
(``--gemm-fraction``, ``--bandwidth-fraction``; with the defaults an H100 reaches 800 TFLOP/s and 3.0 TB/s). No launch,
no imbalance, no overlap of ops: a bound, not a forecast. Measured steps of the same card and model (of train_step.py or
gpu_suite.py, under ``results``) are printed beside it, where there are any, whatever their batch and masking.

The step is LoRA on a frozen base: a projection costs its product and the gradient of its input, no weight gradient.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from attention import BF16_PEAKS
from workload import SHAPES

from bivec.engine.estimate import SENTENCE_TOKENS, projection_shapes
from bivec.models import DecoderConfig
from bivec.models.recompute import LEVELS

RESULTS = Path(__file__).resolve().parent / "results"
BANDWIDTHS = {"A100": 2.04e12, "H100 PCIe": 2.0e12, "H100": 3.35e12, "H200": 4.8e12, "B200": 8.0e12, "MI300X": 5.3e12}
JOINT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # share an input
HALF, SINGLE = 2, 4  # bytes


@dataclass(frozen=True)
class Op:
    """One kind of work of a step, forward and backward together."""

    name: str
    flops: float
    bytes: float
    recomputed: bool = False  # the forward once more, in the backward

    def seconds(self, gpu: Gpu) -> float:
        """What the card needs at least."""
        return max(self.flops / gpu.flops_per_s, self.bytes / gpu.bytes_per_s)

    def bound(self, gpu: Gpu) -> str:
        """By what: "compute" or "memory"."""
        return "compute" if self.flops / gpu.flops_per_s > self.bytes / gpu.bytes_per_s else "memory"


@dataclass(frozen=True)
class Gpu:
    """What a card reaches."""

    name: str
    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Step:
    """A step: its tokens, and how they are cut."""

    stage: str  # "mntp" | "simcse"
    tokens: int
    length: int  # of a sequence
    micro_tokens: int
    rank: int
    scored: float  # fraction of the tokens that have a label


def layer_ops(config: DecoderConfig, step: Step, recompute: str) -> Iterator[Op]:
    """One layer, on all tokens of the step."""
    t, d, inner = step.tokens, config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = projection_shapes(config)
    micro_batches = -(-step.tokens // step.micro_tokens)

    def op(name: str, forward: tuple[float, float], backward: tuple[float, float], cheap: bool = False) -> Op:
        again = recompute == "layer" or (recompute == "selective" and cheap)
        flops, moved = (f + b + (f if again else 0) for f, b in zip(forward, backward, strict=True))
        return Op(name, flops, moved, again)

    # y = norm(x + residual): 2 read, 2 written; backward 3 read (dy, d_sum, x), 1 written
    yield op("norms", (2 * t * 6 * d, 2 * t * 4 * d * HALF), (2 * t * 10 * d, 2 * t * 4 * d * HALF), cheap=True)
    for names in JOINT:
        width_in, outs = shapes[names[0]][0], [shapes[name][1] for name in names]
        out = sum(outs)
        product = 2 * t * width_in * out
        weight = width_in * out * HALF * micro_batches
        gemm = (product, weight + t * (width_in + out) * HALF)
        yield op(f"{'+'.join(name.removesuffix('_proj') for name in names)} GEMM", gemm, gemm)
        r = step.rank
        low = 2 * t * r * (width_in * len(names) + out)
        # forward: x read, y read and written; backward: dy read twice, x read, dx read and written
        yield op(
            f"{'+'.join(name.removesuffix('_proj') for name in names)} LoRA",
            (low, t * (width_in + 2 * out) * HALF),
            (2 * low, t * (2 * out + 3 * width_in) * HALF),
        )
    rotated = 2 * t * (q + kv) * HALF
    yield op("rotary", (3 * t * (q + kv), rotated), (3 * t * (q + kv), rotated))
    scores = 4 * t * step.length * q  # two products of [L, L, Dh]
    yield op(
        "attention",
        (scores, t * (2 * q + 2 * kv) * HALF + t * config.num_heads * SINGLE),
        (2.5 * scores, t * (6 * q + 6 * kv) * HALF),
    )
    yield op("SwiGLU", (5 * t * inner, 3 * t * inner * HALF), (10 * t * inner, 5 * t * inner * HALF), cheap=True)


def step_ops(config: DecoderConfig, step: Step, recompute: str) -> list[Op]:
    """The whole step; layers summed by op."""
    layers = config.num_layers
    found = [replace(op, flops=layers * op.flops, bytes=layers * op.bytes) for op in layer_ops(config, step, recompute)]
    t, d = step.tokens, config.hidden_size
    found.append(Op("embedding, last norm", 20 * t * d, t * 10 * d * HALF))
    if step.stage == "mntp":
        rows, vocab = t * step.scored, config.vocab_size
        found.append(Op("loss GEMMs", 4 * rows * d * vocab, 2 * d * vocab * HALF + rows * vocab * (SINGLE + HALF)))
        found.append(Op("loss pass", 8 * rows * vocab, rows * vocab * (2 * SINGLE + HALF)))
    else:
        pairs = t / step.length / 2
        found.append(Op("pooling, InfoNCE", 6 * pairs**2 * d, 4 * t * d * HALF + 8 * pairs**2 * SINGLE))
    adapter = config.num_layers * step.rank * sum(sum(shape) for shape in projection_shapes(config).values())
    found.append(Op("AdamW", 12 * adapter, 7 * adapter * SINGLE))
    return found


def card(name: str, gemm_fraction: float, bandwidth_fraction: float) -> Gpu:
    """The card of the data sheets, at the fractions that are reached."""
    return Gpu(name, BF16_PEAKS[name] * 1e12 * gemm_fraction, BANDWIDTHS[name] * bandwidth_fraction)


def measured(gpu: str, shape: str, stage: str) -> list[dict[str, Any]]:
    """Seconds of this step from the committed runs of the card."""
    found = []
    for path in sorted([*RESULTS.glob("**/train_step_*.json"), *RESULTS.glob("*/results.json")]):
        content = json.loads(path.read_text(encoding="utf-8"))
        runs = [part.get("result", {}) for part in content["parts"].values()] if "parts" in content else [content]
        for run in runs:
            if gpu in run.get("device", "") and run.get("model") == shape and stage in run["stages"]:
                side = run["stages"][stage]["sides"]["bivec"]
                place = path.relative_to(RESULTS).as_posix()
                found.append({"file": place, "tokens_per_s": side["tokens_per_s"]})
    return found


def table(ops: Sequence[Op], gpu: Gpu, step: Step) -> str:
    """As text, with the total."""
    total = sum(op.seconds(gpu) for op in ops)
    lines = [f"{'op':<22} {'TFLOP':>9} {'GB':>8} {'FLOP/B':>8} {'ms':>9} {'share':>7}  bound"]
    for op in ops:
        seconds = op.seconds(gpu)
        lines.append(
            f"{op.name:<22} {op.flops / 1e12:9.2f} {op.bytes / 1e9:8.2f} {op.flops / op.bytes:8.1f} "
            f"{seconds * 1e3:9.2f} {100 * seconds / total:6.1f}%  {op.bound(gpu)}{', twice' if op.recomputed else ''}"
        )
    flops, moved = sum(op.flops for op in ops), sum(op.bytes for op in ops)
    lines.append(f"{'step':<22} {flops / 1e12:9.2f} {moved / 1e9:8.2f} {'':>8} {total * 1e3:9.2f}")
    lines.append(f"{step.tokens:,} tokens: at most {step.tokens / total:,.0f} tokens/s")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=tuple(BANDWIDTHS), default="H100")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="mistral-7b")
    parser.add_argument("--stage", choices=("mntp", "simcse"), default="mntp")
    parser.add_argument("--batch", type=int, help="blocks or sentences a step (default: 32 for MNTP, 128 for SimCSE)")
    parser.add_argument("--length", type=int, help="tokens of a block or sentence (default: 512, or a sentence's mean)")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192, help="of MNTP (default: %(default)s)")
    parser.add_argument("--scored", type=float, default=0.8, help="share of tokens with a label (default: Mistral's)")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA (default: %(default)s)")
    parser.add_argument("--recompute", choices=LEVELS, default="none")
    parser.add_argument("--gemm-fraction", type=float, default=0.81, help="of the bf16 peak (default: %(default)s)")
    parser.add_argument("--bandwidth-fraction", type=float, default=0.9, help="of the peak (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the figures there")
    options = parser.parse_args(arguments)
    for name in ("batch", "length", "micro_batch_tokens", "rank", "scored", "gemm_fraction", "bandwidth_fraction"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parse(arguments)
    is_mntp = options.stage == "mntp"
    length = options.length or (512 if is_mntp else SENTENCE_TOKENS)
    tokens = (options.batch or (32 if is_mntp else 128)) * length * (1 if is_mntp else 2)
    micro = min(tokens, options.micro_batch_tokens) if is_mntp else tokens
    step = Step(options.stage, tokens, length, micro, options.rank, options.scored)
    gpu = card(options.gpu, options.gemm_fraction, options.bandwidth_fraction)
    ops = step_ops(SHAPES[options.shape], step, options.recompute)
    print(
        f"{options.shape}, {options.stage}, {tokens:,} tokens in sequences of {length}, LoRA rank {options.rank}, "
        f"bf16, recomputation {options.recompute!r}\n{gpu.name}: {gpu.flops_per_s / 1e12:.0f} TFLOP/s, "
        f"{gpu.bytes_per_s / 1e12:.2f} TB/s\n\n{table(ops, gpu, step)}"
    )
    runs = measured(options.gpu, options.shape, options.stage)
    for found in runs:
        print(f"measured: {found['tokens_per_s']:,.0f} tokens/s ({found['file']})")
    if not runs:
        print("measured: nothing yet on this card")
    if options.output:
        content = {"gpu": asdict(gpu), "step": asdict(step), "shape": options.shape, "recompute": options.recompute}
        rows = [asdict(op) | {"seconds": op.seconds(gpu), "bound": op.bound(gpu)} for op in ops]
        options.output.write_text(
            json.dumps(content | {"ops": rows, "measured": runs}, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
