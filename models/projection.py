"""Projections of one input: q, k and v, or gate and up; and back onto the residual stream.

Where no graph is kept, on a CPU, plain projections are ``kernels/linear_torch.py``'s: the gated unit and the residual
addition are then done in the pass of the product.
"""

from __future__ import annotations

from torch import Tensor, nn

from bivec.kernels import linear_torch
from bivec.kernels.backend import resolve


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
    if _fused(x, *projections, backend=backend):
        return tuple(linear_torch.linear(x, projection.weight, projection.bias) for projection in projections)
    return tuple(projection(x) for projection in projections)


def project_gated(x: Tensor, gate: nn.Module, up: nn.Module, *, backend: str | None) -> Tensor | None:
    """``silu(gate(x)) * up(x)`` with no pass of its own; None where that cannot be done."""
    if not _fused(x, gate, up, backend=backend):
        return None
    activated = linear_torch.linear(x, gate.weight, gate.bias, silu=True)
    return linear_torch.linear(x, up.weight, up.bias, factor=activated)


def project_onto(
    stream: Tensor | None, x: Tensor, projection: nn.Module, *, backend: str | None
) -> tuple[Tensor | None, Tensor | None]:
    """The residual stream and ``projection(x)``, still to be added to it; or their sum and None.

    No stream: (None, ``projection(x)``), for an update that is changed before it is added.
    """
    if stream is not None and _fused(x, projection, backend=backend, stream=stream):
        return linear_torch.linear(x, projection.weight, projection.bias, addend=stream), None
    (update,) = project(x, projection, backend=backend)
    return stream, update


def _fused(x: Tensor, *projections: nn.Module, backend: str | None, stream: Tensor | None = None) -> bool:
    """Whether nobody but us would see the products: plain layers without hooks, no graph, the torch backend."""
    if not all(type(p) is nn.Linear and "forward" not in vars(p) for p in projections):
        return False
    if any(p._forward_hooks or p._forward_pre_hooks for p in projections):
        return False
    parameters = [parameter for p in projections for parameter in (p.weight, p.bias)]
    return linear_torch.applies(x, stream, *parameters) and resolve(backend, "linear", x.device) == "torch"
