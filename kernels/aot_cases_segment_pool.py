"""The calls of ``segment_pool`` that ``kernels/aot.py`` checks: 24 kernels.

python -m bivec.kernels.aot --check --cases bivec.kernels.aot_cases_segment_pool:cases
"""

from __future__ import annotations

from functools import partial

import torch

from bivec.kernels.aot import Case
from bivec.kernels.segment_pool_triton import backward, forward

TOKENS, SPANS, DIM = 4096, 128, 4096
VARIANTS = (  # label, dtype, weighted, one span a sequence
    ("bf16 mean sequences", torch.bfloat16, False, True),
    ("fp16 weighted spans", torch.float16, True, False),
    ("fp32 weighted spans", torch.float32, True, False),
)


def run(dtype: torch.dtype, weighted: bool, in_order: bool) -> None:
    """Forward and backward, with the int32 bounds of sequences or the int64 bounds of spans, on the meta device."""
    hidden = torch.empty(TOKENS, DIM, dtype=dtype, device="meta")
    bounds = torch.empty(SPANS, dtype=torch.int32 if in_order else torch.int64, device="meta")
    out = forward(hidden, bounds, bounds, weighted)
    backward(out, bounds, bounds, TOKENS, weighted, in_order)


def cases() -> list[Case]:
    """Every row of the table, equal and rising weights, both orders."""
    return [
        Case("segment_pool", label, partial(run, dtype, weighted, in_order), frozenset())
        for label, dtype, weighted, in_order in VARIANTS
    ]
