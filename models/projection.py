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
        joint: tuple[Tensor, ...] = jointly(x, projections, backend)
        return joint
    plain = _fusible(x, *projections, backend=backend)
    if plain is not None:
        return tuple(linear_torch.linear(x, projection.weight, projection.bias) for projection in plain)
    return tuple(projection(x) for projection in projections)


def project_gated(x: Tensor, gate: nn.Module, up: nn.Module, *, backend: str | None) -> Tensor | None:
    """``silu(gate(x)) * up(x)`` with no pass of its own; None where that cannot be done."""
    plain = _fusible(x, gate, up, backend=backend)
    if plain is None:
        return None
    activated = linear_torch.linear(x, plain[0].weight, plain[0].bias, silu=True)
    return linear_torch.linear(x, plain[1].weight, plain[1].bias, factor=activated)


def project_onto(
    stream: Tensor | None, x: Tensor, projection: nn.Module, *, backend: str | None
) -> tuple[Tensor | None, Tensor | None]:
    """The residual stream and ``projection(x)``, still to be added to it; or their sum and None.

    No stream: (None, ``projection(x)``), for an update that is changed before it is added.
    """
    plain = None if stream is None else _fusible(x, projection, backend=backend, stream=stream)
    if plain is not None:
        return linear_torch.linear(x, plain[0].weight, plain[0].bias, addend=stream), None
    (update,) = project(x, projection, backend=backend)
    return stream, update


def _fusible(
    x: Tensor, *projections: nn.Module, backend: str | None, stream: Tensor | None = None
) -> list[nn.Linear] | None:
    """The projections, if nobody but us would see their products; else None.

    That is: plain layers without hooks, no graph, the torch backend.
    """
    plain = [p for p in projections if type(p) is nn.Linear and "forward" not in vars(p)]
    hooked = any(p._forward_hooks or p._forward_pre_hooks for p in plain)  # noqa: SLF001 - no public way to ask
    if hooked or len(plain) < len(projections):
        return None
    parameters = [parameter for p in plain for parameter in (p.weight, p.bias)]
    applies = linear_torch.applies(x, stream, *parameters) and resolve(backend, "linear", x.device) == "torch"
    return plain if applies else None
