"""What a stage will cost, from the model's shape alone: parameters, FLOPs a step and peak memory.

Used by ``--dry-run``. FLOPs count a multiply and an add as two. The trunk is frozen, so a step takes a forward and
the gradient of the activations, no weight gradients (DESIGN 5). Memory is weights + LoRA (weight, gradient, two
moments, fp32) + what the layers save for backward + one layer's temporaries + the logits workspace. On top come the
allocator's slack and, on a CPU, the process itself (0.6 GiB).
"""

from __future__ import annotations

from dataclasses import dataclass

from bivec.engine.lora import PROJECTIONS, LoraConfig
from bivec.engine.recipe import MntpStage, Recipe, SimcseStage
from bivec.models import DecoderConfig

SENTENCE_TOKENS = 28  # a Wikipedia sentence with BOS: 26.8 for SmolLM2's tokenizer on the shipped sample
LOGITS_WORKSPACE = 256 << 20


@dataclass(frozen=True)
class StageEstimate:
    """The cost of one optimiser step of a stage."""

    stage: str
    trainable_parameters: int
    tokens_per_step: int
    flops_per_step: float
    memory_bytes: int  # predicted peak, process overhead not counted


def projection_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of the seven projections of a layer."""
    hidden, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner = config.intermediate_size
    shapes = ((hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, inner), (hidden, inner), (inner, hidden))
    return dict(zip(PROJECTIONS, shapes, strict=True))


def lora_parameters(config: DecoderConfig, lora: LoraConfig) -> int:
    """Trainable parameters of an adapter."""
    shapes = projection_shapes(config)
    return config.num_layers * lora.rank * sum(sum(shapes[name]) for name in lora.targets)


def saved_bytes_per_token(config: DecoderConfig, lora: LoraConfig, itemsize: int) -> int:
    """What the layers keep for backward, a token.

    Both norms' inputs and outputs, the input of o_proj, gate, up and their product in the weights' dtype; in fp32
    attention's q, k, v and output (the torch backend computes it so), the low-rank activations of LoRA and the rotary
    rows. With fp32 weights o_proj's input is attention's output. Dropout is drawn again, nothing is kept for it.
    """
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    own_dtype = 4 * config.hidden_size + 3 * config.intermediate_size + (q if itemsize < 4 else 0)
    single = 2 * q + 2 * kv + config.num_heads + config.head_dim + 2 + len(lora.targets) * lora.rank
    return config.num_layers * (itemsize * own_dtype + 4 * single)


def estimate_stage(config: DecoderConfig, stage: MntpStage | SimcseStage, itemsize: int) -> StageEstimate:
    """The cost of a step of one stage on a model of this shape, weights of ``itemsize`` bytes."""
    if isinstance(stage, MntpStage):
        name, tokens, length = "mntp", stage.batch_size * stage.sequence_length, stage.sequence_length
        micro_tokens = min(tokens, max(stage.micro_batch_tokens or tokens, length))
        scored = tokens * stage.mask_probability
    else:
        name, length = "simcse", min(SENTENCE_TOKENS, stage.max_length)
        tokens, scored = 2 * stage.batch_size * length, 0.0
        micro_tokens = tokens
    weights = config.num_layers * sum(i * o for i, o in projection_shapes(config).values())
    adapter = lora_parameters(config, stage.lora)
    # forward and backward: attention does 2 GEMMs, then 4 more and one recomputed
    attention = config.num_layers * config.num_heads * config.head_dim * length * 2 * (2 + 5)
    flops = tokens * (4 * weights + 6 * adapter + attention) + 4 * scored * config.vocab_size * config.hidden_size
    # in the backward of down_proj: a dropped copy of its input and the mask, the gradients of product, gate and up
    temporaries = config.intermediate_size * (3 * itemsize + 9)
    memory = (
        itemsize * config.num_parameters(lm_head=name == "mntp")
        + 16 * adapter
        + micro_tokens * (saved_bytes_per_token(config, stage.lora, itemsize) + temporaries)
        + (LOGITS_WORKSPACE if name == "mntp" else 0)
    )
    return StageEstimate(name, adapter, tokens, flops, memory)


def describe(recipe: Recipe, config: DecoderConfig) -> str:
    """The text of ``--dry-run``."""
    lines = [
        f"{recipe.name}: {recipe.model}",
        f"  parameters   {config.num_parameters():,} in the trunk "
        f"({config.num_parameters(lm_head=True):,} with the LM head)",
    ]
    for stage in (recipe.mntp, recipe.simcse):
        half, full = estimate_stage(config, stage, 2), estimate_stage(config, stage, 4)
        if full.stage not in recipe.stages:
            continue
        sentences = f" (two views of sentences of about {SENTENCE_TOKENS})" if full.stage == "simcse" else ""
        lines += [
            f"  {full.stage}: {stage.optim.steps} steps of {stage.batch_size}, rate {stage.optim.learning_rate:g}",
            f"    trainable parameters   {full.trainable_parameters:,}",
            f"    tokens per step        {full.tokens_per_step:,}{sentences}",
            f"    FLOPs per step         {full.flops_per_step:.3g}",
            f"    predicted memory       {half.memory_bytes / 2**30:.1f} GiB in bfloat16 (GPU), "
            f"{full.memory_bytes / 2**30:.1f} GiB in float32 (CPU)",
        ]
    return "\n".join(lines)
