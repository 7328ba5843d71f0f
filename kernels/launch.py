"""How every Triton kernel of bivec is launched: which architecture, and one door that all launches pass.

The door lets ``kernels/aot.py`` see the launches of a public function without a GPU: inside :func:`recording`, tensors
may be on the "meta" device, the architecture is the one asked for, and launches are noted instead of made. What is
compiled ahead of time is therefore exactly what a user's call launches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

INTERPRETER_ARCHITECTURE = "sm_90"  # whose tiles the interpreter runs


@dataclass(frozen=True)
class Launch:
    """One kernel launch."""

    kernel: Any  # triton.runtime.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by parameter name: tensors, numbers, constexprs
    num_warps: int
    num_stages: int


@dataclass
class Recording:
    """What :func:`recording` has noted so far."""

    architecture: str  # "sm_80" | "sm_90" | "sm_100" | "gfx942"
    launches: list[Launch] = field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("bivec_recording", default=None)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter: ``TRITON_INTERPRET=1``, which Triton reads as they are defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Notes the launches made inside instead of making them, as they would be made on ``architecture``."""
    record = Recording(architecture)
    token = _recording.set(record)
    try:
        yield record.launches
    finally:
        _recording.reset(token)


def architecture(device: torch.device) -> str:
    """The architecture that launches on ``device`` are for, such as "sm_90" or "gfx942".

    Raises:
        RuntimeError: the device is not a GPU, and the interpreter is off.
    """
    record = _recording.get()
    if record is not None:
        return record.architecture
    if device.type == "cuda":
        if torch.version.hip:
            return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    if interpreting():
        return INTERPRETER_ARCHITECTURE
    raise RuntimeError(f"no Triton architecture for tensors on {device}")


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """A matrix whose columns are neighbours, as kernels that take one stride want it: ``x``, or a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], *, num_warps: int, num_stages: int) -> None:
    """Launches ``kernel`` on the current stream of the tensors' device; an empty grid launches nothing."""
    record = _recording.get()
    if record is not None:
        record.launches.append(Launch(kernel, grid, arguments, num_warps, num_stages))
    elif min(grid) > 0:
        device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
        if device.type == "cuda":
            with torch.cuda.device(device):
                kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
        else:
            kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
