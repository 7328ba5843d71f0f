"""One rank of test_sentence_transformers.py: both losses over gathered embeddings, into a JSON file.

python gather_worker.py OUT     with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment
"""

import json
import sys
from pathlib import Path

import torch
from sentence_transformers.losses import MultipleNegativesRankingLoss

from bivec.engine.integrations.sentence_transformers import BivecMultipleNegativesRankingLoss

VARIANTS = [{}, {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}]


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, results = torch.distributed.get_rank(), []
    for options in VARIANTS:
        for kind in (BivecMultipleNegativesRankingLoss, MultipleNegativesRankingLoss):
            torch.manual_seed(rank)
            columns = [torch.randn(3, 8, requires_grad=True) for _ in range(3)]
            value = kind(None, gather_across_devices=True, **options).compute_loss_from_embeddings(columns, None)
            value.backward()
            results.append([value.tolist(), *(column.grad.tolist() for column in columns)])
    Path(sys.argv[1]).write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
