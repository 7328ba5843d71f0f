"""Linear layers of a CPU forward that keeps no graph, with what follows the product done in the same pass.

    linear      x Wᵀ + b          silu(x Wᵀ + b)          (x Wᵀ + b) · factor          (x Wᵀ + b) + addend

oneDNN applies what follows to every tile of the result while it is in the cache, so a gated unit or a residual addition
costs no pass over memory. Its fp32 products, made for AVX-512 on every vendor's CPU, are also faster than MKL's on AMD
(EPYC 9004, one thread, a layer of SmolLM2-135M without attention and norms, ms; torch = ``F.linear`` and elementwise
passes):

    ======  =====  ======
    tokens  torch  oneDNN
    ======  =====  ======
       160   13.1    12.1
       512   41.8    36.9
      1150   93.6    81.8
      3000  242.8   209.8
    ======  =====  ======

oneDNN compiles a kernel for each new number of rows, 1 ms for each of a layer's six kinds of product, once for all
layers. Few rows win no more than that, but go the same way: a row of its product is the same whatever rows are beside
it, while two libraries round differently, and a decoder with large activations makes much of that (SmolLM2-135M, a
sentence alone against the same in a batch, with MKL below 128 rows: 8e-5 of the embedding's length, now 0).

The operators are those that torch's own compiler (Inductor) emits for a frozen linear layer; :func:`available` asks
whether this build has them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def available() -> bool:
    """Whether this build of torch has oneDNN's fused linear layers, and they are not switched off."""
    usable = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return usable and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def applies(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether :func:`linear` can run here, and is worth it.

    Args:
        x: [T, in], the input of the layers.
        parameters: their weights and biases.
    """
    operands = [x, *(p for p in parameters if p is not None)]
    return (
        x.dim() == 2
        and x.shape[0] > 0
        and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in operands)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in operands))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # Inductor fuses by itself
        and available()
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu: bool = False,
    factor: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` and at most one of: silu of it, times ``factor``, plus ``addend``. Keeps no graph.

    Args:
        x: [T, in] fp32 on the CPU, as all operands; see :func:`applies`.
        weight: [out, in].
        bias: [out].
        silu: apply ``silu``.
        factor: [T, out].
        addend: [T, out].

    Returns:
        [T, out] fp32.

    Raises:
        ValueError: more than one of ``silu``, ``factor`` and ``addend``.
    """
    if silu + (factor is not None) + (addend is not None) > 1:
        raise ValueError("linear: give at most one of silu, factor and addend")
    if x.shape[0] == 1:  # a row alone is a matrix times a vector to oneDNN, added up in another order
        factor, addend = (None if y is None else y.expand(2, -1) for y in (factor, addend))
        return linear(x.expand(2, -1), weight, bias, silu=silu, factor=factor, addend=addend)[:1]
    op = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 - Inductor's operator has no public name
    x, weight = x.contiguous(), weight.contiguous()
    out: Tensor
    with torch.no_grad():
        if factor is not None:
            out = op.binary(x, factor.contiguous(), weight, bias, "mul")
        elif addend is not None:
            out = op.binary(x, addend.contiguous(), weight, bias, "add")
        else:
            out = op(x, weight, bias, "swish" if silu else "none", [], "")
    return out
