"""How fast is our attention, and against whom? Forward and backward on length mixes of real text, on a GPU.

    python benchmarks/attention.py                                   # everything: 72 cases, the weightier first
    python benchmarks/attention.py --quick                           # one layout, two mixes, no dropout
    python benchmarks/attention.py --layouts mistral --mixes 8k --masks bidirectional --dropout 0
    python benchmarks/attention.py --arch sm_90 --match "bf16 d64 g4"   # no GPU: the compiled kernels

Against torch's SDPA on the padded batch, torch's varlen attention (FlashAttention-2), and flash-attn 2, 3 and 4 where
they are installed, interleaved in one run. Writes attention_DEVICE.json and .png into benchmarks/results, or
``--output DIR``. What the columns mean:

* ms: median GPU time, cold caches; host: what the call costs Python, hidden inside a training step.
* TFLOP/s: of the floating-point operations that the true lengths need, ``4 pairs H Dh`` forward, where a causal
  sequence has L (L + 1) / 2 pairs and another L^2; by convention 2.5 times that backward. Padding is no work done.
* peak: the fraction of the dense bf16 rate on the data sheet.
* memory: the most allocated above the inputs (backward: above what the forward saved, too).
* ours: the other's time over ours.

Whatever is timed has first given the output and gradients of SDPA, sequence by sequence; a kernel that is wrong gets
no speed and, if it is ours, the exit status is 1. With dropout every library draws its own mask: ours is held against
our torch backend, which draws the same, where the scores fit; the others cannot be checked.

In SDPA's favour: padding the inputs is not timed, right-padded causal batches need no mask, and where a mask forbids
grouped kv heads to its fused kernels, the heads are repeated before the clock starts.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention_peers import PEERS, Call, Work, missing, outcome, reference
from timing import GpuMeter, Meter, Timing, describe_run, device_name, interleaved
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"

# Lengths in tokens of the Mistral-7B-v0.1 tokenizer, <s> included: 21 quantiles, from the shortest to the longest.
# SENTENCES: recipes/data/wikipedia_sentences.txt.gz, which SimCSE trains on. QUERIES: sentence1 of
# recipes/data/stsb_dev.csv.gz. PASSAGES: the 4,024 paragraphs of WikiText-2, validation and test, as distributed.
SENTENCES = (8, 12, 14, 16, 18, 19, 21, 22, 23, 25, 26, 28, 29, 31, 33, 35, 38, 41, 45, 52, 120)
QUERIES = (4, 8, 8, 9, 10, 10, 11, 12, 12, 13, 14, 16, 17, 18, 20, 21, 23, 25, 29, 33, 52)
PASSAGES = (2, 8, 18, 35, 52, 69, 84, 97, 109, 121, 133, 147, 157, 171, 186, 205, 224, 243, 274, 319, 602)

LAYOUTS = {"llama2": (32, 32, 128), "mistral": (32, 8, 128), "smollm2": (9, 3, 64)}  # heads, kv heads, head dim
MASKS = ("bidirectional", "causal")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIRECTIONS = ("forward", "backward", "forward+backward")
FLOPS_OF = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}
BF16_PEAKS = {  # dense TFLOP/s of the data sheets; the first name that the device's contains
    "H100 PCIe": 756.0,
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "MI300X": 1307.0,
}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-3}  # |ours - theirs| / |theirs|, Frobenius


def drawn(quantiles: Sequence[int], count: int, longest: int = 10**9) -> list[int]:
    """``count`` lengths of this distribution: its quantiles at even steps, so that a small batch has its shape too."""
    lengths = []
    for index in range(count):
        at = (index + 0.5) / count * (len(quantiles) - 1)
        below = int(at)
        lengths.append(min(longest, round(quantiles[below] + (at - below) * (quantiles[below + 1] - quantiles[below]))))
    return lengths


def shuffled(lengths: list[int]) -> list[int]:
    """In the fixed random order of a batch that nobody sorted."""
    return random.Random(0).sample(lengths, len(lengths))


MIXES = {
    "wikitext": shuffled(drawn(SENTENCES, 128)),  # a SimCSE batch
    "short": shuffled(drawn((20, 128), 128)),  # evenly from 20 to 128 tokens
    "mntp": [512] * 32,
    "e5": shuffled(drawn(QUERIES, 64) + drawn(PASSAGES, 128, longest=512)),  # queries, positives, negatives
    "8k": [8192],
    "8k+short": shuffled([8192, *drawn(SENTENCES, 31)]),  # one long among many short
}


@dataclass(frozen=True)
class Row:
    """One implementation in one direction of one case."""

    mix: str
    layout: str
    mask: str
    dropout_p: float
    direction: str
    implementation: str
    timing: Timing | None = None
    tflops: float | None = None
    of_peak: float | None = None
    peak_bytes: int | None = None
    ours_is_faster_by: float | None = None  # its time / ours
    max_error: float | None = None  # largest difference of the output to the reference's
    relative_error: float | None = None  # the worst of output, dQ, dK, dV, as in TOLERANCE; None = not checked
    error: str | None = None  # why there is no time
    note: str = ""


def flops(lengths: Sequence[int], heads: int, head_dim: int, causal: bool, direction: str) -> float:
    """Floating-point operations that the lengths need (module docstring)."""
    pairs = sum(length * (length + 1) // 2 if causal else length * length for length in lengths)
    return FLOPS_OF[direction] * 4.0 * pairs * heads * head_dim


def bf16_peak(device: str, dtype: torch.dtype) -> float | None:
    """TFLOP/s of the device's data sheet; None where we do not know, and for fp32."""
    if dtype == torch.float32:
        return None
    return next((peak for name, peak in BF16_PEAKS.items() if name in device), None)


