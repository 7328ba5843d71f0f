"""The one place that chooses an implementation.

Every public function of ``bivec.kernels`` takes ``backend=None | "triton" | "torch"`` and asks :func:`resolve`. The
order is: the argument, the environment variable ``BIVEC_BACKEND``, the default, which is "triton" on a GPU where triton
is installed, and "torch" elsewhere. There is no silent fallback: a choice that cannot be honoured raises and says why.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from bivec.kernels.launch import interpreting

BACKENDS = ("torch", "triton")
TRITON_INSTALLED = find_spec("triton") is not None
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of what the Triton kernels read


class BackendError(RuntimeError):
    """The requested backend cannot run this op."""


def autocast_kind(x: Tensor) -> str:
    """The device for ``torch.autocast``, which knows no tensors without values ("meta")."""
    return "cpu" if x.device.type == "meta" else x.device.type


def checks_values(device: torch.device) -> bool:
    """Whether the values of tensors on ``device`` are checked: on a CPU, and where ``BIVEC_CHECK=1`` asks for it.

    Reading them stalls a GPU, and cannot be traced by torch.compile.
    """
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get("BIVEC_CHECK", "0") == "1"


def check_triton_dtypes(op: str, **operands: Tensor | None) -> None:
    """Refuses what the Triton kernels cannot read.

    Args:
        op: name of the public function.
        operands: by their names in it.

    Raises:
        BackendError: the dtype of one of them.
    """
    for name, operand in operands.items():
        if operand is not None and operand.dtype not in TRITON_DTYPES:
            raise BackendError(
                f"{op}: the Triton kernels take fp16, bf16 and fp32, got {name} of {operand.dtype}; convert it or use "
                'backend="torch"'
            )


def resolve(backend: str | None, op: str, device: torch.device) -> str:
    """Returns the backend that runs ``op``; arguments and errors as :func:`explain`."""
    return explain(backend, op, device)[0]


def explain(backend: str | None, op: str, device: torch.device) -> tuple[str, str]:
    """The backend that runs ``op``, and why.

    Args:
        backend: the caller's ``backend=`` argument; None asks the environment, then the default.
        op: name of the public function.
        device: where its tensors are.

    Raises:
        ValueError: a backend of that name does not exist.
        BackendError: the backend cannot run it on ``device``.
    """
    source = "backend=" if backend is not None else "the environment variable BIVEC_BACKEND="
    choice = backend if backend is not None else os.environ.get("BIVEC_BACKEND")
    if not choice and backend is None:
        if device.type != "cuda":
            return "torch", "the default on a CPU, where Triton runs in its interpreter only"
        return ("triton", "the default on a GPU") if TRITON_INSTALLED else ("torch", "triton is not installed")
    if choice not in BACKENDS:
        raise ValueError(f"{op}: {source}{choice!r} is not a backend; choose one of {', '.join(BACKENDS)}")
    if choice == "triton":
        asked = f'{op}: {source}"triton" was asked for, but'
        if not TRITON_INSTALLED:
            raise BackendError(f'{asked} triton is not installed; pip install triton, or use "torch"')
        if device.type != "cuda" and not interpreting():
            raise BackendError(
                f"{asked} the tensors are on {device}, where Triton runs only in its interpreter: "
                'set TRITON_INTERPRET=1 before Python starts, or use "torch"'
            )
    return choice, f"{source}{choice}"
