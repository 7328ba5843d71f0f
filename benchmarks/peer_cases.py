"""A peer's Triton attention under our compiler: the varlen kernels of flash-linear-attention, as it launches them.

    pip install --no-deps fla-core einops
    PYTHONPATH=benchmarks python -m bivec.kernels.aot --cases peer_cases:cases --arch sm_90

Its kernels are causal, one query head a program: dK and dV of a group are written for every query head and added up
by a reduction afterwards. Tiles and warps are those that ``fla/ops/attn/parallel.py`` (0.6.0) uses on Hopper.
"""

from __future__ import annotations

from functools import partial

import torch
from fla.ops.attn import parallel

from bivec.kernels.aot import Case
from bivec.kernels.launch import launch

TOKENS, HEADS, KV_HEADS, BLOCK_M, BLOCK_N, WARPS = 4096, 32, 8, 128, 64, 8


def run(head_dim: int) -> None:
    """Forward, dQ, and dK/dV, in bf16, grouped-query, varlen, without gate, sink and window."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k = empty(1, TOKENS, HEADS, head_dim), empty(1, TOKENS, KV_HEADS, head_dim)
    lse = empty(1, TOKENS, HEADS, dtype=torch.float32)
    shared = {
        "q": q,
        "k": k,
        "v": k,
        "lse": lse,
        "g_cumsum": None,
        "cu_seqlens": empty(33, dtype=torch.int64),
        "chunk_indices": empty(64, 2, dtype=torch.int64),
        "scale": head_dim**-0.5,
        "T": TOKENS,
        "W": None,
        "B": 1,
        "H": KV_HEADS,
        "HQ": HEADS,
        "G": HEADS // KV_HEADS,
        "K": head_dim,
        "V": head_dim,
        "BT": BLOCK_M,
        "BS": BLOCK_N,
        "BK": head_dim,
        "BV": head_dim,
        "USE_G": False,
        "USE_WINDOW": False,
        "IS_VARLEN": True,
    }
    gradient = {"delta": lse, "do": q}
    expanded = empty(1, TOKENS, HEADS, head_dim, dtype=torch.float32)
    launches = (
        (parallel.parallel_attn_fwd_kernel, {"o": q, "sink_bias": None, "USE_SINK_BIAS": False}),
        (parallel.parallel_attn_bwd_kernel_dq, {"dq": expanded, "dg_cumsum": None} | gradient),
        (parallel.parallel_attn_bwd_kernel_dkv, {"dk": expanded, "dv": expanded, "dg_cumsum": None} | gradient),
    )
    for heuristics, own in launches:
        launch(heuristics.fn, (TOKENS // BLOCK_M, HEADS), shared | own, num_warps=WARPS, num_stages=3)


def cases() -> list[Case]:
    """For ``python -m bivec.kernels.aot --cases``."""
    return [Case("fla", f"bf16 d{head_dim} g4 causal", partial(run, head_dim), frozenset()) for head_dim in (64, 128)]
