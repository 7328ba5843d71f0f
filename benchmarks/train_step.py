"""How fast is a training step, where does its time go, and what does the original's way take? MNTP and SimCSE.

    python benchmarks/train_step.py                            # SmolLM2-135M, both stages; 30 minutes on two idle cores
    python benchmarks/train_step.py --stage mntp --mntp-batch 2 --steps 3 --memory
    python benchmarks/train_step.py --stage simcse --attention-dropout 0
    python benchmarks/train_step.py --model DIR                # any LLaMA or Mistral decoder
    python benchmarks/train_step.py --shape mistral-7b         # random weights and tokens: no file, no network

Ours is the engine's own trainer and objectives. The peer is transformers + PEFT, padded, as the original trains
(``padded_peer.py``): SDPA, which on a CPU has a fused kernel without dropout and forms the probabilities with it;
logits of all tokens; both SimCSE views one after the other; activations computed again in the backward (METHOD 3.6 and
4.5). A second peer keeps its activations, which takes it less time and more memory (``--peer-recompute``: on, off, or
both; by default both in MNTP on a CPU, else on: a SimCSE batch of 64 would take it more than 20 GiB). All sides take
turns on the same samples, MNTP masks, weights and LoRA values, with torch's fused AdamW and the same schedule and
clipping. In the peers' favour, the LM head, which the original trains and throws away, is frozen, and no cache of keys
is kept. Without their packages, or with ``--no-peer``, ours is measured alone, and the file says so.

Writes train_step_DEVICE.json and .png into benchmarks/results, or ``--output DIR``. What is in them:

* s: seconds of an optimiser step, from batch to update: median, least and most of the turns after the warm-up;
  ours is faster by the median over the turns of a peer's time over ours.
* tokens/s: of true tokens, for all sides; padding is no work done.
* GFLOP/s: of the operations that engine/estimate.py counts for the true tokens, the same for all sides.
* of GEMMs: that rate over the rate of the matrix products alone, which take part in the turns: some layers' seven
  projections, forward and gradient of the input, and the LM head's on the scored rows, in buffers that exist.
* of peak: that rate over the dense bf16 rate on the GPU's data sheet.
* memory (``--memory``): of a process that does nothing else, the most above what it held when the model and its adapter
  stood. On a CPU (Linux) of its resident set, on a GPU of what torch allocated. Ours is smaller by the quotient.
* breakdown: one step of ours under torch's profiler (``step_profile.py``).
* losses: all sides from the same weights with all dropout off, on batches of 1 block and at most 8 sentences. If
  they differ by more than 1 % at a step (of a loss below 1e-3: by 1e-5), the exit status is 1.

Longer than 400 lines: what all sides share (samples, masks, weights, turns) has to be seen in one place to be believed;
what could be cut off is in padded_peer.py and step_profile.py.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import padded_peer
import torch
from attention import bf16_peak
from gemms import Gemms
from step_profile import breakdown
from step_turns import MASK_PROBABILITY, OURS, Work, flops_per_token, our_steps, prepare, run_turns
from timing import describe_run, device_name
from workload import SHAPES, load_checkpoint

from bivec.engine.errors import BivecError, first_line
from bivec.engine.lora import LoraConfig, add_lora
from bivec.engine.optim import OptimConfig
from bivec.engine.packaged import PACKAGED_MODEL

RESULTS = Path(__file__).resolve().parent / "results"
STAGES = ("mntp", "simcse")
PEER = "transformers + peft"
PEERS = {"on": {PEER: True}, "off": {f"{PEER}, kept": False}}  # by --peer-recompute
PEERS["both"] = PEERS["on"] | PEERS["off"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLOURS = ("C0", "C1", "C2")  # of the sides
LOSS_BATCH = {"mntp": 1, "simcse": 8}  # at most
LOSS_TOLERANCE = 0.01
ON_CPU = {"dtype": "float32", "mntp_batch": 8, "simcse_batch": 64, "steps": 3, "warmup": 1}
ON_GPU = {"dtype": "bfloat16", "mntp_batch": 32, "simcse_batch": 128, "steps": 20, "warmup": 3}
QUICK = {"mntp_batch": 2, "simcse_batch": 8, "steps": 2, "warmup": 1, "sequence_length": 32, "loss_steps": 4}


@dataclass(frozen=True)
class SideResult:
    """One side of a stage."""

    seconds: float  # a step: median
    seconds_min: float
    seconds_max: float
    tokens_per_s: float
    flops_per_s: float
    of_gemms: float  # shares
    of_peak: float | None
    ours_is_faster_by: float | None = None  # of a peer
    peak_bytes: int | None = None  # above the loaded model
    ours_is_smaller_by: float | None = None


def summarise(
    seconds: Sequence[float], tokens: Sequence[int], flops: float, gemm_rate: float, peak: float | None
) -> SideResult:
    """``flops`` a token; ``peak`` in TFLOP/s."""
    tokens_per_s = sum(tokens) / sum(seconds)
    rate = tokens_per_s * flops
    return SideResult(
        seconds=median(seconds),
        seconds_min=min(seconds),
        seconds_max=max(seconds),
        tokens_per_s=tokens_per_s,
        flops_per_s=rate,
        of_gemms=rate / gemm_rate,
        of_peak=rate / peak / 1e12 if peak else None,
    )


def tokens_of_a_forward(work: Work, batch_size: int) -> int:
    """Rows of the products of ours: of one micro-batch in MNTP, on average of both views in SimCSE."""
    options = work.options
    if work.stage == "mntp":
        blocks = max(1, options.micro_batch_tokens // options.sequence_length)
        return min(batch_size, blocks) * options.sequence_length
    return 2 * round(batch_size * float(work.objective(None, batch_size, 0.0).sentences.lengths.mean()))


def measure_time(work: Work, peers: Mapping[str, bool]) -> dict[str, Any]:
    """All sides in turns, after the warm-up, and the breakdown of ours."""
    options, batch_size = work.options, work.options.batch[work.stage]
    dropouts = {
        "attention_dropout": options.attention_dropout if work.stage == "simcse" else 0.0,
        "lora_dropout": options.lora_dropout,
    }
    tokens = tokens_of_a_forward(work, batch_size)
    gemms = Gemms(work.checkpoint, tokens, round(tokens * MASK_PROBABILITY) if work.stage == "mntp" else 0)
    all_turns = options.warmup + options.steps
    turns, errors = run_turns(work, batch_size=batch_size, steps=all_turns, peers=peers, gemms=gemms, **dropouts)
    turns = turns[options.warmup :]
    flops = flops_per_token(work, batch_size)
    gemm_rate = median(turn.gemm_flops_per_s for turn in turns)
    peak = bf16_peak(device_name(work.device), DTYPES[options.dtype])
    counts = [turn.tokens for turn in turns]
    sides = {}
    for name in (OURS, *(name for name in peers if name not in errors)):
        side = summarise([turn.seconds[name] for turn in turns], counts, flops, gemm_rate, peak)
        faster = None if name == OURS else median(turn.seconds[name] / turn.seconds[OURS] for turn in turns)
        sides[name] = asdict(replace(side, ours_is_faster_by=faster))
    adapter = add_lora(work.checkpoint.model, LoraConfig(dropout=options.lora_dropout), options.seed)
    objective = work.objective(adapter, batch_size, dropouts["attention_dropout"])
    once = our_steps(work, adapter, objective, OptimConfig(options.learning_rate, steps=1))
    parts = breakdown(once, work.device, adapter.config.rank)
    adapter.remove()
    return {
        "batch": batch_size,
        **dropouts,
        "tokens": sum(counts) / len(counts),
        "gemm_flops_per_s": gemm_rate,
        "sides": sides,
        "peer_errors": errors,
        "breakdown_seconds": parts,
        "turns": [asdict(turn) for turn in turns],
    }


def measure_losses(work: Work, peers: Mapping[str, bool]) -> dict[str, Any]:
    """The curves of all sides without dropout, and by how much a peer's differs at most."""
    batch_size = min(LOSS_BATCH[work.stage], work.options.batch[work.stage])
    turns, errors = run_turns(
        work,
        batch_size=batch_size,
        steps=work.options.loss_steps,
        attention_dropout=0.0,
        lora_dropout=0.0,
        peers=peers,
    )
    names = [name for name in peers if name not in errors]
    found = {"batch": batch_size, "peer_errors": errors}
    found |= {name: [turn.losses[name] for turn in turns] for name in (OURS, *names)}
    if names:
        found["largest_relative_difference"] = max(
            abs(turn.losses[OURS] - turn.losses[name]) / max(abs(turn.losses[name]), 1e-3)
            for turn in turns
            for name in names
        )
    return found


