"""One rank of tests/engine/test_ranks.py: a step of every objective, and short runs with checkpoints.

    python ranks_worker.py steps MODEL_DIR OUT      loss and gradients of every case, into OUT (rank 0)
    python ranks_worker.py train MODEL_DIR DIR STEPS [sharded]
    python ranks_worker.py lose MODEL_DIR DIR SIGKILL|SIGSTOP RANK   what a rank does to itself in the middle of a step

The test imports it too, for the same objectives in one process.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bivec.engine.data import BlockDataset
from bivec.engine.distributed import (
    ALONE,
    World,
    data_parallel,
    launched,
    process_group,
    whole,
)
from bivec.engine.lora import LoraConfig, add_lora
from bivec.engine.masking import MaskingConfig
from bivec.engine.objectives import MntpObjective, SimcseObjective
from bivec.engine.optim import OptimConfig
from bivec.engine.sharding import attach_head, shard
from bivec.engine.supervised import SupervisedObjective, TripleRows
from bivec.engine.text_format import TextFormat
from bivec.engine.tokenizer import load_tokenizer
from bivec.engine.trainer import Intervals, train
from bivec.engine.triple_batches import TripleBatches
from bivec.engine.triples import Triple
from bivec.models import load_pretrained

BATCH = 5  # of two ranks one has three samples, the other two
STEPS = 4
OPTIM = OptimConfig(learning_rate=1e-2, steps=STEPS)
OBJECTIVES = ("mntp", "simcse", "supervised")
MODES = ("replicated", "sharded", "full")  # and "head": an adapter and the LM head, replicated
SENTENCES = [[0, 5, 9, 300, 42], [0, 17], [0, *range(100, 112)], [0, 3, 3, 3, 3, 3], [0, 8, 700], [0, 2, 4, 6, 8, 10]]
TRIPLES = [
    Triple("who sang it", "the song was sung by a choir", ("a ship sailed", "the king is old"), "Find a passage"),
    Triple("a river in the north", "the river runs to the sea", ("the town has a church",), "Find a passage"),
    Triple("what is the capital", "it became the capital in 1901", (), "Find a passage"),
    Triple("a game of two teams", "two teams of eleven play", ("the song was sung by a choir",)),
    Triple("where they met", "they met in the town on the river", ()),
    Triple("old kings", "the king is old", ("a queen", "a ship sailed", "the sea")),
]


class Listed(list):
    """Triples in memory, with the name of a data set."""

    name = "listed"


@dataclass(frozen=True)
class Case:
    objective: str
    dtype: str = "float64"
    micro_batch_tokens: int | None = None
    mode: str = "replicated"

    def __str__(self) -> str:
        return f"{self.objective}-{self.dtype}-{self.micro_batch_tokens}-{self.mode}"


CASES = [
    *(Case(name, dtype, cut) for name in OBJECTIVES for dtype in ("float64", "float32") for cut in (None, 16)),
    *(Case(name, "float64", cut, mode) for name in OBJECTIVES for cut in (None, 16) for mode in ("sharded", "full")),
    *(Case("mntp", "float64", cut, "head") for cut in (None, 16)),
    Case("simcse", "float32", 16, "sharded"),
    Case("mntp", "float32", 16, "full"),
]


def build(case: Case, directory: str | Path, world: World = ALONE):
    """The objective, and the tensors that it trains; the group of processes is there already."""
    dtype = getattr(torch, case.dtype)
    checkpoint = load_pretrained(directory, dtype=dtype)
    model, head, adapter = checkpoint.model, checkpoint.lm_head_weight, None
    model.requires_grad_(case.mode == "full")
    if case.mode != "full":
        adapter = add_lora(model, LoraConfig(rank=4, dropout=0.1), seed=1)
        for number, parameter in enumerate(adapter.named_parameters().values()):
            values = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data = (0.2 * values - 0.1).to(dtype)  # an adapter is fp32, whatever the model
    run_model = model
    if case.mode == "head":
        head = attach_head(model, head, trained=True)()
    if case.mode in ("replicated", "head") or not torch.distributed.is_initialized():
        run_model = data_parallel(model, world)
    else:
        head = attach_head(model, head, trained=case.mode == "full") if case.objective == "mntp" else None
        shard(model, world, "cpu")
    common = {
        "seed": 7,
        "attention_dropout": 0.2,
        "micro_batch_tokens": case.micro_batch_tokens,
        "world": world,
    }
    if case.objective == "mntp":
        ids = np.random.default_rng(0).integers(2, 1000, (6, 16)).astype(np.int32)
        ids[:, 0] = 0
        masking = MaskingConfig(mask_token_id=64, vocab_size=1000, probability=0.3)
        if case.mode == "full" and isinstance(head, torch.Tensor):
            head.requires_grad_()
        objective = MntpObjective(run_model, head, adapter, BlockDataset(ids, ids == 0), masking, BATCH, **common)
    elif case.objective == "simcse":
        objective = SimcseObjective(run_model, adapter, SENTENCES, BATCH, **common)
    else:
        rows = TripleRows(
            TripleBatches([Listed(TRIPLES)], BATCH, seed=3), TextFormat(load_tokenizer(directory), max_length=64)
        )
        objective = SupervisedObjective(run_model, adapter, rows, **common)
    if adapter is not None:
        return objective, adapter.named_parameters() | ({"lm_head_weight": head} if case.mode == "head" else {})
    parameters = dict(model.named_parameters())
    if case.objective == "mntp" and isinstance(head, torch.Tensor):
        parameters["lm_head_weight"] = head
    return objective, parameters


def step(case: Case, directory: str | Path, world: World = ALONE, number: int = 3):
    """Loss and gradients of one step, of all ranks together."""
    objective, parameters = build(case, directory, world)
    loss = 0.0
    for micro in objective.micro_losses(number):
        (micro.loss * world.size).backward()
        loss += float(micro.loss.detach() if micro.value is None else micro.value)
    (loss,) = world.sums(loss)
    return loss, {name: whole(parameter.grad).detach() for name, parameter in parameters.items()}


def run(directory, checkpoints, steps, world, mode="replicated", objective="supervised", before=None, **options):
    """Trains to ``steps``; returns the losses of its steps and the trained tensors."""
    found, parameters = build(Case(objective, "float64", 40, mode), directory, world)
    if before is not None:
        found = before(found)
    losses: list[float] = []
    optim = replace(OPTIM, steps=steps, horizon=STEPS)
    train(
        "stage",
        found,
        parameters,
        optim,
        checkpoints=Path(checkpoints),
        log=lambda metrics: losses.append(metrics.loss),
        resume=True,
        progress=False,
        world=world,
        **options,
    )
    return losses, {name: whole(parameter.detach()) for name, parameter in parameters.items()}


class Dies:
    """An objective whose third step is the last thing that this rank does."""

    def __init__(self, objective, end: signal.Signals | None):
        self.objective, self.end = objective, end

    def micro_losses(self, number: int):
        for micro in self.objective.micro_losses(number):
            if number == 2 and self.end is not None:
                os.kill(os.getpid(), self.end)
            yield micro


def main() -> None:
    what, directory, place, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    world = launched()
    with process_group(world, "cpu", timeout_seconds=10 if "SIGSTOP" in rest else 60):
        if what == "steps":
            results = {str(case): step(case, directory, world) for case in CASES}
            if world.is_main:
                torch.save(results, place)
        elif what == "train":
            losses, trained = run(directory, place, int(rest[0]), world, *rest[1:], intervals=Intervals(save=1))
            if world.is_main:
                torch.save((losses, trained), Path(place) / "result.pt")
        elif what == "lose":
            run(
                directory,
                place,
                STEPS,
                world,
                before=lambda objective: Dies(
                    objective, signal.Signals[rest[0]] if world.rank == int(rest[1]) else None
                ),
                intervals=Intervals(save=1),
            )


if __name__ == "__main__":
    main()
