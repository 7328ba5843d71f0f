"""The training loop: one stage, from its last checkpoint to the stop, with logging, evaluation, saving and clipping."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bivec.engine.checkpoint import TrainState, list_checkpoints, load_checkpoint, save_checkpoint
from bivec.engine.distributed import ALONE, World, whole
from bivec.engine.errors import RunError, first_line
from bivec.engine.micro_loss import MicroLoss
from bivec.engine.optim import OptimConfig, learning_rate_at, make_optimizer


class Objective(Protocol):
    """Anything that yields the losses of a step's micro-batches."""

    def micro_losses(self, step: int) -> Iterator[MicroLoss]:
        """See :class:`MicroLoss`."""


@runtime_checkable
class ShrinkableObjective(Objective, Protocol):
    """One whose step is done again, in less memory, where it ran out of memory."""

    def with_less_memory(self) -> ShrinkableObjective | None:
        """The same step in less memory; None = there is no way."""

    def memory_setting(self) -> str:
        """What that changes, in words."""


# of torch's CPU allocator; of the CUDA driver, through Triton as it loads a kernel; of cuBLAS
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Intervals:
    """Every how many steps something happens; 0 = never. The last step is always logged and saved."""

    log: int = 1
    evaluate: int = 0
    save: int = 200


@dataclass(frozen=True)
class StepMetrics:
    """One line of ``metrics.jsonl``."""

    stage: str
    step: int  # counted from 1
    loss: float
    lr: float
    grad_norm: float
    tokens: int  # of this step
    tokens_per_s: float
    peak_memory_bytes: int


