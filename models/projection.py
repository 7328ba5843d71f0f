"""Projections of one input: q, k and v, or gate and up."""

from __future__ import annotations

from torch import Tensor, nn


def project(x: Tensor, *projections: nn.Module) -> tuple[Tensor, ...]:
    """``tuple(projection(x) for projection in projections)``, at once where a wrapper of them can.

    A class of modules that wrap a projection (LoRA) may have a static method ``project_jointly(x, modules)``, which
    reads x once, keeps it once for backward and sums its gradient in one buffer. It is called if all are of that class.
    """
    first = type(projections[0])
    jointly = getattr(first, "project_jointly", None)
    if jointly is not None and all(type(projection) is first for projection in projections):
        return jointly(x, projections)
    return tuple(projection(x) for projection in projections)
