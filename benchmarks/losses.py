"""What do our losses save, and are their gradients right? Forward and backward of linear_cross_entropy and info_nce.

    python benchmarks/losses.py                     # --size full on a GPU, small on a CPU
    python benchmarks/losses.py --size small --losses info_nce --peers bivec torch
    python benchmarks/losses.py --huge              # info_nce on the CPU at B = N = 65,536, D = 1,024: minutes

Against plain torch, the same compiled (on a GPU), the matrix products alone, and where they are installed:
Liger-Kernel and Cut Cross-Entropy for linear_cross_entropy, memeff (both directions only) and sentence-transformers'
cached loss for info_nce; interleaved in one run. Writes losses_DEVICE.json and .png into benchmarks/results, or
``--output DIR``. What the columns mean:

* ms: median time of forward and backward; on a GPU its own, with cold caches.
* memory: the most allocated above the operands, the gradients of the operands included.
* ours: the other's time, and memory, over ours.
* gradient error: |found - exact| / |exact|, Frobenius, of the worst operand, against float64 on the same rounded
  operands, at a size that fits; on random batches, and on nearly solved ones, where 1 - p cancels.

The head of linear_cross_entropy is frozen, as LoRA leaves it; with ``--train-head`` its gradient is formed too. "of
20 %" has a target at every fifth row of the hidden states, as masked tokens are. A peer
that raises is shown with its error. One whose gradient is off where all should be right (random, scale 1) is not
timed; if it is ours that fails, the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_meter import CpuMeter
from loss_peers import CROSS_ENTROPIES, CROSS_ENTROPY, LOSSES, PEERS, SELECTED, Work, gradients, missing, reference
from timing import GpuMeter, Meter, Timing, describe_run, device_name, interleaved
from torch import Tensor

from bivec.kernels import info_nce

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = {  # rows, D, and the columns: vocabulary, or candidates
    "small": {
        CROSS_ENTROPY: ((256, 576, 8192), (512, 576, 16384), (1024, 576, 49152)),
        "info_nce": ((512, 576, 512), (2048, 576, 2048), (4096, 576, 4096)),
    },
    "full": {
        CROSS_ENTROPY: ((2048, 4096, 32000), (16384, 4096, 32000), (16384, 4096, 128256)),
        "info_nce": ((512, 4096, 512), (8192, 4096, 8192), (32768, 4096, 32768)),
    },
}
ERROR_SIZES = {CROSS_ENTROPY: (192, 256, 2000), "info_nce": (192, 512, 192)}
ERROR_DTYPES = ("fp32", "bf16")
BATCHES = ("random", "solved")
SCALES = {CROSS_ENTROPY: (1.0, 5.0, 20.0), "info_nce": (1.0, 20.0, 50.0, 100.0)}  # of the logits
HUGE = (65536, 1024)
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-4}  # at scale 1, where all should be right


@dataclass(frozen=True)
class ErrorRow:
    """How far the gradients of one implementation are off."""

    loss: str
    batch: str
    dtype: str
    scale: float
    implementation: str
    gradient_error: float | None = None
    error: str | None = None  # why there is no figure


@dataclass(frozen=True)
class Row:
    """Time and memory of one implementation."""

    loss: str
    rows: int
    dim: int
    columns: int
    implementation: str
    timing: Timing | None = None
    peak_bytes: int | None = None
    ours_is_faster_by: float | None = None  # its time / ours
    ours_is_smaller_by: float | None = None  # its memory / ours
    error: str | None = None  # why there is no time


def of_loss(table: dict[str, Any], loss: str) -> Any:
    """The entry of a table that knows one cross-entropy and one info_nce."""
    return table[CROSS_ENTROPY if loss in CROSS_ENTROPIES else "info_nce"]


def make_work(
    loss: str,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: str = "random",
    scale: float = 20.0,
    train_head: bool = False,
) -> Work:
    """Operands drawn in fp32 and rounded, the same for every implementation; of cross-entropy the scale is 1 if timed.

    In a solved batch every row points to its column: cosine 0.55 with it, and to within 1 / sqrt(D) of 0 with others.
    Where only some rows have a target, they are every fifth.
    """
    rows, dim, columns = size
    generator = torch.Generator(device).manual_seed(0)
    x, y = (torch.randn(n, dim, generator=generator, device=device) for n in (rows, columns))
    targets = torch.arange(rows, device=device)
    if loss in CROSS_ENTROPIES:
        targets = torch.randint(columns, (rows,), generator=generator, device=device)
    if batch == "solved":
        x = y[targets] + 1.5 * x
    if loss in CROSS_ENTROPIES:
        y = y * (scale / x.norm(dim=1).mean())  # logits of this size
    index = None
    if loss == SELECTED:
        index = torch.arange(0, 5 * rows, 5, device=device)
        x = x.repeat_interleave(5, dim=0)
    y = y.to(dtype).requires_grad_(loss not in CROSS_ENTROPIES or train_head)
    return Work(loss, x.to(dtype).requires_grad_(), y, targets, scale, index)


def attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """Its result, or the error's first line: one that fails leaves the others."""
    try:
        return action(), None
    except Exception as error:  # of any kind: other people's libraries
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def compare(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The gradient error of the worst operand; infinite for NaN."""
    errors = []
    for a, b in zip(found, expected, strict=True):
        error = (a.cpu().double() - b).norm() / b.norm().clamp_min(1e-300)
        errors.append(torch.nan_to_num(error, nan=torch.inf).item())
    return max(errors)


def errors_of(loss: str, dtype: str, names: Sequence[str], device: torch.device, train_head: bool) -> list[ErrorRow]:
    """Every implementation on every batch and scale."""
    found = []
    for batch in BATCHES:
        for scale in of_loss(SCALES, loss):
            size = of_loss(ERROR_SIZES, loss)
            work = make_work(loss, size, DTYPES[dtype], device, batch=batch, scale=scale, train_head=train_head)
            expected = reference(work)
            for name in (name for name in names if PEERS[name].is_loss):
                got, error = attempt(lambda name=name, work=work: gradients(PEERS[name].prepare(work), work))
                row = ErrorRow(loss, batch, dtype, scale, name, error=error)
                found.append(row if error else replace(row, gradient_error=compare(got, expected)))
    return found


def refused(found: Sequence[ErrorRow], dtype: str) -> dict[str, str]:
    """The implementations that are not timed, and why."""
    reasons = {}
    for row in found:
        if (row.dtype, row.batch, row.scale) == (dtype, "random", 1.0):
            if row.error is not None:
                reasons[row.implementation] = row.error
            elif not row.gradient_error <= TOLERANCE[DTYPES[dtype]]:
                reasons[row.implementation] = f"wrong: gradient error {row.gradient_error:.1e}"
    return reasons


def time_case(case: Row, work: Work, names: Sequence[str], meter: Meter, options: argparse.Namespace) -> list[Row]:
    """One row for each implementation."""
    rows, runs, memory = [], {}, {}
    for name in names:
        step, error = attempt(partial(PEERS[name].prepare, work))
        run = partial(gradients, step, work)
        if error is None:
            _, error = attempt(run)  # compiles, and allocates what stays
        if error is None:
            memory[name], error = attempt(partial(meter.peak_bytes, run))
        if error is None:
            runs[name] = run
        else:
            rows.append(replace(case, implementation=name, error=error))
    timings = interleaved(meter, runs, options.budget_ms, options.repeats)
    for name, timing in timings.items():
        timed = replace(case, implementation=name, timing=timing, peak_bytes=memory[name])
        if "bivec" in timings:
            ratios = timing.ms / timings["bivec"].ms, memory[name] / max(memory["bivec"], 1)
            timed = replace(timed, ours_is_faster_by=ratios[0], ours_is_smaller_by=ratios[1])
        rows.append(timed)
    return rows


def error_table(found: Sequence[ErrorRow]) -> str:
    """A line for each implementation, dtype and batch; a column for each scale."""
    scales = sorted({row.scale for row in found})
    lines = [f"  {'gradient error':<22} {'':<5} {'':<7}" + "".join(f"{f'x {scale:g}':>10}" for scale in scales)]
    for key in dict.fromkeys((row.implementation, row.dtype, row.batch) for row in found):
        rows = [row for row in found if (row.implementation, row.dtype, row.batch) == key]
        cells = "".join(f"{row.gradient_error:10.1e}" if row.error is None else f"{'failed':>10}" for row in rows)
        reason = next((f"  {row.error}" for row in rows if row.error), "")
        lines.append(f"  {key[0]:<22} {key[1]:<5} {key[2]:<7}{cells}{reason}")
    return "\n".join(lines)


def line(row: Row) -> str:
    """The row as it is printed."""
    start = f"  {row.implementation:<22}"
    if row.timing is None:
        return f"{start} {row.error}"
    ratios = ""
    if row.ours_is_faster_by is not None:
        ratios = f"{row.ours_is_faster_by:8.2f} x {row.ours_is_smaller_by:8.2f} x"
    return f"{start} {row.timing.ms:10.2f} {row.peak_bytes / 2**20:11.1f} {ratios}"


HEADER = f"  {'':<22} {'ms':>10} {'memory MiB':>11} {'ours: time':>10} {'memory':>10}"


def draw(path: Path, rows: Sequence[Row], errors: Sequence[ErrorRow], title: str, dtype: str) -> None:
    """A row of panels for each loss: time and memory by size, gradient error by scale on random and solved batches."""
    from matplotlib.figure import Figure

    losses = list(dict.fromkeys(row.loss for row in rows))
    figure = Figure(figsize=(16, 3.4 * len(losses)), layout="constrained")
    figure.suptitle(f"{title}: forward + backward; gradients against float64")
    colours = {name: f"C{index}" for index, name in enumerate(PEERS)}
    for panels, loss in zip(figure.subplots(len(losses), 4, squeeze=False), losses, strict=True):
        timed = [row for row in rows if row.loss == loss and row.timing is not None]
        sizes = list(dict.fromkeys((row.rows, row.columns) for row in rows if row.loss == loss))
        names = list(dict.fromkeys(row.implementation for row in timed))
        for axis, label, value in (
            (panels[0], f"ms, {dtype}", lambda row: row.timing.ms),
            (panels[1], f"MiB above the operands, {dtype}", lambda row: row.peak_bytes / 2**20),
        ):
            for index, name in enumerate(names):
                bars = {(r.rows, r.columns): value(r) for r in timed if r.implementation == name}
                at = [sizes.index(size) + index * 0.8 / len(names) for size in bars]
                axis.bar(at, list(bars.values()), 0.8 / len(names), align="edge", label=name, color=colours[name])
            axis.set_xticks([at + 0.4 for at in range(len(sizes))], [f"{n} x {m}" for n, m in sizes])
            axis.set(yscale="log", ylabel=label, title=loss)
        for axis, batch in zip(panels[2:], BATCHES, strict=True):
            chosen = [e for e in errors if (e.loss, e.batch) == (loss, batch) and e.gradient_error is not None]
            for name, kind in dict.fromkeys((e.implementation, e.dtype) for e in chosen):
                line_of = [e for e in chosen if (e.implementation, e.dtype) == (name, kind)]
                style = "--" if kind == "fp32" else "-"
                axis.plot(
                    [e.scale for e in line_of],
                    [max(e.gradient_error, 1e-12) for e in line_of],
                    style,
                    marker="o",
                    label=f"{name} {kind}",
                    color=colours[name],
                )
            axis.set(yscale="log", xlabel="scale", ylabel="gradient error", title=f"{loss}, {batch} batch")
        panels[3].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)


def run(options: argparse.Namespace, device: torch.device, meter: Meter) -> int:
    """All losses; the exit status. The JSON is written after each."""
    absent, name = missing(device), device_name(device)
    path = options.output / f"losses_{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**describe_run(device), "dtype": options.dtype, "train_head": options.train_head, "missing": absent}
    print(f"{name}, {content['versions']}\n" + "\n".join(f"without {peer}: {why}" for peer, why in absent.items()))
    rows: list[Row] = []
    errors: list[ErrorRow] = []
    for loss in options.losses:
        names = [peer for peer in options.peers if peer not in absent and loss in PEERS[peer].losses]
        print(f"\n{loss}", flush=True)
        found = []
        for dtype in dict.fromkeys((*ERROR_DTYPES, options.dtype)):
            found += errors_of(loss, dtype, names, device, options.train_head)
        print(error_table(found), flush=True)
        errors += found
        reasons = refused(found, options.dtype)
        for size in of_loss(SIZES[options.size], loss):
            n, dim, columns = size
            print(f"\n{loss}: {n} rows, D = {dim}, {columns} columns, {options.dtype}\n{HEADER}", flush=True)
            case = Row(loss, n, dim, columns, implementation="")
            work = make_work(
                loss,
                size,
                DTYPES[options.dtype],
                device,
                scale=1.0 if loss in CROSS_ENTROPIES else 20.0,
                train_head=options.train_head,
            )
            timed = [replace(case, implementation=peer, error=why) for peer, why in reasons.items()]
            timed += time_case(case, work, [peer for peer in names if peer not in reasons], meter, options)
            print("\n".join(map(line, timed)), flush=True)
            rows += timed
            found_so_far = {"rows": [asdict(row) for row in rows], "errors": [asdict(row) for row in errors]}
            path.write_text(json.dumps(content | found_so_far) + "\n", encoding="utf-8")
            del work
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    else:
        draw(path.with_suffix(".png"), rows, errors, name, options.dtype)
    print(f"\nwrote {path}")
    failed = [row for row in (*rows, *errors) if row.implementation == "bivec" and row.error is not None]
    for row in failed:
        print(f"FAILED  {row.loss}: {row.error}")
    return 1 if failed else 0


def run_huge(options: argparse.Namespace) -> int:
    """One forward and backward of info_nce on the CPU, at a size whose logits alone would take 16 GiB."""
    size, dim = HUGE
    device = torch.device("cpu")
    work = make_work("info_nce", (size, dim, size), torch.float32, device)
    print(f"info_nce, B = N = {size}, D = {dim}, fp32, forward and backward on the CPU", flush=True)
    start = time.perf_counter()
    peak_bytes = CpuMeter().peak_bytes(lambda: info_nce(work.x, work.y, scale=work.scale).backward())
    seconds = time.perf_counter() - start
    finite = all(leaf.grad.isfinite().all().item() for leaf in work.leaves)
    print(
        f"{seconds:.0f} s; {peak_bytes / 2**20:.0f} MiB above the operands' {8 * size * dim / 2**20:.0f} MiB, their "
        f"gradients included; the logits alone would take {4 * size**2 / 2**20:.0f} MiB"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    found = {"rows": size, "dim": dim, "seconds": seconds, "peak_bytes": peak_bytes, "gradients_finite": finite}
    path = options.output / "losses_huge.json"
    path.write_text(json.dumps(describe_run(device) | found) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return 0 if finite else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full" if on_gpu else "small")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="and ours: bivec")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_gpu else "fp32", help="of what is timed")
    parser.add_argument("--train-head", action="store_true", help="also the gradient of the head's weight")
    parser.add_argument("--budget-ms", type=float, default=300.0, help="time for each implementation and size")
    parser.add_argument("--repeats", type=int, default=30, help="at most")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the files are written")
    parser.add_argument("--huge", action="store_true", help="instead: info_nce at 65,536 pairs on the CPU")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parse(arguments)
    if options.huge:
        return run_huge(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return run(options, device, GpuMeter(device) if device.type == "cuda" else CpuMeter())


if __name__ == "__main__":
    sys.exit(main())
