"""The calls that ``kernels/aot.py`` checks: every default configuration, each option alone, and all together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bivec.kernels.aot import Case
from bivec.kernels.attention_long import long_forward
from bivec.kernels.attention_long_backward import long_backward
from bivec.kernels.attention_short import MAX_TILE, short_backward, short_forward
from bivec.kernels.attention_tiles import Problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPTIONS = {
    "plain": {},
    "causal": {"right": 0},
    "window": {"left": 64, "right": 64},
    "softcap": {"softcap": 50.0},
    "dropout": {"dropout_p": 0.1},
    "all": {"left": 64, "right": 0, "softcap": 50.0, "dropout_p": 0.1},
}
SHORT_LENGTHS = (16, 32, 64, 128)
LONG_KERNELS = frozenset({"attention_forward", "attention_backward_q", "attention_backward_kv"})
SHORT_KERNELS = frozenset({"attention_short_forward", "attention_short_backward"})


def attention_problem(
    dtype: torch.dtype,
    head_dim: int,
    group: int = 4,
    *,
    left: int | None = None,
    right: int | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> Problem:
    """A call of shapes that LLaMA- and Mistral-style models have, on the meta device."""
    tokens, kv_heads, sequences = 4096, 8, 32

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    k = empty(tokens, kv_heads, head_dim, dtype=dtype)
    cu_seqlens, order = empty(sequences + 1, dtype=torch.int32), empty(sequences, dtype=torch.int32)
    return Problem(
        q=empty(tokens, kv_heads * group, head_dim, dtype=dtype),
        k=k,
        v=k,
        cu_seqlens=cu_seqlens,
        starts=cu_seqlens,
        order=order,
        softmax_scale=head_dim**-0.5,
        softcap=softcap,
        left=left,
        right=right,
        dropout_p=dropout_p,
        seed=empty(1, dtype=torch.int64),
        sample_ids=empty(sequences, dtype=torch.int64),
    )


def run_long(problem: Problem) -> None:
    """Forward and backward on the long path."""
    out, lse = long_forward(problem)
    long_backward(problem, out, lse, out)


def run_short(problem: Problem, length: int) -> None:
    """Forward and backward on the short path."""
    out, _ = short_forward(problem, length)
    short_backward(problem, length, out)


def _attention(
    family: str, kernels: frozenset[str], call: Callable[[Problem], None], place: str, **shape: int
) -> list[Case]:
    """bf16 with every option; fp16, whose backward differs, and fp32 with none and with all."""
    found = []
    for dtype_name, dtype in DTYPES.items():
        for option in OPTIONS if dtype_name == "bf16" else ("plain", "all"):
            problem = attention_problem(dtype, **shape, **OPTIONS[option])
            matmul = kernels if dtype_name != "fp32" else frozenset()
            found.append(Case(family, f"{dtype_name} {place} {option}", partial(call, problem), matmul))
    return found


def cases() -> list[Case]:
    """All cases of all kernels."""
    found = []
    for head_dim in (64, 128, 256):
        found += _attention("attention_long", LONG_KERNELS, run_long, f"d{head_dim} g4", head_dim=head_dim)
        for length in SHORT_LENGTHS:
            if length * head_dim <= MAX_TILE:
                call = partial(run_short, length=length)
                place = f"d{head_dim} g4 L{length}"
                found += _attention("attention_short", SHORT_KERNELS, call, place, head_dim=head_dim)
    for head_dim, group in ((80, 1), (96, 3)):  # padded head dims, other groups, on the rows of 128
        problem = attention_problem(torch.bfloat16, head_dim, group, **OPTIONS["all"])
        place = f"bf16 d{head_dim} g{group}"
        found.append(Case("attention_long", f"{place} all", partial(run_long, problem), LONG_KERNELS))
        short = partial(run_short, problem, 64)
        found.append(Case("attention_short", f"{place} L64 all", short, SHORT_KERNELS))
    return found
