"""Where a training step spends its time: every op of torch's profiler under one of a few headings.

An op counts under the heading of the innermost op around it that has one: a product inside attention is attention's,
an addition inside a norm the norm's. Products with the frozen weights, the LM head's included, are "GEMMs"; those in
which one side has the rank of the adapter, or of the two or three projections that share an input, are "LoRA". What no
op accounts for is Python, and on a GPU idle time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler says on stderr that it starts and stops

GEMMS, LORA, ATTENTION, NORMS, ROTARY, SWIGLU, LOSS, OPTIMISER, REST = HEADINGS = (
    "GEMMs",
    "LoRA",
    "attention",
    "norms",
    "rotary",
    "swiglu",
    "loss",
    "optimiser",
    "rest",
)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_")
MARKS = {  # parts of the names of ops, autograd functions and custom ops
    OPTIMISER: ("optimizer.", "_foreach", "_fused_adam"),
    LOSS: ("crossentropy", "cross_entropy", "infonce", "info_nce", "segmentpool", "segment_pool"),
    ATTENTION: ("attention", "_permute"),
    NORMS: ("rmsnorm", "rms_norm"),
    ROTARY: ("rotary",),
    SWIGLU: ("gatedunit", "swiglu", "geglu"),
    LORA: ("lora",),
}
UNNAMED = "Python and gaps"


def heading(event: Any, rank: int) -> str:
    """Of one op of the profile."""
    around = enclosing(event)
    if event.name in PRODUCTS and around in (LORA, LOSS, REST):
        sides = {side for shape in event.input_shapes if len(shape) == 2 for side in shape}
        return LORA if sides & {rank, 2 * rank, 3 * rank} else GEMMS
    return around


def enclosing(event: Any) -> str:
    """The heading of the innermost op that has one, from ``event`` outwards."""
    while event is not None:
        name = event.name.lower()
        for found, marks in MARKS.items():
            if any(mark in name for mark in marks):
                return found
        event = event.cpu_parent
    return REST


def breakdown(run: Callable[[], object], device: torch.device, rank: int) -> dict[str, float]:
    """Runs it once under the profiler.

    Args:
        run: the step.
        device: whose time is counted.
        rank: of the LoRA matrices.

    Returns:
        Seconds under every heading, and what is left of the step's time.
    """
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profile:
        started = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    found = dict.fromkeys(HEADINGS, 0.0)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            found[heading(event, rank)] += own / 1e6
    return found | {UNNAMED: max(0.0, seconds - sum(found.values()))}