def make_work(
    lengths: Sequence[int], layout: tuple[int, int, int], mask: str, dropout_p: float, dtype: torch.dtype, device: Any
) -> Work:
    """Normally distributed operands, the same for every implementation."""
    heads, kv_heads, head_dim = layout
    generator = torch.Generator(device).manual_seed(0)

    def operand(count: int) -> Tensor:
        return torch.randn(sum(lengths), count, head_dim, generator=generator, device=device, dtype=dtype)

    bounds = list(itertools.accumulate(lengths, initial=0))
    return Work(
        q=operand(heads).requires_grad_(),
        k=operand(kv_heads).requires_grad_(),
        v=operand(kv_heads).requires_grad_(),
        d_out=operand(heads),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device),
        lengths=tuple(lengths),
        causal=mask == "causal",
        dropout_p=dropout_p,
    )


def attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """Its result, or the error's first line: one that fails (memory, an unsupported dtype) leaves the others."""
    try:
        return action(), None
    except Exception as error:  # of any kind: other people's libraries
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def compare(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Largest difference of the outputs, and the worst relative Frobenius error of output, dQ, dK and dV."""
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
    # .item() of a NaN stays NaN, but max() may lose it: NaN becomes infinite, so that it never passes
    relative = [torch.nan_to_num((a - b).norm() / b.norm().clamp_min(1e-6), nan=torch.inf).item() for a, b in pairs]
    return (pairs[0][0] - pairs[0][1]).abs().max().item(), max(relative)


def prepare(row: Row, work: Work, expected: Sequence[Tensor] | None) -> tuple[Row, Call | None]:
    """The implementation on this work, once it has agreed with the reference; otherwise the row says why not."""
    call, error = attempt(partial(PEERS[row.implementation].prepare, work))
    if error is not None:
        return replace(row, error=error), None
    found, error = attempt(partial(outcome, call, work))
    if error is not None:
        return replace(row, error=error, note=call.note), None
    row = replace(row, note=call.note)
    if expected is not None:
        max_error, relative = compare(found, expected)
        row = replace(row, max_error=max_error, relative_error=relative)
        if not relative <= TOLERANCE[work.q.dtype]:
            return replace(row, error=f"wrong: relative error {relative:.1e}"), None
    return row, call


def time_case(
    case: Row, work: Work, names: Sequence[str], meter: Meter, peak: float | None, options: argparse.Namespace
) -> list[Row]:
    """Checks and times every implementation on one case, in all directions."""
    expected, failure = attempt(partial(reference, work))
    if failure is not None:  # nothing can be checked, so nothing is timed
        return [replace(case, implementation=name, error=f"the reference failed: {failure}") for name in names]
    rows, ready = [], {}
    for name in names:
        comparable = name.startswith("bivec") or work.dropout_p == 0.0  # others draw their own masks
        row, call = prepare(replace(case, implementation=name), work, expected if comparable else None)
        if call is None:
            rows.append(row)
        else:
            ready[name] = row, call
    del expected
    for direction in DIRECTIONS:
        rows += time_direction(direction, ready, work, meter, peak, options)
    return rows


def time_direction(
    direction: str,
    ready: dict[str, tuple[Row, Call]],
    work: Work,
    meter: Meter,
    peak: float | None,
    options: argparse.Namespace,
) -> list[Row]:
    """One row for each implementation."""
    rows, runs, memory = [], {}, {}
    for name, (row, call) in ready.items():
        run, error = attempt(partial(call.directed, direction))
        if error is None:
            memory[name], error = attempt(partial(meter.peak_bytes, run))
        if error is None:
            runs[name] = run
        else:
            rows.append(replace(row, direction=direction, error=error))
    timings = interleaved(meter, runs, options.budget_ms, options.repeats)
    _, heads, head_dim = work.q.shape
    needed = flops(work.lengths, heads, head_dim, work.causal, direction)
    for name, timing in timings.items():
        tflops = needed / timing.ms / 1e9
        timed = replace(
            ready[name][0],
            direction=direction,
            timing=timing,
            tflops=tflops,
            of_peak=tflops / peak if peak else None,
            peak_bytes=memory[name],
            ours_is_faster_by=timing.ms / timings["bivec"].ms if "bivec" in timings else None,
        )
        rows.append(timed)
    return rows


def line(row: Row) -> str:
    """The row as it is printed."""
    start = f"  {row.direction:<17} {row.implementation:<13}"
    if row.timing is None:
        return f"{start} {row.error}"
    of_peak = f"{100 * row.of_peak:5.1f} %" if row.of_peak is not None else "      -"
    ours = f"{row.ours_is_faster_by:6.2f} x" if row.ours_is_faster_by is not None else "       -"
    checked = f"max error {row.max_error:.1e}" if row.max_error is not None else "unchecked"
    return (
        f"{start} {row.timing.ms:9.3f} {row.timing.host_ms:8.3f} {row.tflops:8.1f} {of_peak} "
        f"{row.peak_bytes / 2**20:10.1f} {ours}  {'; '.join(filter(None, (checked, row.note)))}"
    )


HEADER = f"  {'':<17} {'':<13} {'ms':>9} {'host ms':>8} {'TFLOP/s':>8} {'peak':>7} {'memory MiB':>10} {'ours':>8}"


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """TFLOP/s of forward and backward together by mix, a panel for each layout: of the first mask and dropout."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.timing is not None and row.direction == "forward+backward"]
    if not timed:
        return
    first = timed[0]
    shown = [row for row in timed if (row.mask, row.dropout_p) == (first.mask, first.dropout_p)]
    layouts, names = (list(dict.fromkeys(getattr(row, f) for row in shown)) for f in ("layout", "implementation"))
    figure = Figure(figsize=(1.5 + 4.5 * len(layouts), 4), layout="constrained")
    figure.suptitle(f"{title}: forward + backward, {first.mask}, dropout {first.dropout_p:g}")
    for axis, layout in zip(figure.subplots(1, len(layouts), squeeze=False)[0], layouts, strict=True):
        mixes = list(dict.fromkeys(row.mix for row in shown if row.layout == layout))
        for index, name in enumerate(names):
            bars = {row.mix: row.tflops for row in shown if (row.layout, row.implementation) == (layout, name)}
            at = [mixes.index(mix) + index * 0.8 / len(names) for mix in bars]
            axis.bar(at, list(bars.values()), 0.8 / len(names), align="edge", label=name)
        axis.set_xticks([at + 0.4 for at in range(len(mixes))], mixes)
        axis.set(title=f"{layout} {LAYOUTS[layout]}", ylabel="TFLOP/s of the true lengths")
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def run(options: argparse.Namespace, device: torch.device, meter: Meter) -> int:
    """All cases; the exit status. The JSON is written after each, for a run that is cut short."""
    absent = missing()
    name = device_name(device)
    dtype = DTYPES[options.dtype]
    path = options.output / f"attention_{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**describe_run(device), "dtype": options.dtype, "missing": absent, "mixes": MIXES, "layouts": LAYOUTS}
    print(f"{name}, {content['versions']}\n" + "\n".join(f"without {peer}: {why}" for peer, why in absent.items()))
    rows: list[Row] = []
    for dropout_p, mask, layout, mix in itertools.product(
        options.dropout, options.masks, options.layouts, options.mixes
    ):
        names = [p for p in options.peers if p not in absent and (PEERS[p].has_dropout or not dropout_p)]
        lengths = MIXES[mix]
        heads, kv_heads, head_dim = LAYOUTS[layout]
        print(
            f"\n{layout} ({heads}/{kv_heads} heads of {head_dim}), {mix} ({len(lengths)} sequences, {sum(lengths)} "
            f"tokens, longest {max(lengths)}), {mask}, dropout {dropout_p:g}, {options.dtype}\n{HEADER}",
            flush=True,
        )
        work = make_work(lengths, LAYOUTS[layout], mask, dropout_p, dtype, device)
        case = Row(mix, layout, mask, dropout_p, direction="all", implementation="")
        found = time_case(case, work, names, meter, bf16_peak(name, dtype), options)
        print("\n".join(map(line, found)), flush=True)
        rows += found
        path.write_text(json.dumps(content | {"rows": [asdict(row) for row in rows]}) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()  # the padded batches of one case leave no room for the next one's
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    else:
        draw(path.with_suffix(".png"), rows, name)
    print(f"\nwrote {path}")
    failed = [row for row in rows if row.implementation == "bivec" and row.error is not None]
    for row in failed:
        print(f"FAILED  {row.layout}, {row.mix}, {row.mask}, dropout {row.dropout_p:g}, {row.direction}: {row.error}")
    return 1 if failed else 0


def static_table(architecture: str, match: str) -> int:
    """What can be said without a GPU: registers, spills and instructions of the compiled kernels."""
    print(f"No GPU here, so nothing is timed. The attention kernels as compiled for {architecture}:\n", flush=True)
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed: pip install triton")
        return 1
    from bivec.kernels import aot

    return aot.main(["--arch", architecture, "--match", match])


FULL = {
    "mixes": list(MIXES),
    "layouts": list(LAYOUTS),
    "masks": list(MASKS),
    "dropout": [0.0, 0.3],
    "budget_ms": 200.0,
    "repeats": 50,
}
QUICK = {
    "mixes": ["wikitext", "mntp"],
    "layouts": ["mistral"],
    "masks": ["bidirectional"],
    "dropout": [0.0],
    "budget_ms": 100.0,
    "repeats": 20,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layout, two mixes, few repeats")
    parser.add_argument("--mixes", nargs="+", choices=MIXES)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS)
    parser.add_argument("--masks", nargs="+", choices=MASKS)
    parser.add_argument("--dropout", nargs="+", type=float, help="probabilities; default: 0 and 0.3")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=[p for p in PEERS if p != "bivec torch"], help="and ours: bivec"
    )
    parser.add_argument("--budget-ms", type=float, help="GPU time for each implementation, direction and case")
    parser.add_argument("--repeats", type=int, help="at most")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the files are written")
    parser.add_argument("--arch", default="sm_90", help="without a GPU: the architecture of the table")
    parser.add_argument("--match", default="bf16 d128 g4", help="without a GPU: the cases with this in their label")
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        return static_table(options.arch, options.match)
    device = torch.device("cuda")
    return run(options, device, GpuMeter(device))


if __name__ == "__main__":
    sys.exit(main())
