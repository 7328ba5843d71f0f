"""How ``--memory`` cuts the steps of a recipe: the planner's answers for every stage, from what the recipe reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bivec.engine.distributed import ALONE, World
from bivec.engine.estimate import setting_of
from bivec.engine.inputs import Inputs
from bivec.engine.planner import Plan, Setting, batch_tokens, free_memory, parse_memory, plan_contrastive, plan_mntp
from bivec.engine.recipe import Recipe
from bivec.engine.recipe_arguments import RunOptions
from bivec.engine.supervised import TripleRows
from bivec.engine.triple_batches import TripleBatches
from bivec.kernels.backend import resolve

SAMPLED_STEPS = 16  # of the supervised stage, whose texts are read as they are needed
MARGIN = 1.1  # the largest batch is larger than the largest of these


def plan_cuts(
    recipe: Recipe,
    options: RunOptions,
    inputs: Inputs,
    rows: TripleRows | None,
    device: torch.device,
    dtype: torch.dtype,
    world: World = ALONE,
) -> dict[str, Plan]:
    """By stage, how its steps are cut to fit ``options.memory``.

    Args:
        recipe: of its stages those that train are planned.
        options: memory (None as "auto") and backend.
        inputs: what the recipe has read.
        rows: of the supervised stage.
        device: of the run.
        dtype: of the weights.
        world: the ranks that share the steps, and the machine's memory where ``device`` is a CPU.

    Raises:
        RunError: a stage that does not fit however it is cut.
    """
    asked = None if options.memory is None else parse_memory(options.memory)
    sharing = world.local_size if device.type == "cpu" else 1
    available = free_memory(device) // sharing if asked is None else asked
    triton = resolve(options.backend, "flash_attention", device) == "triton"

    def setting(name: str) -> Setting:
        stage = getattr(recipe, name)
        shards = world.size if stage.tuning == "full" or options.shard else None
        return setting_of(inputs.config, stage, dtype.itemsize, device.type, triton=triton, shards=shards)

    plans = {}
    if "mntp" in recipe.stages:
        stage = recipe.mntp
        plans["mntp"] = plan_mntp(
            setting("mntp"), world.shares(stage.batch_size)[0], stage.sequence_length, stage.mask_probability, available
        )
    if "simcse" in recipe.stages and inputs.sentences is not None:
        lengths, batch_size = inputs.sentences.lengths, world.shares(recipe.simcse.batch_size)[0]
        tokens = 2 * batch_tokens(lengths, batch_size)
        plans["simcse"] = plan_contrastive(
            setting("simcse"), "simcse", tokens, 2 * batch_size, int(lengths.max()), available
        )
    if rows is not None:
        of_steps = [rows.of(step, world=world).lengths for step in _sampled(rows.batches)]
        tokens = round(MARGIN * max(int(one.sum()) for one in of_steps))
        sequences = round(MARGIN * max(map(len, of_steps)))
        longest = min(tokens, rows.text_format.max_length)
        plans["supervised"] = plan_contrastive(
            setting("supervised"), "supervised", tokens, sequences, longest, available
        )
    return plans


def as_cut(name: str, plan: Plan) -> dict[str, Any]:
    """The fields of the stage's objective that a plan decides."""
    whole = name == "simcse" and plan.accumulation == 1  # a supervised step may be larger than those that were sampled
    return {"micro_batch_tokens": None if whole else plan.micro_batch_tokens, "recompute": plan.recompute}


def _sampled(batches: TripleBatches) -> list[int]:
    """Some of the steps of an epoch, evenly, and the first of every data set."""
    spread = {round(step) for step in np.linspace(0, batches.steps_per_epoch - 1, SAMPLED_STEPS)}
    first: dict[int, int] = {}
    for step in range(batches.steps_per_epoch):
        first.setdefault(batches.rows(step)[0], step)
    return sorted(spread | set(first.values()))
