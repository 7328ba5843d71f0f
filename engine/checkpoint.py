"""Training checkpoints: the trainable tensors, the optimiser's state and the step, as safetensors and JSON.

A checkpoint is a directory ``checkpoints/<stage>-<step>/``; it gets its name only once it is whole, so a kill at any
moment leaves the previous one usable. Data order, masks and dropout follow from (seed, step) and need no state.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bivec.engine.errors import CheckpointError
from bivec.models.files import atomic_directory

KEPT = 2  # checkpoints kept per stage: the last and the one before it


@dataclass(frozen=True)
class TrainState:
    """Where a stage stands: steps done, and what changes from step to step."""

    stage: str
    step: int  # optimiser steps done
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer


def save_checkpoint(directory: Path, state: TrainState) -> Path:
    """Writes ``<directory>/<stage>-<step>`` and drops all but the last two of the stage.

    Raises:
        BivecError: the disk is full; the earlier checkpoints are still there.
    """
    tensors: dict[str, Tensor] = {}
    names = {id(parameter): name for name, parameter in state.parameters.items()}
    for name, parameter in state.parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach().cpu().contiguous()
    for parameter, slots in state.optimizer.state.items():
        for slot, value in slots.items():
            tensors[f"optimizer/{slot}/{names[id(parameter)]}"] = torch.as_tensor(value).detach().cpu().contiguous()
    for abandoned in directory.glob(f".{state.stage}-*.tmp"):  # a kill in the middle of an earlier write
        shutil.rmtree(abandoned)
    final = directory / f"{state.stage}-{state.step:06d}"
    with atomic_directory(final, last="state.json") as temporary:
        save_file(tensors, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps({"stage": state.stage, "step": state.step}), encoding="utf-8")
    for old in list_checkpoints(directory, state.stage)[:-KEPT]:
        shutil.rmtree(old)
    return final


def list_checkpoints(directory: Path, stage: str) -> list[Path]:
    """The whole checkpoints of a stage, oldest first."""
    pattern = re.compile(rf"{re.escape(stage)}-\d{{6,}}")
    found = [path for path in directory.glob(f"{stage}-*") if pattern.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def load_checkpoint(path: Path, state: TrainState) -> TrainState:
    """Copies a checkpoint into the parameters and the optimiser of ``state``; returns it with the step set.

    Raises:
        CheckpointError: a missing or truncated file, or tensors that do not fit; nothing was copied then.
    """
    try:
        step = json.loads((path / "state.json").read_text(encoding="utf-8"))["step"]
        tensors = load_file(path / "state.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not a whole checkpoint ({error}); delete it to resume from the one before"
        ) from error
    trained = {name.partition("/")[2] for name in tensors if name.startswith("parameter/")}
    if trained != state.parameters.keys():
        odd = sorted(trained ^ state.parameters.keys())
        raise CheckpointError(f"{path}: it holds other parameters than this run trains ({len(odd)}, first: {odd[0]})")
    slots: dict[str, dict[str, Tensor]] = {name: {} for name in trained}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        slot, _, name = rest.partition("/") if kind == "optimizer" else ("", "", rest)
        parameter = state.parameters.get(name)
        # beside the moments, which have the parameter's shape, AdamW keeps its step counter, a single number
        if parameter is None or (tensor.shape != parameter.shape and slot != "step"):
            wanted = "no such parameter" if parameter is None else list(parameter.shape)
            raise CheckpointError(f"{path}: {key} has shape {list(tensor.shape)}, this run has {wanted}")
        if kind == "optimizer":
            slots[name][slot] = tensor
    for name, parameter in state.parameters.items():
        parameter.data.copy_(tensors[f"parameter/{name}"])
        state.optimizer.state[parameter] = {
            # copied: tensors read by safetensors may be views of the mapped file, which rotation deletes later
            slot: value.to(parameter.device, copy=True)
            for slot, value in slots[name].items()
        }
    return TrainState(state.stage, step, state.parameters, state.optimizer)
