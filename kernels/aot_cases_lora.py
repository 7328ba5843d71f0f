"""The calls of ``lora_linear`` and ``lora_linears`` that ``kernels/aot.py`` checks.

python -m bivec.kernels.aot --check --cases bivec.kernels.aot_cases_lora:cases
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bivec.kernels.aot import Case
from bivec.kernels.lora_triton import backward, forward

TOKENS, IN, OUT = 4096, 4096, 1024
KERNELS = frozenset({"lora_project", "lora_update", "lora_gradient"})
PASSES = ("forward", "backward")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CALLS: dict[
    str, tuple[Any, ...]
] = {  # dtypes of the base and of the LoRA matrices, rank, projections, dropout, and what differs from a whole step
    "bf16 fp32 r16 x3 dropout": (BF16, FP32, 16, 3, 0.05, {}),
    "bf16 bf16 r16": (BF16, BF16, 16, 1, 0.0, {"passes": ("backward",)}),
    "fp32 fp32 r16 x2 dropout": (FP32, FP32, 16, 2, 0.05, {"passes": ("backward",), "want_bs": False}),
}
OTHER_CALLS: dict[str, tuple[Any, ...]] = {
    "bf16 fp32 r16": (BF16, FP32, 16, 1, 0.0, {}),
    "bf16 fp32 r64 x2 dropout": (BF16, FP32, 64, 2, 0.05, {}),
    "bf16 bf16 r64 x2 dropout": (BF16, BF16, 64, 2, 0.05, {}),
    "fp16 fp32 r16 x3 dropout": (FP16, FP32, 16, 3, 0.05, {}),
    "fp16 fp16 r16 dropout": (FP16, FP16, 16, 1, 0.05, {}),
    "fp32 fp32 r16 dropout": (FP32, FP32, 16, 1, 0.05, {}),
    "fp32 fp32 r64": (FP32, FP32, 64, 1, 0.0, {}),
}


def run(
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    rank: int,
    projections: int,
    dropout_p: float,
    *,
    passes: Sequence[str] = PASSES,
    want_bs: bool = True,
) -> None:
    """A step with a frozen base, or one pass of it, on the meta device."""

    def empties(*shape: int, dtype: torch.dtype = dtype) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=dtype, device="meta") for _ in range(projections)]

    (x, *_), weights, biases = empties(TOKENS, IN), empties(OUT, IN), empties(OUT)
    lora_as, lora_bs = empties(rank, IN, dtype=lora_dtype), empties(OUT, rank, dtype=lora_dtype)
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    token_ids = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    noise = seed, token_ids, 2.0, dropout_p
    if "forward" in passes:
        forward(x, weights, biases, lora_as, lora_bs, *noise)
    if "backward" in passes:
        h = torch.empty(TOKENS, projections * rank, dtype=torch.float32, device="meta")
        wanted = [True] + [want for want in (False, False, True, want_bs) for _ in range(projections)]
        backward(empties(TOKENS, OUT), x, weights, lora_as, lora_bs, h, *noise, wanted)


def cases() -> list[Case]:
    """Every row of the table, with and without a mask, and both layouts of a matrix."""
    return _cases(CALLS)


def all_cases() -> list[Case]:
    """:func:`cases`, the other masks and layouts in every dtype, and a rank of 64: what choosing a row compiles."""
    return _cases(CALLS | OTHER_CALLS)


def _cases(calls: dict[str, tuple[Any, ...]]) -> list[Case]:
    return [
        Case("lora", label, partial(run, dtype, *others, **options), frozenset() if dtype == FP32 else KERNELS)
        for label, (dtype, *others, options) in calls.items()
    ]