def peak_memory_bytes(device: torch.device | str) -> int:
    """Peak memory of a GPU; of the process, where ``device`` is the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def train(
    stage: str,
    objective: Objective,
    parameters: dict[str, torch.nn.Parameter],
    config: OptimConfig,
    *,
    intervals: Intervals = Intervals(),
    checkpoints: Path | None = None,
    log: Callable[[StepMetrics], None] | None = None,
    evaluate: Callable[[int], None] | None = None,
    cut: Callable[[Objective], None] | None = None,
    resume: bool = False,
    progress: bool = True,
    world: World = ALONE,
) -> TrainState:
    """Runs a stage to ``config.steps``.

    Args:
        stage: its name in logs and checkpoints.
        objective: yields the micro-batch losses of a step.
        parameters: the trainable tensors by name.
        config: optimiser and schedule.
        intervals: of logging, evaluation and saving.
        checkpoints: directory of the checkpoints; None = none are written.
        log: receives the metrics of every logged step.
        evaluate: called with the number of steps done, every ``intervals.evaluate`` steps.
        cut: receives the objective that goes on after a step ran out of memory.
        resume: continue from the stage's last checkpoint, if there is one.
        progress: show a bar with loss, tokens/s and time left.
        world: the ranks that train together. Metrics are those of all; rank 0 logs, shows and writes. Out of memory
            ends the stage: the others are in the middle of the step.

    Returns:
        The state after the last step.

    Raises:
        RunError: the loss is no longer finite; names the step and the last good checkpoint, and nothing is written. Or
            ``checkpoints`` holds an earlier run of the stage and ``resume`` is False.
        CheckpointError: the checkpoint to resume from is damaged or does not fit.
    """
    from tqdm import tqdm  # a user of the loss functions alone need not have it

    state = TrainState(stage, 0, parameters, make_optimizer(parameters.values(), config))
    saved = list_checkpoints(checkpoints, stage) if checkpoints is not None else []
    if saved and not resume:
        raise RunError(
            f"{checkpoints} holds an earlier run of this stage ({saved[-1].name}): resume it, or use another directory"
        )
    if saved:
        state = load_checkpoint(saved[-1], state)
    bar = tqdm(
        total=config.steps,
        initial=state.step,
        desc=stage,
        unit="step",
        disable=not (progress and world.is_main),
        dynamic_ncols=True,
    )
    seconds = tokens = 0.0  # since the last logged step, evaluation and saving not counted
    with bar:
        while state.step < config.steps:
            started = time.perf_counter()
            metrics, fitting = _step_within_memory(state, objective, config, checkpoints, world)
            if fitting is not objective and cut is not None:
                cut(fitting)
            objective = fitting
            state = replace(state, step=state.step + 1)
            seconds, tokens = seconds + time.perf_counter() - started, tokens + metrics.tokens
            metrics = replace(metrics, tokens_per_s=tokens / seconds)
            bar.set_postfix(loss=f"{metrics.loss:.3f}", **{"tok/s": f"{metrics.tokens_per_s:.0f}"}, refresh=False)
            bar.update()
            done = state.step == config.steps
            if log is not None and (done or _due(state.step, intervals.log)):
                if world.is_main:
                    log(metrics)
                seconds = tokens = 0.0
            if evaluate is not None and _due(state.step, intervals.evaluate):
                evaluate(state.step)
            if checkpoints is not None and (done or _due(state.step, intervals.save)):
                save_checkpoint(checkpoints, state, world)
    return state


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _step_within_memory(
    state: TrainState, objective: Objective, config: OptimConfig, checkpoints: Path | None, world: World
) -> tuple[StepMetrics, Objective]:
    """One step; out of memory, it is begun again in smaller parts, with the same effective batch and gradient.

    Nothing of the failed attempt is left: the optimiser steps last, and data and dropout are functions of the step.
    """
    from tqdm import tqdm

    while True:
        try:
            return _optimizer_step(state, objective, config, checkpoints, world), objective
        except RuntimeError as error:
            if world.size > 1 or not is_out_of_memory(error):
                raise
            smaller = objective.with_less_memory() if isinstance(objective, ShrinkableObjective) else None
            if smaller is None:
                raise
            reason = first_line(error)
        # outside of the handler, whose error keeps the frames of the attempt alive, and so its activations
        state.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        objective = smaller
        tqdm.write(
            f"{state.stage}, step {state.step + 1}: out of memory ({reason}); going on with "
            f"{smaller.memory_setting()}. The effective batch stays"
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch has a class for its GPU allocator's, which is a RuntimeError too; of others there are only the words."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def _optimizer_step(
    state: TrainState, objective: Objective, config: OptimConfig, checkpoints: Path | None, world: World
) -> StepMetrics:
    learning_rate = learning_rate_at(state.step, config)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.zero_grad(set_to_none=True)
    loss: Tensor | float = 0.0
    tokens = 0
    for micro in objective.micro_losses(state.step):
        # the engines average gradients over the ranks, whose losses are to be added up
        (micro.loss * world.size if world.size > 1 else micro.loss).backward()
        value = micro.loss.detach() if micro.value is None else micro.value
        loss, tokens = loss + value, tokens + micro.tokens
    norm = torch.nn.utils.clip_grad_norm_(state.parameters.values(), config.max_grad_norm)
    norm_value = float(whole(norm))
    loss_value, all_tokens = world.sums(float(loss), tokens)
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        saved = list_checkpoints(checkpoints, state.stage) if checkpoints is not None else []
        raise RunError(
            f"{state.stage}, step {state.step + 1}: the loss is {loss_value}, the gradient norm {norm_value}; the run "
            f"stops here and nothing was written. Last good checkpoint: {saved[-1] if saved else 'none yet'}. "
            "Lower the learning rate, or look for damaged weights or data"
        )
    state.optimizer.step()
    return StepMetrics(
        stage=state.stage,
        step=state.step + 1,
        loss=loss_value,
        lr=learning_rate,
        grad_norm=norm_value,
        tokens=int(all_tokens),
        tokens_per_s=0.0,
        peak_memory_bytes=world.max(peak_memory_bytes(next(iter(state.parameters.values())).device)),
    )
