"""The calls of ``linear_cross_entropy`` that ``kernels/aot.py`` checks.

python -m bivec.kernels.aot --check --cases bivec.kernels.aot_cases_cross_entropy:cases
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bivec.kernels.aot import Case
from bivec.kernels.linear_cross_entropy_triton import sweep

ROWS, WIDTH = 64, 128  # the kernel sees neither
CALLS: dict[
    str, tuple[torch.dtype, int, dict[str, Any]]
] = {  # dtype, vocabulary, and what differs from a step with a frozen head
    "bf16 V32000": (torch.bfloat16, 32000, {}),
    "bf16 V32000 softcap": (torch.bfloat16, 32000, {"softcap": 30.0}),
    "bf16 V32000 row scale": (torch.bfloat16, 32000, {"want_weight": True}),
    "bf16 V50257": (torch.bfloat16, 50257, {}),
    "bf16 V50257 softcap row scale": (torch.bfloat16, 50257, {"softcap": 30.0, "want_weight": True}),
    "bf16 V50257 softcap": (torch.bfloat16, 50257, {"softcap": 30.0}),
    "bf16 V32000 loss alone": (torch.bfloat16, 32000, {"want_rows": False}),
    "fp16 V50257 softcap row scale": (torch.float16, 50257, {"softcap": 30.0, "want_weight": True}),
    "fp32 V50257 softcap": (torch.float32, 50257, {"softcap": 30.0}),
}


def run(dtype: torch.dtype, vocab: int, *, softcap: float | None = None, **wanted: bool) -> None:
    """One chunk on the meta device."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    wanted = {"want_rows": True, "want_weight": False} | wanted
    row_scale = empty(ROWS, dtype=torch.float32) if wanted["want_weight"] else None
    options: dict[str, Any] = {"ignore_index": -100, "softcap": softcap, "workspace_bytes": None}
    sweep(empty(ROWS, WIDTH), empty(vocab, WIDTH), empty(ROWS, dtype=torch.int64), None, row_scale, **options, **wanted)


def cases() -> list[Case]:
    """Softcap, row scale and a mask at the end of a row, each alone, none and all; every dtype; a loss alone."""
    return [
        Case("cross_entropy", label, partial(run, dtype, vocab, **options), frozenset())
        for label, (dtype, vocab, options) in CALLS.items()
    ]
