"""The calls of ``rms_norm``, ``apply_rotary``, ``swiglu`` and ``geglu`` that ``kernels/aot.py`` checks: 21 kernels.

python -m bivec.kernels.aot --check --cases bivec.kernels.aot_cases_layers:cases
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bivec.kernels import rms_norm_triton, rotary_triton, swiglu_triton
from bivec.kernels.aot import Case

TOKENS, POSITIONS = 4096, 4096
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def run_rms_norm(
    dtype: torch.dtype, dim: int, residual: bool, d_total: bool, want_dweight: bool, passes: str = "both"
) -> None:
    """Forward, backward or both on the meta device."""
    x, weight = torch.empty(TOKENS, dim, dtype=dtype, device="meta"), torch.empty(dim, dtype=dtype, device="meta")
    if passes != "backward":
        rms_norm_triton.forward(x, x if residual else None, weight, 1e-5, 0.0)
    if passes != "forward":
        rstd = x.new_empty(TOKENS, dtype=torch.float32)
        rms_norm_triton.backward(x, x if d_total else None, x, weight, rstd, 0.0, want_dweight)


def run_rotary(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    """q and k as slices of one projection; in place and in either direction it is the same kernel."""
    qkv = torch.empty(TOKENS, heads + 2 * kv_heads, head_dim, dtype=dtype, device="meta")
    table = torch.empty(POSITIONS, head_dim // 2, device="meta")
    position_ids = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    rotary_triton.rotate(qkv[:, :heads], qkv[:, heads : heads + kv_heads], table, table, position_ids, False)


def run_gated_unit(dtype: torch.dtype, passes: str = "both") -> None:
    """gate and up as halves of one projection; the activation is not part of the kernel."""
    gate, up = torch.empty(TOKENS, 2 * 14336, dtype=dtype, device="meta").chunk(2, dim=-1)
    out = torch.empty(gate.shape, dtype=dtype, device="meta")
    if passes != "backward":
        swiglu_triton.forward(gate, up, "silu")
    swiglu_triton.backward(out, gate, up, out, out, "silu")


def cases() -> list[Case]:
    """Every row of the tables; of rms_norm each option alone, none and all, the longest tile, and rows that do not fit.

    fp16 differs from bf16 by a cast only: it is compiled with all options, backward.
    """
    norms: tuple[tuple[Any, ...], ...] = (  # dtype, D, residual, gradient of the sum, dweight, passes
        ("bf16 d4096 plain", BF16, 4096, False, False, False),
        ("bf16 d4096 residual", BF16, 4096, True, True, False),
        ("bf16 d4096 dweight", BF16, 4096, False, False, True, "backward"),
        ("bf16 d8192 all", BF16, 8192, True, True, True, "backward"),
        ("bf16 d16384 all", BF16, 16384, True, True, True),
        ("fp16 d4096 all", FP16, 4096, True, True, True, "backward"),
        ("fp32 d4096 all", FP32, 4096, True, True, True),
        ("fp32 d576 all", FP32, 576, True, True, True, "backward"),
    )
    rotations: tuple[tuple[Any, ...], ...] = (
        ("bf16 h32/8 d128", BF16, 32, 8, 128),
        ("bf16 h28/4 d80", BF16, 28, 4, 80),
        ("fp16 h32/32 d64", FP16, 32, 32, 64),
        ("fp32 h9/3 d64", FP32, 9, 3, 64),
    )
    units: tuple[tuple[Any, ...], ...] = (("bf16", BF16), ("fp16", FP16, "backward"), ("fp32", FP32))
    return [
        *(Case("rms_norm", label, partial(run_rms_norm, *options), frozenset()) for label, *options in norms),
        *(Case("rotary", label, partial(run_rotary, *options), frozenset()) for label, *options in rotations),
        *(Case("swiglu", label, partial(run_gated_unit, *options), frozenset()) for label, *options in units),
    ]
