"""info_nce's door: what is refused, what is taken by default, which backend runs."""

import sys
from dataclasses import replace

import pytest
import torch

from bivec.kernels import info_nce
from bivec.kernels.info_nce_plan import Options, workspace_budget

B, N, M, K, D = 11, 17, 5, 3, 24


def test_the_backend_that_is_asked_for_runs(monkeypatch):
    module = sys.modules[info_nce.__module__]
    monkeypatch.setattr(module, "resolve", lambda asked, *_: asked)
    monkeypatch.setattr(module, "_triton", lambda *_: ("by triton", None, None, None))
    assert info_nce(torch.eye(2), torch.eye(2), backend="".join(list("triton"))) == "by triton"  # not that very object
    assert info_nce(torch.eye(2), torch.eye(2), backend="torch").dim() == 0


def test_the_workspace_by_default():
    """What the docstring says: 64 MiB, 256 on an accelerator, more where one query needs it."""
    options = Options(torch.arange(B), None, None, None, True, False, None, False, (D,), (1.0,), "mean", None)
    for device, default in (("cpu", 64 * 2**20), ("cuda", 256 * 2**20)):
        for minimum, expected in ((1, default), (default, default), (default + 1, default + 1)):
            assert workspace_budget(torch.device(device), options, minimum, N, D) == expected
    small = replace(options, workspace_bytes=1000)
    assert workspace_budget(torch.device("cpu"), small, 1000, N, D) == 1000


BAD = [
    ({"candidates": torch.zeros(N, D + 1)}, "must share D"),
    ({"candidates": torch.zeros(N, D - 1)}, "must share D"),
    ({"queries": torch.zeros(B, D, 1)}, "must share D"),
    ({"queries": torch.zeros(B, D).long()}, "queries must be floating point"),
    ({"candidates": torch.zeros(B - 1, D)}, "at least as many candidates"),
    ({"targets": torch.zeros(B - 1).long()}, r"targets must be \[11\] int64"),
    ({"targets": torch.full((B,), N)}, r"targets must lie in \[0, N=17\)"),
    ({"symmetric": True}, "symmetric=True pairs .*got N=17 and targets not given"),
    ({"hard_negatives": torch.zeros(B + 1, K, D)}, "hard_negatives must be"),
    ({"query_ids": torch.zeros(B).long()}, "query_ids mask nothing"),
    ({"candidate_ids": torch.zeros(N).long()}, "compared with query_ids"),
    ({"query_ids": torch.zeros(B).long(), "candidate_ids": torch.zeros(B).long()}, r"candidate_ids must be \[17\]"),
    ({"query_ids": torch.zeros(B - 1).long(), "candidate_ids": torch.zeros(N).long()}, r"query_ids must be \[11\]"),
    (
        {
            "query_ids": torch.zeros(B).long(),
            "hard_negatives": torch.zeros(M, D),
            "hard_negative_ids": torch.zeros(M - 1).long(),
        },
        r"hard_negative_ids must be \[5\]",
    ),
    ({"query_ids": torch.zeros(B).long(), "hard_negative_ids": torch.zeros(M).long()}, "without hard_negatives"),
    ({"scale": float("inf")}, "scale must be finite"),
    ({"scale": torch.tensor(float("nan"))}, "scale must be finite"),
    ({"scale": torch.ones(1)}, "0-dim"),
    ({"margin": float("nan")}, "margin must be finite"),
    ({"margin": 0.1, "scale": -1.0}, "margin needs a positive scale"),
    ({"matryoshka_dims": [8, D + 1]}, "matryoshka_dims must be"),
    ({"matryoshka_dims": [8, 8]}, "matryoshka_dims must be"),
    ({"matryoshka_dims": [0]}, "matryoshka_dims must be"),
    ({"matryoshka_dims": []}, "matryoshka_dims must be"),
    ({"matryoshka_dims": [8.0]}, "matryoshka_dims must be"),
    ({"matryoshka_weights": [1.0]}, "without matryoshka_dims"),
    ({"matryoshka_dims": [8], "matryoshka_weights": [1.0, 2.0]}, "must be 1 non-negative"),
    ({"matryoshka_dims": [8, 4], "matryoshka_weights": [1.0]}, "must be 2 non-negative"),
    ({"matryoshka_dims": [8, 4], "matryoshka_weights": [2.0, -1.0]}, "must be 2 non-negative"),
    ({"matryoshka_dims": [8], "matryoshka_weights": [float("inf")]}, "must be 1 non-negative"),
    ({"candidates": torch.ones(N, D, device="meta")}, "candidates is on meta, queries on cpu"),
    ({"hard_negatives": torch.ones(M, D, device="meta")}, "hard_negatives is on meta"),
    ({"hard_negatives": torch.ones(M, D - 1)}, "hard_negatives must be"),
    ({"hard_negatives": torch.ones(M)}, "hard_negatives must be"),
    ({"hard_negatives": torch.ones(M, D).long()}, "hard_negatives must be floating point"),
    ({"candidates": torch.ones(N, D).long()}, "candidates must be floating point"),
    ({"queries": torch.ones(D)}, "must share D"),
    ({"candidates": torch.ones(1, N, D)}, "must share D"),
    ({"targets": torch.full((B,), -1)}, r"found -1 … -1"),
    ({"targets": torch.zeros(B, dtype=torch.int32)}, r"targets must be \[11\] int64"),
    ({"margin": 0.1, "scale": 0.0}, "margin needs a positive scale"),
    ({"candidates": torch.ones(B, D), "symmetric": True, "targets": torch.arange(B)}, "targets given"),
    ({"matryoshka_dims": [8], "matryoshka_weights": [0.0]}, "not all 0"),
    ({"reduction": "max"}, "reduction must be"),
    ({"workspace_bytes": 100}, "cannot hold the logits of one query"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        info_nce(**({"queries": torch.ones(B, D), "candidates": torch.ones(N, D)} | change))


def test_hard_negatives_without_rows_are_refused_where_their_length_is_both_sizes():
    with pytest.raises(ValueError, match=r"hard_negatives must be \[M, 4\]"):
        info_nce(torch.eye(4), torch.eye(4), hard_negatives=torch.ones(4))
