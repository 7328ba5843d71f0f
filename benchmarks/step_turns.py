"""The turns of benchmarks/train_step.py: one step of ours and one of each peer on the same samples, again and again."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import padded_peer
import torch
from gemms import Gemms, synchronise
from workload import mntp_data, simcse_data

from bivec.engine.errors import BivecError
from bivec.engine.estimate import estimate_stage
from bivec.engine.lora import Adapter, LoraConfig, add_lora
from bivec.engine.objectives import MntpObjective, SimcseObjective
from bivec.engine.optim import OptimConfig
from bivec.engine.recipe import MntpStage, SimcseStage
from bivec.engine.trainer import Intervals, StepMetrics, is_out_of_memory, train
from bivec.models import Checkpoint

OURS = "bivec"
MASK_PROBABILITY = 0.2
SIMCSE_LENGTH = 128


@dataclass(frozen=True)
class Turn:
    """One step of each side on the same samples."""

    tokens: int  # true ones
    seconds: dict[str, float]  # by side
    losses: dict[str, float]
    gemm_flops_per_s: float | None = None


@dataclass(frozen=True)
class Work:
    """A stage on a model, ready for any batch size and dropout."""

    stage: str
    checkpoint: Checkpoint
    device: torch.device
    options: argparse.Namespace
    make_objective: Callable[..., MntpObjective | SimcseObjective]

    def objective(self, adapter: Adapter, batch_size: int, attention_dropout: float) -> MntpObjective | SimcseObjective:
        """The stage's, for this adapter."""
        return self.make_objective(adapter=adapter, batch_size=batch_size, attention_dropout=attention_dropout)


def prepare(stage: str, checkpoint: Checkpoint, device: torch.device, options: argparse.Namespace) -> Work:
    """The data of the stage, read once."""
    if stage == "mntp" and checkpoint.lm_head_weight is None:
        raise BivecError(f"--model {options.model} has no LM head, which MNTP needs; give --stage simcse")
    batch_size = options.batch[stage]
    count = batch_size * (options.warmup + options.steps)
    is_random = options.shape is not None
    if stage == "mntp":
        blocks, masking = mntp_data(
            checkpoint, options.sequence_length, count, is_random=is_random, probability=MASK_PROBABILITY
        )
        make_objective = partial(
            MntpObjective,
            checkpoint.model,
            checkpoint.lm_head_weight,
            blocks=blocks,
            masking=masking,
            seed=options.seed,
            micro_batch_tokens=options.micro_batch_tokens,
        )
    else:
        sentences = simcse_data(checkpoint, SIMCSE_LENGTH, count, is_random=is_random)
        make_objective = partial(
            SimcseObjective, checkpoint.model, sentences=sentences, seed=options.seed, device=device
        )
    return Work(stage, checkpoint, device, options, make_objective)


def our_steps(
    work: Work,
    adapter: Adapter,
    objective: MntpObjective | SimcseObjective,
    optim: OptimConfig,
    log: Callable[[StepMetrics], None] | None = None,
) -> Callable[[], object]:
    """The engine's training loop, with nothing saved and nothing printed."""
    intervals = Intervals(log=1, save=0)
    parameters = adapter.named_parameters()
    return partial(train, work.stage, objective, parameters, optim, intervals=intervals, log=log, progress=False)


def run_turns(
    work: Work,
    *,
    batch_size: int,
    steps: int,
    attention_dropout: float,
    lora_dropout: float,
    peers: Mapping[str, bool],
    gemms: Gemms | None = None,
) -> tuple[list[Turn], dict[str, str]]:
    """Fresh adapters on all sides, ``steps`` turns; and the errors of peers that gave up, which leaves the others.

    ``peers`` says by name whether a peer recomputes its activations. Their steps are run by the trainer's log callback,
    so that ours is the trainer's, not a copy of it.
    """
    lora = LoraConfig(dropout=lora_dropout)
    optim = OptimConfig(work.options.learning_rate, steps)
    models = {name: padded_peer.causal_lm(work.checkpoint, attention_dropout) for name in peers}
    adapter = add_lora(work.checkpoint.model, lora, work.options.seed)
    objective = work.objective(adapter, batch_size, attention_dropout)
    running = {
        name: padded_peer.PaddedPeer(model, adapter, objective, optim, recompute=peers[name])
        for name, model in models.items()
    }
    turns: list[Turn] = []
    errors: dict[str, str] = {}

    def after_step(metrics: StepMetrics) -> None:
        nonlocal started
        synchronise(work.device)
        seconds, losses = {OURS: time.perf_counter() - started}, {OURS: metrics.loss}
        for name, peer in list(running.items()):
            begun = time.perf_counter()
            try:
                losses[name] = peer.step(metrics.step - 1)
                synchronise(work.device)
                seconds[name] = time.perf_counter() - begun
            except (RuntimeError, MemoryError) as failure:  # out of memory: ours is still worth measuring
                if isinstance(failure, RuntimeError) and not is_out_of_memory(failure):
                    raise
                del running[name]
                errors[name] = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0][:160]}"
        rate = None if gemms is None else gemms.flops_per_s(metrics.step)
        turns.append(Turn(metrics.tokens, seconds, losses, rate))
        started = time.perf_counter()

    try:
        started = time.perf_counter()
        our_steps(work, adapter, objective, optim, log=after_step)()
    finally:
        adapter.remove()
    return turns, errors


def flops_per_token(work: Work, batch_size: int) -> float:
    """Of a step, by engine/estimate.py."""
    if work.stage == "mntp":
        length = work.options.sequence_length
        stage = MntpStage(batch_size=batch_size, sequence_length=length, mask_probability=MASK_PROBABILITY)
    else:
        stage = SimcseStage(batch_size=batch_size, max_length=SIMCSE_LENGTH)
    estimate = estimate_stage(work.checkpoint.config, stage, work.checkpoint.model.embed_tokens.weight.itemsize)
    return estimate.flops_per_step / estimate.tokens_per_step
