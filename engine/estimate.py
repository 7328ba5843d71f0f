"""What a stage will cost, from the model's shape alone: parameters, FLOPs a step and peak memory.

Used by ``--dry-run``. FLOPs count a multiply and an add as two. The trunk is frozen, so a step takes a forward and
the gradient of the activations, no weight gradients, unless the stage trains all weights. Memory is that of
``engine/planner.py``, for the stage's own micro-batches and no recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass

from bivec.engine.planner import MicroBatch, Setting, lora_parameters, predict, projection_shapes
from bivec.engine.recipe import MntpStage, Recipe, SimcseStage, SupervisedStage
from bivec.models import DecoderConfig

TRIPLE_TOKENS = 128  # a guess for questions and passages; every data set has its own
SENTENCE_TOKENS = 28  # a Wikipedia sentence with BOS: 26.8 for SmolLM2's tokenizer on the shipped sample


@dataclass(frozen=True)
class StageEstimate:
    """The cost of one optimiser step of a stage."""

    stage: str
    trainable_parameters: int
    tokens_per_step: int
    flops_per_step: float
    memory_bytes: int  # predicted peak, process overhead not counted


def setting_of(
    config: DecoderConfig,
    stage: MntpStage | SimcseStage | SupervisedStage,
    itemsize: int,
    device: str,
    *,
    triton: bool | None = None,
    shards: int | None = None,
) -> Setting:
    """The stage on a device.

    Args:
        config: the model's shape.
        stage: its settings.
        itemsize: bytes of an element of the weights.
        device: "cpu" or "cuda".
        triton: the backend of the kernels; None = as by default, torch on a CPU.
        shards: ranks over which weights and optimiser are spread; None = one for full-weight training, else none.
    """
    full = stage.tuning == "full"
    return Setting(
        config,
        stage.lora,
        itemsize,
        isinstance(stage, MntpStage),
        device,
        triton=device != "cpu" if triton is None else triton,
        full=full,
        train_head=getattr(stage, "lm_head", "") == "trained",
        shards=1 if full and shards is None else shards,
    )


def estimate_stage(
    config: DecoderConfig, stage: MntpStage | SimcseStage | SupervisedStage, itemsize: int, device: str = "cpu"
) -> StageEstimate:
    """The cost of a step of one stage on a model of this shape, weights of ``itemsize`` bytes, on "cpu" or "cuda"."""
    if isinstance(stage, MntpStage):
        name, tokens, length = "mntp", stage.batch_size * stage.sequence_length, stage.sequence_length
        micro_tokens = min(tokens, max(stage.micro_batch_tokens or tokens, length))
        scored = tokens * stage.mask_probability
        micro = MicroBatch(micro_tokens, scored=round(micro_tokens * stage.mask_probability))
    else:
        simcse = isinstance(stage, SimcseStage)
        name, sequences = ("simcse", 2 * stage.batch_size) if simcse else ("supervised", 3 * stage.batch_size)
        length = min(SENTENCE_TOKENS if simcse else TRIPLE_TOKENS, stage.max_length)
        tokens, scored = sequences * length, 0.0
        micro_tokens = min(tokens, max(stage.micro_batch_tokens or tokens, length))
        cached = sequences if micro_tokens < tokens else 0
        micro = MicroBatch(micro_tokens, sequences=-(-sequences * micro_tokens // tokens), cached=cached)
    weights = config.num_layers * sum(i * o for i, o in projection_shapes(config).values())
    full = stage.tuning == "full"
    adapter = 0 if full else lora_parameters(config, stage.lora)
    # forward and backward: attention does 2 GEMMs, then 4 more and one recomputed
    attention = config.num_layers * config.num_heads * config.head_dim * length * 2 * (2 + 5)
    flops = (
        tokens * ((6 if full else 4) * weights + 6 * adapter + attention)
        + 4 * scored * config.vocab_size * config.hidden_size
    )
    if micro.cached:  # every text is embedded twice, but for those of one micro-batch
        flops += (tokens - micro.tokens) * (2 * (weights + adapter) + attention * 2 / 7)
    memory = predict(setting_of(config, stage, itemsize, device), micro).total
    trainable = config.num_parameters() if full else adapter
    return StageEstimate(name, trainable, tokens, flops, memory)


def describe(recipe: Recipe, config: DecoderConfig) -> str:
    """The text of ``--dry-run``."""
    lines = [
        f"{recipe.name}: {recipe.model}",
        (
            f"  parameters   {config.num_parameters():,} in the trunk "
            f"({config.num_parameters(lm_head=True):,} with the LM head)"
        ),
    ]
    for stage in (recipe.mntp, recipe.simcse, recipe.supervised):
        half, full = estimate_stage(config, stage, 2, "cuda"), estimate_stage(config, stage, 4, "cpu")
        if full.stage not in recipe.stages:
            continue
        sentences = {
            "simcse": f" (two views of sentences of about {SENTENCE_TOKENS})",
            "supervised": f" (triples of texts of about {TRIPLE_TOKENS})",
        }.get(full.stage, "")
        lines += [
            f"  {full.stage}: {stage.optim.steps} steps of {stage.batch_size}, rate {stage.optim.learning_rate:g}",
            f"    trainable parameters   {full.trainable_parameters:,}",
            f"    tokens per step        {full.tokens_per_step:,}{sentences}",
            f"    FLOPs per step         {full.flops_per_step:.3g}",
            (
                f"    predicted memory       {half.memory_bytes / 2**30:.1f} GiB in bfloat16 (GPU), "
                f"{full.memory_bytes / 2**30:.1f} GiB in float32 (CPU)"
            ),
        ]
    return "\n".join(lines)
