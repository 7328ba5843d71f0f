"""The calls of ``info_nce`` that ``kernels/aot.py`` checks: nothing beside the loss, every option, a loss alone."""

from __future__ import annotations

from functools import partial

import torch

from bivec.kernels.aot import Case
from bivec.kernels.info_nce_plan import Options
from bivec.kernels.info_nce_triton import info_nce_pass

BATCH, WIDTH, SHARED, OWN = 512, 4096, 2048, 7


def run(dtype: torch.dtype, *, with_all: bool, gradients: bool = True) -> None:
    """A batch of LLM2Vec's on the meta device; ``with_all`` adds ids, a margin, other queries, own hard negatives."""

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    options = Options(
        targets=empty(BATCH),
        query_ids=empty(BATCH) if with_all else None,
        candidate_ids=empty(SHARED) if with_all else None,
        hard_negative_ids=empty(BATCH, OWN) if with_all else None,
        normalize=True,
        symmetric=False,
        margin=0.1 if with_all else None,
        include_query_query=with_all,
        dims=(WIDTH,),
        dim_weights=(1.0,),
        reduction="none" if with_all else "mean",
        workspace_bytes=None,
    )
    queries, candidates = empty(BATCH, WIDTH, dtype=dtype), empty(SHARED, WIDTH, dtype=dtype)
    hard = empty(BATCH, OWN, WIDTH, dtype=dtype) if with_all else None
    weights = empty(BATCH, dtype=torch.float32) if with_all else None
    scale = empty(dtype=torch.float32)
    info_nce_pass(queries, candidates, hard, scale, options, [gradients] * 4, weights)


def cases() -> list[Case]:
    """fp16 has fp32's kernel of the scores; the projection reads any dtype."""
    variants = {
        "bf16 plain": partial(run, torch.bfloat16, with_all=False),
        "bf16 all": partial(run, torch.bfloat16, with_all=True),
        "fp32 all": partial(run, torch.float32, with_all=True),
        "bf16 loss alone": partial(run, torch.bfloat16, with_all=False, gradients=False),
    }
    return [Case("info_nce", label, call, frozenset()) for label, call in variants.items()]
