"""One of two ranks: losses and gradients over gathered columns, of ours and of sentence-transformers.

python gather_worker.py RANK STORE_FILE OUT
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

from bivec.engine.integrations.sentence_transformers import (
    BivecCachedMultipleNegativesRankingLoss,
    BivecMultipleNegativesRankingLoss,
)

VARIANTS = {
    "default": {},
    "symmetric": {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
}
KINDS = {
    "plain": (BivecMultipleNegativesRankingLoss, MultipleNegativesRankingLoss),
    "cached": (BivecCachedMultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss),
}


def value_and_gradients(kind, rank: int, gather: bool, **options) -> list[torch.Tensor]:
    """Of three columns of three rows of this rank's own."""
    columns = [torch.randn(3, 8, generator=torch.Generator().manual_seed(10 * rank + i)) for i in range(3)]
    columns = [column.requires_grad_() for column in columns]
    loss = kind(torch.nn.Sequential(torch.nn.Identity()), gather_across_devices=gather, **options)
    if hasattr(loss, "calculate_loss"):
        value = loss.calculate_loss([[column[:2], column[2:]] for column in columns])
    else:
        value = loss.compute_loss_from_embeddings(columns, None)
    return [value.detach(), *torch.autograd.grad(value, columns)]


def main() -> None:
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for kind, classes in KINDS.items():
        for variant, options in VARIANTS.items():
            ours, theirs = (value_and_gradients(one, rank, True, **options) for one in classes)
            alone = value_and_gradients(classes[0], rank, False, **options)
            found[kind, variant] = (ours, theirs, alone)
    torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