def resident_bytes(field: str) -> int:
    """Of this process: ``VmRSS`` now, ``VmHWM`` at its peak (``getrusage`` would count what the parent held)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure_memory(work: Work, side: str) -> int:
    """The peak of two steps of one side above the loaded model; this process must do nothing else."""
    options, on_gpu = work.options, work.device.type == "cuda"
    attention_dropout = options.attention_dropout if work.stage == "simcse" else 0.0
    model = padded_peer.causal_lm(work.checkpoint, attention_dropout) if side != OURS else None
    adapter = add_lora(work.checkpoint.model, LoraConfig(dropout=options.lora_dropout), options.seed)
    objective = work.objective(adapter, options.batch[work.stage], attention_dropout)
    optim = OptimConfig(options.learning_rate, 2)
    if model is not None:
        peer = padded_peer.PaddedPeer(model, adapter, objective, optim, recompute=PEERS["both"][side])
    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(work.device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is resident now
    before = torch.cuda.memory_allocated(work.device) if on_gpu else resident_bytes("VmRSS")
    if model is not None:
        for number in range(2):
            peer.step(number)
    else:
        our_steps(work, adapter, objective, optim)()
    if on_gpu:
        return torch.cuda.max_memory_allocated(work.device) - before
    return resident_bytes("VmHWM") - before


def memory_in_a_process(arguments: Sequence[str], stage: str, side: str) -> int | None:
    """Runs this command for one stage and side; None where it failed, which it says on the screen."""
    command = [sys.executable, __file__, *arguments, "--stage", stage, "--memory-of", side]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if answer.returncode != 0:
        print(f"  the memory of {side} in {stage} could not be measured: exit status {answer.returncode}")
        return None
    return json.loads(answer.stdout.splitlines()[-1])["peak_bytes"]


def add_memory(sides: dict[str, Any], memory: Mapping[str, int | None]) -> None:
    """Puts the peaks into the results of the sides."""
    for name, side in sides.items():
        side["peak_bytes"] = memory.get(name)
        if name != OURS and side["peak_bytes"] and memory.get(OURS):
            side["ours_is_smaller_by"] = side["peak_bytes"] / memory[OURS]


def report(stage: str, found: dict[str, Any]) -> str:
    """The stage as it is printed."""
    work = (
        f"\n{stage}: batch {found['batch']}, {found['tokens']:.0f} tokens a step, attention dropout "
        f"{found['attention_dropout']:g}, LoRA dropout {found['lora_dropout']:g}; GEMMs alone "
        f"{found['gemm_flops_per_s'] / 1e9:.0f} GFLOP/s"
    )
    header = (
        f"  {'':<26} {'s':>8} {'min':>8} {'max':>8} {'tokens/s':>9} {'GFLOP/s':>9} {'of GEMMs':>9} {'of peak':>8} "
        f"{'MiB':>8}  ours is faster, smaller by"
    )
    lines = [work, header]
    for name, side in found["sides"].items():
        of_peak = "-" if side["of_peak"] is None else f"{100 * side['of_peak']:.1f} %"
        memory = "-" if side["peak_bytes"] is None else f"{side['peak_bytes'] / 2**20:.0f}"
        ratios = [f"{side[key]:.2f} x" for key in ("ours_is_faster_by", "ours_is_smaller_by") if side[key] is not None]
        lines.append(
            f"  {name:<26} {side['seconds']:8.3f} {side['seconds_min']:8.3f} {side['seconds_max']:8.3f} "
            f"{side['tokens_per_s']:9.0f} {side['flops_per_s'] / 1e9:9.1f} {100 * side['of_gemms']:7.1f} % "
            f"{of_peak:>8} {memory:>8}  {', '.join(ratios)}".rstrip()
        )
    lines += [f"  {name:<26} {error}" for name, error in found["peer_errors"].items()]
    whole = sum(found["breakdown_seconds"].values())
    shares = [f"{name} {100 * seconds / whole:.1f} %" for name, seconds in found["breakdown_seconds"].items()]
    lines.append(f"  a step of ours: {', '.join(shares)}")
    losses = found["losses"]
    if "largest_relative_difference" in losses:
        lines.append(
            f"  losses over {len(losses[OURS])} steps without dropout: {losses[OURS][0]:.4f} to "
            f"{losses[OURS][-1]:.4f}, "
            f"largest difference {100 * losses['largest_relative_difference']:.4f} %"
        )
    return "\n".join(lines)


def draw(path: Path, stages: dict[str, Any], title: str) -> None:
    """A row for each stage: tokens/s of all sides, the breakdown of ours, the loss curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.6 * len(stages)), layout="constrained")
    figure.suptitle(title)
    for panels, (stage, found) in zip(figure.subplots(len(stages), 3, squeeze=False), stages.items(), strict=True):
        names = list(found["sides"])
        bars = panels[0].barh(names, [side["tokens_per_s"] for side in found["sides"].values()], color=COLOURS)
        panels[0].bar_label(bars, fmt="%.0f", padding=4)
        panels[0].margins(x=0.15)
        faster = [f"{side['ours_is_faster_by']:.1f} x" for side in found["sides"].values() if side["ours_is_faster_by"]]
        title = ": ".join([f"{stage}, batch {found['batch']}", *([", ".join(faster)] if faster else [])])
        panels[0].set(xlabel="tokens/s, no padding counted", title=title)
        parts = found["breakdown_seconds"]
        panels[1].barh(list(parts), [1e3 * seconds for seconds in parts.values()])
        panels[1].invert_yaxis()
        panels[1].set(xlabel="ms", title="a step of ours")
        for name, style in zip(names, ("-", "--", ":"), strict=False):
            if name in found["losses"]:
                panels[2].plot(found["losses"][name], style, label=name)
        panels[2].set(xlabel="step", title="loss, no dropout")
        panels[2].legend(frameon=False)
    figure.savefig(path, dpi=120)


