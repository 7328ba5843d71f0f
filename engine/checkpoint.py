"""Training checkpoints: the trainable tensors, the optimiser's state and the step, as safetensors and JSON.

A checkpoint is a directory ``checkpoints/<stage>-<step>/``; it gets its name only once it is whole, so a kill at any
moment leaves the previous one usable. Data order, masks and dropout follow from (seed, step) and need no state.

Tensors that are sharded over ranks are written by ``torch.distributed.checkpoint``, every rank its shards in files of
their own (safetensors too: nothing is ever unpickled). Either kind is read on any number of ranks, sharded or not.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bivec.engine.distributed import ALONE, World, is_sharded_tensor, sharded_like
from bivec.engine.errors import CheckpointError
from bivec.models.files import atomic_directory
from bivec.models.plain_json import parse_json

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException

WHOLE = "state.safetensors"  # of a checkpoint whose tensors are not sharded
SLOTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of every parameter
KEPT = 2  # checkpoints kept per stage: the last and the one before it


@dataclass(frozen=True)
class TrainState:
    """Where a stage stands: steps done, and what changes from step to step."""

    stage: str
    step: int  # optimiser steps done
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer


def save_checkpoint(directory: Path, state: TrainState, world: World = ALONE) -> Path:
    """Writes ``<directory>/<stage>-<step>`` and drops all but the last two of the stage.

    Every rank calls it. Rank 0 writes, and where tensors are sharded every rank its shards: then the directory must be
    on a file system that all of them see.

    Raises:
        BivecError: the disk is full; the earlier checkpoints are still there.
    """
    tensors = _tensors(state)
    sharded = any(map(is_sharded_tensor, tensors.values()))
    final = directory / f"{state.stage}-{state.step:06d}"
    if not world.is_main:
        if sharded:
            _write_shards(tensors, world.from_main(None))
        return final
    for abandoned in directory.glob(f".{state.stage}-*.tmp"):  # a kill in the middle of an earlier write
        shutil.rmtree(abandoned)
    with atomic_directory(final, last="state.json") as temporary:
        if sharded:
            _write_shards(tensors, world.from_main(str(temporary)))
        else:
            whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(whole, temporary / WHOLE)
        content: dict[str, Any] = {"stage": state.stage, "step": state.step}
        if sharded:
            shards = {file.name: file.stat().st_size for file in temporary.iterdir()}
            if len(shards) < world.size:
                raise CheckpointError(
                    f"{final}: {len(shards)} of {world.size} shards are there; the directory must be on a file system "
                    "that all ranks share"
                )
            content["shards"] = shards
        (temporary / "state.json").write_text(json.dumps(content), encoding="utf-8")
    for old in list_checkpoints(directory, state.stage)[:-KEPT]:
        # first under a name that is no checkpoint's: a kill in between leaves nothing that looks like one
        shutil.rmtree(old.rename(directory / f".{old.name}.old.tmp"))
    return final


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """Everything that changes from step to step: "parameter/<name>" and "optimizer/<slot>/<name>"."""
    names = {id(parameter): name for name, parameter in state.parameters.items()}
    tensors = {f"parameter/{name}": parameter.detach() for name, parameter in state.parameters.items()}
    for parameter, slots in state.optimizer.state.items():
        for slot, value in slots.items():
            tensors[f"optimizer/{slot}/{names[id(parameter)]}"] = torch.as_tensor(value).detach()
    return tensors


def _write_shards(tensors: dict[str, Tensor], directory: str) -> None:
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(directory, save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer, checkpoint_id=directory)
    except dcp.CheckpointException as error:  # a BaseException
        raise CheckpointError(f"{directory}: shards could not be written ({_reasons(error)})") from error


def _reasons(error: CheckpointException) -> str:
    """What went wrong, by rank; its own message is a list of types."""
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))


def list_checkpoints(directory: Path, stage: str) -> list[Path]:
    """The whole checkpoints of a stage, oldest first."""
    pattern = re.compile(rf"{re.escape(stage)}-\d{{6,}}")
    found = [path for path in directory.glob(f"{stage}-*") if pattern.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def load_checkpoint(path: Path, state: TrainState) -> TrainState:
    """Copies a checkpoint into the parameters and the optimiser of ``state``; returns it with the step set.

    Every rank calls it; how many wrote it, and whether its tensors were sharded, does not matter.

    Raises:
        CheckpointError: a missing or truncated file, or tensors that do not fit; nothing was copied then.
    """
    try:
        step = _stored_step(path)
        stored = _stored_shapes(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, SafetensorError) as error:
        raise _not_whole(path, error) from error
    trained = {name.partition("/")[2] for name in stored if name.startswith("parameter/")}
    if trained != state.parameters.keys():
        odd = sorted(trained ^ state.parameters.keys())
        raise CheckpointError(f"{path}: it holds other parameters than this run trains ({len(odd)}, first: {odd[0]})")
    targets = _targets(path, stored, state)
    try:
        _read(path, targets)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _not_whole(path, error) from error
    for name, parameter in state.parameters.items():
        parameter.data.copy_(targets[f"parameter/{name}"])
        state.optimizer.state[parameter] = {}
    for key, value in targets.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            slot, _, name = rest.partition("/")
            state.optimizer.state[state.parameters[name]][slot] = value
    return TrainState(state.stage, step, state.parameters, state.optimizer)


def _stored_step(path: Path) -> int:
    """The step that ``state.json`` names, which must be the directory's; all shards have the sizes written there."""
    content = parse_json((path / "state.json").read_bytes(), allow_nan=False)
    step = content["step"]
    if type(step) is not int or path.name != f"{content['stage']}-{step:06d}":
        raise ValueError(f"state.json is of stage {content['stage']!r}, step {step!r}")
    for name, size in content.get("shards", {}).items():  # their reader would not miss one
        if (found := (path / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found} bytes, {size} were written")
    return step


def _targets(path: Path, stored: dict[str, torch.Size], state: TrainState) -> dict[str, Tensor]:
    """Zeros for every stored tensor, of the shape that it must have here.

    Raises:
        CheckpointError: a tensor of another shape, or of no use; a parameter with a part of the optimiser's state.
    """
    targets: dict[str, Tensor] = {}
    slots: dict[str, set[str]] = {name: set() for name in state.parameters}
    for key, shape in stored.items():
        kind, _, rest = key.partition("/")
        slot, _, name = rest.partition("/") if kind == "optimizer" else ("", "", rest)
        parameter = state.parameters.get(name) if kind in ("parameter", "optimizer") else None
        if parameter is None or (slot and slot not in SLOTS):
            raise CheckpointError(f"{path}: {key} has shape {list(shape)}, this run has no such parameter")
        # beside the moments, which have the parameter's shape, AdamW keeps its step counter, a single number
        wanted = torch.Size() if slot == "step" else parameter.shape
        if shape != wanted:
            raise CheckpointError(f"{path}: {key} has shape {list(shape)}, this run has {list(wanted)}")
        slots[name] |= {slot} - {""}
        # like the parameter: sharded where it is
        single = torch.zeros(shape, device=parameter.device) if slot == "step" else None
        targets[key] = torch.zeros_like(parameter, requires_grad=False) if single is None else single
    # none at all: a parameter that has had no gradient yet
    if odd := [name for name, found in slots.items() if len(found) not in (0, len(SLOTS))]:
        raise CheckpointError(f"{path}: {odd[0]} lacks a part of the optimiser's state ({', '.join(SLOTS)})")
    return targets


def _not_whole(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{path}: not a whole checkpoint ({error}); delete it to resume from the one before")


def _stored_shapes(path: Path) -> dict[str, torch.Size]:
    """What the checkpoint holds, by its headers."""
    file = path / WHOLE
    if file.is_file():
        with safe_open(file, framework="pt") as handle:
            return {key: torch.Size(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118 - no dict
    import torch.distributed.checkpoint as dcp

    # of tensors alone: this reader knows nothing else
    stored: dict[str, Any] = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    if not stored:
        raise ValueError(f"neither {WHOLE} nor shards are there")
    return {key: entry.size for key, entry in stored.items()}


def _read(path: Path, targets: dict[str, Tensor]) -> None:
    """Fills the tensors, each sharded as it is here."""
    file = path / WHOLE
    if not file.is_file():
        import torch.distributed.checkpoint as dcp

        reader = dcp.HuggingFaceStorageReader(str(path))
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
        for key, target in targets.items():
            _check_dtype(key, stored[key].properties.dtype, target)
        try:
            dcp.load(targets, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
        except dcp.CheckpointException as error:  # a BaseException
            raise ValueError(_reasons(error)) from error
        return
    with safe_open(file, framework="pt") as handle:
        for key, target in targets.items():
            tensor = handle.get_tensor(key)
            _check_dtype(key, tensor.dtype, target)
            tensor = tensor.to(target.device)
            target.copy_(sharded_like(tensor, target))


def _check_dtype(key: str, stored: torch.dtype, target: Tensor) -> None:
    if stored != target.dtype:
        raise ValueError(f"{key} is stored as {stored}, this run has {target.dtype}")
