"""How much memory a step will take, and how to cut it so that it fits: micro-batches and recomputation.

The peak of a step is what stays (weights; of LoRA the weight, its gradient and two moments in fp32) plus, for one
micro-batch, what the layers keep for backward and the larger of two moments: the loss, with its workspace, and the
start of the backward in the last layer's feed-forward block, where nothing has been let go of yet.

What a layer keeps a token (``kept_per_token``), in elements of the weights' dtype unless said otherwise, with D the
hidden width, q and kv that of all query and kv heads, H heads, I the intermediate width, r the rank of LoRA:

    residual stream before each norm          2 D             "layer": D, and nothing else
    norms' outputs (read by q,k,v and gate,up)2 D             "selective": made again
    rotated q, k, and v                       q + 2 kv
    attention's output, read by o_proj        q
    gate, up                                  2 I
    gated product (read by down_proj)         I               "selective": made again
    fp32: lse H, rstd 2, LoRA's x Aᵀ          H + 2 + 7 r
    norms of q and k: their input, fp32 rstd  q + kv, H + Hkv
    norms of the blocks' results: the same    2 D, 2
    fp32, torch backend only: rotary rows     Dh
    torch backend only: attention's operands and output are fp32, and its output is kept twice, as it was made and as
    o_proj reads it, where it is of another dtype or sequences of several lengths were put together

A layer without rotation, or with capped scores on the torch backend, keeps less. The first layer keeps no embedding
under LoRA. Dropout masks are drawn again; but with attention dropout the torch backend keeps the probabilities of short
sequences, which is counted as about what its output twice would be. On top come the allocator's slack and, on a CPU,
the process itself (0.6 GiB).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bivec.engine.errors import RunError
from bivec.engine.lora import PROJECTIONS, LoraConfig
from bivec.kernels import dropout
from bivec.kernels.linear_cross_entropy_torch import DEFAULT_WORKSPACE_BYTES, DEFAULT_WORKSPACE_BYTES_ACCELERATOR
from bivec.models import DecoderConfig
from bivec.models.recompute import LEVELS

SLACK = 0.08  # of a device's memory that a plan leaves: fragments, the runtime, what others take meanwhile
GOOD_MICRO_BATCH = 1024  # tokens from which on larger products gain less than recomputation costs
CGROUP, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Setting:
    """What decides how much memory a model and its training take, the micro-batch aside."""

    config: DecoderConfig
    lora: LoraConfig
    itemsize: int  # bytes of an element of the weights
    lm_head: bool  # MNTP scores with it
    device: str = "cpu"  # "cpu" | "cuda"
    triton: bool = False  # the backend of the kernels
    full: bool = False  # all weights are trained, in fp32 at least, instead of an adapter
    train_head: bool = False  # the LM head too
    shards: int | None = None  # ranks over which weights and optimiser are spread; None = each has a copy


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward."""

    tokens: int
    scored: int = 0  # rows that the LM head scores, of MNTP
    sequences: int = 0  # pooled ones, of a contrastive step
    recompute: str = "none"
    cached: int = 0  # embeddings of the step, where gradient caching cuts it


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes."""

    resident: int  # weights, LoRA and its optimiser, cached embeddings
    kept: int  # for backward
    temporaries: int  # at the peak, on top of these

    @property
    def total(self) -> int:
        """The peak."""
        return self.resident + self.kept + self.temporaries


@dataclass(frozen=True)
class Plan:
    """How a step is cut; none of it changes the step's gradient."""

    micro_batch_tokens: int
    accumulation: int  # micro-batches of a step
    recompute: str
    predicted: MemoryPrediction

    def __str__(self) -> str:
        return (
            f"{self.accumulation} micro-batch{'es' if self.accumulation > 1 else ''} of {self.micro_batch_tokens:,} "
            f"tokens, recomputation {self.recompute!r}, predicted peak {self.predicted.total / 2**30:.3g} GiB"
        )


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


def kept_per_token(setting: Setting, recompute: str = "none", mixed_lengths: bool = False) -> int:
    """Bytes that one layer keeps for backward, a token (module docstring)."""
    config, itemsize = setting.config, setting.itemsize
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if recompute == "layer":
        return itemsize * hidden
    own = 2 * hidden + 2 * inner
    if recompute == "none":
        own += 2 * hidden + inner
    single = config.num_heads + 2 + (0 if setting.full else len(setting.lora.targets) * setting.lora.rank)
    if config.family.qk_norm:
        own += q + kv
        single += config.num_heads + config.num_kv_heads
    if config.family.layer_norms == 4:
        own += 2 * hidden
        single += 2
    if setting.triton:
        own += 2 * q + 2 * kv
    else:
        own += q if itemsize < 4 or mixed_lengths else 0
        single += 2 * q + 2 * kv + config.head_dim
    return itemsize * own + 4 * single


