"""The GEMMs of the fused losses: products in fp32 of half operands as they are, where the vendor's library has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def multiplies_halves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the library multiplies ``dtype`` into fp32 there; elsewhere operands are converted to fp32 first.

    ROCm's builds refuse it ("gemm input type at::BFloat16 and output type float is not supported", seen in 2.9), and so
    does every build for fp16 where the user allows fp16 accumulators.
    """
    if device.type != "cuda" or torch.version.hip or dtype not in (torch.float16, torch.bfloat16):
        return False
    return dtype != torch.float16 or not torch.backends.cuda.matmul.allow_fp16_accumulation


def multiply_(out: Tensor, a: Tensor, b: Tensor, *, add: bool, alpha: float = 1.0) -> None:
    """``out = alpha * a @ b``, or ``out += alpha * a @ b``, of matrices or batches of them.

    Args:
        out: fp32; what it holds is not read unless ``add``, NaN included.
        a: fp16, bf16 or fp32; a copy is made of what has to be converted, so hand in tiles.
        b: likewise.
        add: to what ``out`` holds.
        alpha: factor of the product.
    """
    product: Callable[..., Tensor] = torch.addmm if out.dim() == 2 else torch.baddbmm
    options: dict[str, Any] = {"beta": float(add), "alpha": alpha, "out": out}
    if a.dtype == b.dtype and multiplies_halves(a.dtype, a.device):
        options["out_dtype"] = torch.float32
    else:
        a, b = a.float(), b.float()
    product(out, a, b, **options)