def run(options: argparse.Namespace, arguments: Sequence[str], device: torch.device) -> int:
    """All stages; the exit status. The JSON is written after each."""
    absent = "--no-peer" if options.no_peer else padded_peer.missing()
    peers = {stage: {} if absent else PEERS[options.peer_recompute[stage]] for stage in options.stages}
    memory = {}  # before this process takes any
    if options.memory:
        memory = {s: {name: memory_in_a_process(arguments, s, name) for name in (OURS, *of)} for s, of in peers.items()}
    name = device_name(device)
    path = options.output / f"train_step_{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        **describe_run(device),
        "threads": torch.get_num_threads(),
        "model": options.shape or options.model,
        "dtype": options.dtype,
        "seed": options.seed,
        "sequence_length": options.sequence_length,
        "micro_batch_tokens": options.micro_batch_tokens,
        "peer": {"absent": absent, "versions": peer_versions(), "attention": "sdpa", "recompute": peers},
        "stages": {},
    }
    print(f"{content['model']} in {options.dtype} on {name}, {content['threads']} threads, {content['versions']}")
    if absent:
        print(f"without {PEER}: {absent}")
    checkpoint = load_checkpoint(options.model, options.shape, DTYPES[options.dtype], device)
    differ = []
    for stage in options.stages:
        work = prepare(stage, checkpoint, device, options)
        found = measure_time(work, peers[stage])
        add_memory(found["sides"], memory.get(stage, {}))
        running = [name for name in peers[stage] if name not in found["peer_errors"]]
        found["losses"] = measure_losses(work, {name: peers[stage][name] for name in running[:1]})  # kept: the same
        print(report(stage, found), flush=True)
        if not found["losses"].get("largest_relative_difference", 0.0) <= LOSS_TOLERANCE:
            differ.append(stage)
        content["stages"][stage] = found
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    else:
        draw(path.with_suffix(".png"), content["stages"], f"{content['model']}, {options.dtype}, {name}")
    print(f"\nwrote {path}")
    for stage in differ:
        print(f"FAILED  {stage}: the losses of the two sides differ by more than {100 * LOSS_TOLERANCE:g} %")
    return 1 if differ else 0


