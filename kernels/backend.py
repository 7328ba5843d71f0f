"""The one place that chooses an implementation.

Every public function of ``bivec.kernels`` takes ``backend=None | "triton" | "torch"`` and asks :func:`resolve`. The
order is: the argument, the environment variable ``BIVEC_BACKEND``, the default. There is no silent fallback: a choice
that cannot be honoured raises and says why.
"""

from __future__ import annotations

import os

BACKENDS = ("torch", "triton")
TRITON_OPS: frozenset[str] = frozenset()  # the ops whose Triton kernels exist


class BackendError(RuntimeError):
    """The requested backend cannot run this op."""


def resolve(backend: str | None, op: str) -> str:
    """Returns the backend that runs ``op``.

    Args:
        backend: the caller's ``backend=`` argument; None asks the environment, then the default ("torch").
        op: name of the public function, for the message.

    Raises:
        ValueError: a backend of that name does not exist.
        BackendError: the backend exists but has no implementation of ``op``.
    """
    source = "backend=" if backend is not None else "the environment variable BIVEC_BACKEND="
    choice = backend if backend is not None else os.environ.get("BIVEC_BACKEND") or "torch"
    if choice not in BACKENDS:
        raise ValueError(f"{op}: {source}{choice!r} is not a backend; choose one of {', '.join(BACKENDS)}")
    if choice == "triton" and op not in TRITON_OPS:
        raise BackendError(
            f'{op}: {source}"triton" was asked for, but bivec has no Triton kernel for it yet; use "torch"'
        )
    return choice
