"""The cost that --dry-run predicts, against what torch counts on a small random model."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bivec.engine.data import BlockDataset
from bivec.engine.estimate import describe, estimate_stage, lora_parameters
from bivec.engine.lora import LoraConfig, add_lora
from bivec.engine.masking import MaskingConfig
from bivec.engine.objectives import MntpObjective
from bivec.engine.planner import Setting, kept_per_token
from bivec.engine.recipe import MntpStage, Recipe, SimcseStage
from bivec.models import DecoderConfig, Llama

CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=300,
    hidden_size=128,
    intermediate_size=352,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rms_norm_eps=1e-5,
    max_position_embeddings=256,
)
BATCH, LENGTH, P = 4, 64, 0.25


def stage(dropout=0.0, **changes):
    lora = LoraConfig(rank=4, alpha=8, dropout=dropout)
    return MntpStage(batch_size=BATCH, sequence_length=LENGTH, mask_probability=P, lora=lora, **changes)


def micro_loss(lora):
    """The loss of one step of MNTP on a random model, with its graph."""
    torch.manual_seed(0)
    model = Llama(CONFIG)
    adapter = add_lora(model, lora)
    head = torch.randn(CONFIG.vocab_size, CONFIG.hidden_size) / 10
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (BATCH, LENGTH)).astype(np.int32)
    blocks = BlockDataset(ids, np.zeros_like(ids, bool))
    masking = MaskingConfig(5, CONFIG.vocab_size, P)
    objective = MntpObjective(model, head, adapter, blocks, masking, BATCH, seed=1)
    (micro,) = objective.micro_losses(0)
    return model, adapter, micro.loss


def added_product(target, left, right, *_, **__):
    """FLOPs of an ``addmm_``, which torch's counter does not know, from the shapes."""
    return 2 * left[0] * left[1] * right[1]


def test_parameters():
    model, adapter, _ = micro_loss(LoraConfig(rank=4))
    assert lora_parameters(CONFIG, LoraConfig(rank=4)) == sum(p.numel() for p in adapter.named_parameters().values())
    adapter.remove()
    assert CONFIG.num_parameters() == sum(p.numel() for p in model.parameters())
    two = LoraConfig(rank=2, targets=("q_proj", "down_proj"))
    assert lora_parameters(CONFIG, two) == 6 * 2 * ((128 + 128) + (352 + 128))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_flops_of_a_step(dropout):
    """torch counts the matrix products; the estimate knows no exception for the first layer, whose input needs none."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
        _, _, loss = micro_loss(stage(dropout).lora)
        loss.backward()
    estimate = estimate_stage(CONFIG, stage(dropout), 4)
    tokens = BATCH * LENGTH
    # the CPU's attention op is unknown to the counter: 2 products of [L, L, Dh] forward, 5 backward
    attention = tokens * CONFIG.num_layers * CONFIG.num_heads * CONFIG.head_dim * LENGTH * 14
    assert estimate.tokens_per_step == tokens
    assert estimate.flops_per_step == pytest.approx(counter.get_total_flops() + attention, rel=0.02)


def test_micro_batches_take_less_memory_and_no_other_flops():
    whole = estimate_stage(CONFIG, stage(micro_batch_tokens=None), 4)
    parts = estimate_stage(CONFIG, stage(micro_batch_tokens=LENGTH), 4)
    less = whole.memory_bytes - parts.memory_bytes
    kept = CONFIG.num_layers * kept_per_token(Setting(CONFIG, stage().lora, 4, lm_head=True))
    assert less > (BATCH - 1) * LENGTH * kept
    assert whole.flops_per_step == parts.flops_per_step
    tiny = estimate_stage(CONFIG, stage(micro_batch_tokens=1), 4)  # a block is never cut
    assert tiny.memory_bytes == parts.memory_bytes


def test_simcse_counts_both_views():
    simcse = SimcseStage(batch_size=8, max_length=16)
    estimate = estimate_stage(CONFIG, simcse, 2)
    assert estimate.tokens_per_step == 2 * 8 * 16  # sentences are cut at max_length
    assert estimate_stage(CONFIG, SimcseStage(batch_size=8), 2).tokens_per_step == 2 * 8 * 28


def test_the_text():
    recipe = Recipe("small", "dir", "m", "s", "d", "t", mntp=stage(), stages=("bi", "mntp"))
    text = describe(recipe, CONFIG)
    assert text.splitlines()[0] == "small: dir"
    assert (
        f"{CONFIG.num_parameters():,} in the trunk ({CONFIG.num_parameters() + 300 * 128:,} with the LM head)" in text
    )
    assert "mntp: 1000 steps of 4, rate 5e-05" in text and "simcse" not in text
    assert "tokens per step        256\n" in text
