"""Projections of one input: q, k and v, or gate and up."""

from __future__ import annotations

from torch import Tensor, nn


def project(x: Tensor, *projections: nn.Module, backend: str | None) -> tuple[Tensor, ...]:
    """``tuple(projection(x) for projection in projections)``, at once where a wrapper of them can.

    A class of modules that wrap a projection (LoRA) may have a static method ``project_jointly(x, modules, backend)``,
    which reads x once, keeps it once for backward, sums its gradient in one buffer, and runs on the backend that the
    model was asked for. It is called if all are of that class.
    """
    first = type(projections[0])
    jointly = getattr(first, "project_jointly", None)
    if jointly is not None and all(type(projection) is first for projection in projections):
        return jointly(x, projections, backend)
    return tuple(projection(x) for projection in projections)