def predict(setting: Setting, micro: MicroBatch) -> MemoryPrediction:
    """The peak of a step in such micro-batches."""
    config, itemsize, tokens = setting.config, setting.itemsize, micro.tokens
    hidden, inner = config.hidden_size, config.intermediate_size
    resident = _resident(setting)
    resident += 2 * micro.cached * itemsize * hidden  # and their gradients

    mixed_lengths = micro.sequences > 0  # MNTP's blocks are of one length
    kept = config.num_layers * tokens * kept_per_token(setting, micro.recompute, mixed_lengths)
    kept += tokens * itemsize * (hidden if micro.recompute != "none" else 0)  # the embedding, see above
    last_norm = tokens * (itemsize * hidden + 4)

    # in the loss: the last hidden states, the gradient of those that are scored or pooled, the workspace
    pooled = micro.scored or micro.sequences
    most = DEFAULT_WORKSPACE_BYTES.get(setting.device, DEFAULT_WORKSPACE_BYTES_ACCELERATOR)
    workspace = min(most, 4 * micro.scored * config.vocab_size)
    loss = last_norm + itemsize * hidden * (tokens + pooled) + workspace
    loss += 8 * hidden * min(micro.scored, workspace // (4 * config.vocab_size) + 1)  # a chunk's rows and gradients

    # in the backward of down_proj and of the gated unit: the gradients of the residual stream and of the product
    block = tokens * itemsize * (2 * hidden + inner)
    if (
        setting.lora.dropout > 0 and not setting.triton and not setting.full
    ):  # masks and update, on a CPU of a block of rows: as measured
        drawn = min(tokens * inner, dropout.CPU_BLOCK) if setting.device == "cpu" else tokens * inner
        block += (6 if itemsize >= 4 else 10) * drawn
    if micro.recompute != "none":
        block += tokens * itemsize * inner
    if micro.recompute == "layer":
        block += tokens * (kept_per_token(setting, "none", mixed_lengths) - itemsize * (hidden + inner))
    if setting.full:
        # a layer's weight gradients come with its activations still there; the embedding's when they are gone
        block += _gradient_bytes(setting, _layer(config))
        block = max(block, _gradient_bytes(setting, config.vocab_size * config.hidden_size) - kept)
    return MemoryPrediction(resident, kept, max(loss, block))


def _resident(setting: Setting) -> int:
    """Weights, their gradients and the optimiser's moments; of sharded ones a share, and what is whole meanwhile."""
    config, itemsize = setting.config, setting.itemsize
    weights = config.num_parameters(lm_head=setting.lm_head)
    head = weights - config.num_parameters()
    trained = config.num_parameters() if setting.full else lora_parameters(config, setting.lora)
    own = max(itemsize, 4) if setting.full else 4  # bytes of an element that is trained, its gradient and each moment
    stays = own * head if setting.full else itemsize * weights
    stays += own * (4 * trained + 3 * head * setting.train_head)
    if setting.shards is None:
        return stays
    # whole: embedding, last norm and head from the forward to the backward, a layer and the next, fetched meanwhile
    sharded = config.num_layers - (1 if setting.shards == 1 else 2)
    return stays // setting.shards + itemsize * (weights - sharded * _layer(config))


def _layer(config: DecoderConfig) -> int:
    """Parameters of a layer."""
    ends = (config.vocab_size + 1) * config.hidden_size
    return (config.num_parameters() - ends) // config.num_layers


def _gradient_bytes(setting: Setting, weights: int) -> int:
    """Of gradients of whole weights; several ranks reduce them in a second buffer, in the masters' dtype."""
    reduced = max(setting.itemsize, 4) if setting.shards and setting.shards > 1 else 0
    return (setting.itemsize + reduced) * weights


def plan_mntp(
    setting: Setting, batch_size: int, sequence_length: int, mask_probability: float, memory_bytes: int
) -> Plan:
    """Cuts a step of MNTP: the least recomputation with which micro-batches are of a good size.

    Args:
        setting: model and training.
        batch_size: blocks of a step.
        sequence_length: tokens of a block, which is never cut.
        mask_probability: of a token to be scored.
        memory_bytes: what the device has for this process.

    Raises:
        RunError: one block does not fit even with all recomputation.
    """
    budget = int(memory_bytes * (1 - SLACK))

    def fitting(recompute: str) -> Plan | None:
        """The largest micro-batch that fits, of equal ones."""
        for accumulation in range(1, batch_size + 1):
            blocks = -(-batch_size // accumulation)
            if accumulation > 1 and blocks == -(-batch_size // (accumulation - 1)):
                continue
            tokens = blocks * sequence_length
            micro = MicroBatch(tokens, scored=round(tokens * mask_probability), recompute=recompute)
            predicted = predict(setting, micro)
            if predicted.total <= budget:
                return Plan(tokens, -(-batch_size // blocks), recompute, predicted)
        return None

    enough = min(GOOD_MICRO_BATCH, batch_size * sequence_length)
    plans = [plan for level in LEVELS if (plan := fitting(level)) is not None]
    for plan in plans:
        if plan.micro_batch_tokens >= enough:
            return plan
    if not plans:
        least = predict(setting, MicroBatch(sequence_length, scored=sequence_length, recompute="layer"))
        raise RunError(_too_small("mntp", memory_bytes, least, "shorten mntp.sequence_length"))
    return max(plans, key=lambda plan: plan.micro_batch_tokens)


def plan_contrastive(
    setting: Setting, stage: str, batch_tokens: int, sequences: int, longest: int, memory_bytes: int
) -> Plan:
    """Cuts a contrastive step: one forward of all its sequences, as long as any recomputation lets it fit.

    Else micro-batches by gradient caching (``engine/grad_cache.py``), the least recomputation with which they are of a
    good size: like that of whole layers, it costs one more forward.

    Args:
        setting: model and training.
        stage: its name, for the error.
        batch_tokens: tokens of a step.
        sequences: texts of a step.
        longest: tokens of the longest text, which is never cut.
        memory_bytes: what the device has for this process.

    Raises:
        RunError: the longest text does not fit even with all recomputation.
    """
    budget = int(memory_bytes * (1 - SLACK))
    for level in LEVELS:
        predicted = predict(setting, MicroBatch(batch_tokens, sequences=sequences, recompute=level))
        if predicted.total <= budget:
            return Plan(batch_tokens, 1, level, predicted)

    def fitting(recompute: str) -> Plan | None:
        """The largest micro-batch that fits, of about equal ones."""
        for count in range(2, batch_tokens // longest + 1):
            tokens = -(-batch_tokens // count)
            share = -(-sequences // count)
            micro = MicroBatch(tokens, sequences=share, recompute=recompute, cached=sequences)
            predicted = predict(setting, micro)
            if predicted.total <= budget:
                return Plan(tokens, count, recompute, predicted)
        return None

    plans = [plan for level in LEVELS if (plan := fitting(level)) is not None]
    if not plans:
        least = predict(setting, MicroBatch(longest, sequences=1, recompute="layer", cached=sequences))
        raise RunError(_too_small(stage, memory_bytes, least, f"lower {stage}.max_length"))
    good = [plan for plan in plans if plan.micro_batch_tokens >= GOOD_MICRO_BATCH]
    return good[0] if good else max(plans, key=lambda plan: plan.micro_batch_tokens)


def batch_tokens(lengths: np.ndarray, batch_size: int) -> int:
    """Tokens that a batch of sentences of these lengths will hardly ever pass: four deviations above the mean."""
    return round(batch_size * float(lengths.mean()) + 4 * math.sqrt(batch_size) * float(lengths.std()))


def _too_small(stage: str, memory_bytes: int, least: MemoryPrediction, advice: str) -> str:
    return (
        f"--memory: {stage} needs {least.total / (1 - SLACK) / 2**30:.2g} GiB at least ({least.resident / 2**30:.2g} "
        f"of them weights and LoRA), there are {memory_bytes / 2**30:.2g}; take a larger device or a smaller model, or "
        f"{advice}"
    )


def parse_memory(text: str) -> int | None:
    """Bytes of "24GiB", "500MB" or "1073741824"; None of "auto".

    Raises:
        RunError: neither.
    """
    if text.strip().lower() == "auto":
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    number, unit = (0.0, None) if found is None else (float(found[1]), UNITS.get(found[2].upper()))
    if unit is None or number <= 0:
        raise RunError(f"--memory {text}: expected auto, or a size such as 24GiB or 500MB")
    return int(number * unit)


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on ``device``, and those that torch's allocator holds unused."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        available = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(available, *map(_left_of_group, _control_groups())))


def _control_groups() -> Iterator[Path]:
    """Those of this process, by Linux's version 2: a container's, a batch job's, and what they are in."""
    try:
        lines = OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    own = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), "")
    folder = CGROUP / own
    yield from (CGROUP / part for part in [*map(str, folder.relative_to(CGROUP).parents), own])


def _left_of_group(folder: Path) -> float:
    """Bytes of a control group's limit that are free or hold nothing but files, which is given up when asked for."""
    try:
        limit, used = (int((folder / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # there is none, or its limit is "max"
        return math.inf
    try:
        counts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return limit - used + int(counts["active_file"]) + int(counts["inactive_file"])
    except (OSError, ValueError, KeyError):
        return limit - used