def peer_versions() -> dict[str, str]:
    """Of the packages that are installed."""
    installed = [name for name in padded_peer.PACKAGES if importlib.util.find_spec(name) is not None]
    return {name: importlib.metadata.version(name) for name in installed}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what depends on the device is filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", default=PACKAGED_MODEL, help="a directory, a .gguf file or a hub id")
    source.add_argument("--shape", choices=SHAPES, help="instead: a random model of this shape")
    parser.add_argument("--stage", choices=STAGES, help="default: both")
    parser.add_argument("--steps", type=int, help="turns that are timed")
    parser.add_argument("--warmup", type=int, help="turns before them")
    parser.add_argument("--loss-steps", type=int, help="of the loss curves (default: 20)")
    parser.add_argument("--mntp-batch", type=int, help="blocks a step")
    parser.add_argument("--simcse-batch", type=int, help="sentences a step")
    parser.add_argument("--sequence-length", type=int, help="tokens of an MNTP block (default: 512)")
    parser.add_argument("--micro-batch-tokens", type=int, help="of ours in MNTP (default: 1024 on a CPU, else 8192)")
    parser.add_argument("--attention-dropout", type=float, default=0.3, help="of SimCSE's timed steps")
    parser.add_argument("--lora-dropout", type=float, default=0.05, help="of the timed steps")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--peer-recompute", choices=PEERS, help="activation checkpointing; both = two peers")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--quick", action="store_true", help="few steps on tiny batches")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--memory", action="store_true", help="also peak memory, in processes of their own")
    parser.add_argument("--memory-of", choices=(OURS, *PEERS["both"]), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where the files are written")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device}: not usable here ({first_line(error)})")
    on_gpu = torch.device(options.device).type == "cuda"
    defaults = {"loss_steps": 20, "sequence_length": 512, "micro_batch_tokens": 8192 if on_gpu else 1024}
    defaults |= (ON_GPU if on_gpu else ON_CPU) | (QUICK if options.quick else {})
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    least = {"steps": 1, "warmup": 0, "loss_steps": 1, "mntp_batch": 1, "simcse_batch": 2, "sequence_length": 2}
    for name, bound in (least | {"micro_batch_tokens": 1, "seed": 0}).items():
        if getattr(options, name) < bound:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least {bound}")
    for name in ("attention_dropout", "lora_dropout"):
        if not 0.0 <= getattr(options, name) < 1.0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected a probability below 1")
    if not options.learning_rate > 0.0:
        parser.error(f"--learning-rate is {options.learning_rate}, expected a positive number")
    options.stages = STAGES if options.stage is None else (options.stage,)
    recompute = {"mntp": "on" if on_gpu else "both", "simcse": "on"}
    options.peer_recompute = {stage: options.peer_recompute or recompute[stage] for stage in STAGES}
    options.batch = {"mntp": options.mntp_batch, "simcse": options.simcse_batch}
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    device = torch.device(options.device)
    try:
        if options.memory_of is None:
            return run(options, arguments, device)
        checkpoint = load_checkpoint(options.model, options.shape, DTYPES[options.dtype], device)
        work = prepare(options.stages[0], checkpoint, device, options)
        print(json.dumps({"peak_bytes": measure_memory(work, options.memory_of)}))
    except BivecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
