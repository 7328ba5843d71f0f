"""What an objective hands to the training loop: the losses of a step's micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from bivec.engine.lora import Adapter
from bivec.kernels import fold_seed
from bivec.models import PackedBatch
from bivec.models.recompute import LEVELS as RECOMPUTE_LEVELS

LORA_SITE, ATTENTION_SITE = 1, 2  # folded into the stage's seed: the two dropouts must not share bits


class CutObjective(Protocol):
    """A dataclass of an objective that says how its step is cut."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def recompute(self) -> str:
        """See :meth:`bivec.models.Llama.forward`."""

    @property
    def micro_batch_tokens(self) -> int | None:
        """Tokens of one forward and backward; None = the whole step."""


AnyObjective = TypeVar("AnyObjective", bound=CutObjective)


@dataclass(frozen=True)
class MicroLoss:
    """The loss of one micro-batch, already weighted so that the step's loss is the sum."""

    loss: Tensor  # 0-dim
    tokens: int  # tokens that went through the model
    value: Tensor | float | None = None  # its share of the step's loss, where ``loss`` has only the gradient right


@contextmanager
def lora_noise(adapter: Adapter | None, seed: int, batch: PackedBatch) -> Iterator[None]:
    """LoRA dropout for one micro-batch, forward and backward; an evaluation between two steps must not see it."""
    if adapter is None:
        yield
        return
    adapter.set_noise(fold_seed(seed, LORA_SITE), batch.token_ids())
    try:
        yield
    finally:
        adapter.set_noise(None)


def with_more_recomputation(objective: AnyObjective) -> AnyObjective | None:
    """An objective whose model keeps less between forward and backward; None = it keeps the least already."""
    level = RECOMPUTE_LEVELS.index(objective.recompute) + 1
    return replace(objective, recompute=RECOMPUTE_LEVELS[level]) if level < len(RECOMPUTE_LEVELS) else None
