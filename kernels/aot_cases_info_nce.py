"""The calls of ``info_nce`` that ``kernels/aot.py`` checks: each option alone, none, all; a loss alone."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch

from bivec.kernels.aot import Case
from bivec.kernels.info_nce_plan import Options
from bivec.kernels.info_nce_triton import info_nce_pass

BATCH, WIDTH, SHARED, OWN = 512, 4096, 2048, 7


OPTIONS = ("ids", "margin", "query-query", "own", "none")  # "none": the reduction


def run(dtype: torch.dtype, options: Collection[str] = (), *, gradients: bool = True) -> None:
    """A batch of LLM2Vec's on the meta device, with some of ``OPTIONS``."""

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ids, own = "ids" in options, "own" in options
    settings = Options(
        targets=empty(BATCH),
        query_ids=empty(BATCH) if ids else None,
        candidate_ids=empty(SHARED) if ids else None,
        hard_negative_ids=empty(BATCH, OWN) if ids and own else None,
        normalize=True,
        symmetric=False,
        margin=0.1 if "margin" in options else None,
        include_query_query="query-query" in options,
        dims=(WIDTH,),
        dim_weights=(1.0,),
        reduction="none" if "none" in options else "mean",
        workspace_bytes=None,
    )
    queries, candidates = empty(BATCH, WIDTH, dtype=dtype), empty(SHARED, WIDTH, dtype=dtype)
    hard = empty(BATCH, OWN, WIDTH, dtype=dtype) if own else None
    weights = empty(BATCH, dtype=torch.float32) if "none" in options else None
    scale = empty(dtype=torch.float32)
    info_nce_pass(queries, candidates, hard, scale, settings, [gradients] * 4, weights)


def cases() -> list[Case]:
    """Each option alone, none and all. fp16 has fp32's kernel of the scores; the projection reads any dtype."""
    variants = {
        "bf16 plain": partial(run, torch.bfloat16),
        **{f"bf16 {option}": partial(run, torch.bfloat16, (option,)) for option in OPTIONS},
        "bf16 all": partial(run, torch.bfloat16, OPTIONS),
        "fp32 plain": partial(run, torch.float32),
        "fp32 all": partial(run, torch.float32, OPTIONS),
        "bf16 loss alone": partial(run, torch.bfloat16, gradients=False),
    }
    return [Case("info_nce", label, call, frozenset()) for label, call in variants.items()]
