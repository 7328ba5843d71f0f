"""AdamW and the linear schedule of the original recipes (METHOD 3.5).

The decay reaches zero at the *horizon*, training stops at ``steps``: the original decays over three epochs and stops by
callback at step 1000, so its last learning rate is 95 % of the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from bivec.models.errors import ConfigError


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule of one stage.

    Raises:
        ConfigError: a learning rate, number of steps, horizon or clipping bound that is not positive, a learning rate
            that is infinite, or a negative warm-up.
    """

    learning_rate: float
    steps: int  # optimiser steps after which the stage stops
    horizon: int | None = None  # step at which the decay reaches zero; None = steps
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0  # of all gradients together; float("inf") = no clipping

    def __post_init__(self) -> None:
        horizon = self.steps if self.horizon is None else self.horizon
        positive = self.steps > 0 and horizon > 0 and self.max_grad_norm > 0
        if not (positive and 0 < self.learning_rate < float("inf") and self.warmup_steps >= 0):
            raise ConfigError(
                "learning_rate (finite), steps, horizon and max_grad_norm must be positive and warmup_steps not "
                f"negative, got {self.learning_rate}, {self.steps}, {self.horizon}, {self.max_grad_norm} and "
                f"{self.warmup_steps}"
            )


def learning_rate_at(step: int, config: OptimConfig) -> float:
    """Learning rate of optimiser step ``step``, counted from 0: linear warm-up, then linear decay to the horizon."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    horizon = config.steps if config.horizon is None else config.horizon
    left = (horizon - step) / max(1, horizon - config.warmup_steps)
    return config.learning_rate * max(0.0, left)


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW: one launch a step over all tensors."""
    return torch.optim.AdamW(
        list(parameters),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
