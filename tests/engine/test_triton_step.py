"""A whole training step on the Triton kernels, in the interpreter, against the same step on torch."""

import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from bivec.engine.data import BlockDataset
from bivec.engine.lora import LoraConfig, add_lora
from bivec.engine.masking import MaskingConfig
from bivec.engine.objectives import MntpObjective, SimcseObjective
from bivec.engine.optim import OptimConfig
from bivec.engine.trainer import train
from bivec.kernels import aot_cases, launch
from bivec.models import load_pretrained

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
assert aot_cases  # has imported every kernel: none is to pick up a replaced launch later
STEPS = 3
KERNELS = {  # by stage: what a step must have launched
    "both": {
        "attention_forward", "attention_backward_q", "attention_backward_kv", "rms_norm_forward", "rms_norm_backward",
        "rotary", "gated_unit_forward", "gated_unit_backward", "lora_project", "lora_update", "lora_gradient",
    },
    "mntp": {"cross_entropy_rows"},
    "simcse": {"info_nce_scores", "segment_pool_forward", "segment_pool_backward"},
}  # fmt: skip


def mntp(checkpoint, adapter):
    ids = np.random.default_rng(0).integers(2, 1000, (6, 24)).astype(np.int32)
    return MntpObjective(
        checkpoint.model,
        checkpoint.lm_head_weight,
        adapter,
        BlockDataset(ids, ids < 100),
        MaskingConfig(mask_token_id=64, vocab_size=1000, probability=0.3),
        batch_size=2,
        seed=7,
        micro_batch_tokens=24,
        attention_dropout=0.1,
    )


def simcse(checkpoint, adapter):
    random = np.random.default_rng(1)
    sentences = [[0, *random.integers(2, 1000, 3 + 2 * (i % 5)).tolist()] for i in range(8)]
    # a small scale: at 20 the losses of the tiny model are next to nothing
    return SimcseObjective(
        checkpoint.model, adapter, sentences, batch_size=4, seed=7, device=DEVICE, scale=2.0, skip_prefix=1
    )


OBJECTIVES = {"mntp": mntp, "simcse": simcse}


def losses(directory, stage):
    """The losses and gradient norms of three steps, LoRA dropout and attention dropout on."""
    checkpoint = load_pretrained(directory, dtype=torch.float32, device=DEVICE)
    adapter = add_lora(checkpoint.model, LoraConfig(rank=4, dropout=0.1), seed=1)
    lines = []
    optim = OptimConfig(learning_rate=1e-2, steps=STEPS)
    objective = OBJECTIVES[stage](checkpoint, adapter)
    train(stage, objective, adapter.named_parameters(), optim, log=lines.append, progress=False)
    return torch.tensor([[line.loss, line.grad_norm] for line in lines])


@pytest.mark.parametrize("stage", OBJECTIVES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_training_on_triton_repeats_training_on_torch(family, stage, request, monkeypatch):
    directory = request.getfixturevalue(f"tiny_{family}_dir")
    monkeypatch.setenv("BIVEC_BACKEND", "torch")
    expected = losses(directory, stage)
    launched, original = set(), launch.launch
    for module in list(sys.modules.values()):  # each op has imported the function by name
        if getattr(module, "launch", None) is original:
            monkeypatch.setattr(module, "launch", noting(original, launched))
    monkeypatch.setenv("BIVEC_BACKEND", "triton")
    got = losses(directory, stage)
    torch.testing.assert_close(got[:, 0], expected[:, 0], rtol=1e-4, atol=1e-5)
    # AdamW divides by the root of squared gradients: where those are near zero, roundings grow; not in the first step
    torch.testing.assert_close(got[0, 1], expected[0, 1], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[:, 1], expected[:, 1], rtol=1e-3, atol=0)
    assert (expected[0] - expected[-1]).abs().min() > 1e-3  # and the steps did change something
    missing = (KERNELS["both"] | KERNELS[stage]) - launched
    assert not missing, launched


def noting(launch_kernel, names):
    def launch_and_note(kernel, *arguments, **options):
        names.add(kernel.__name__)
        return launch_kernel(kernel, *arguments, **options)

    return launch_and_note
