"""What a run leaves behind: how it is read, and the oracles."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import oracles
import samples
import torch
from harness import LLAMA, MUTATED, refused_or
from oracles import Unreadable, differing, digest, same_value, strict_json


def read_checkpoint(folder: Path) -> Any:
    from bivec.engine.checkpoint import load_checkpoint

    fresh = samples.train_state()
    before = {name: digest(parameter) for name, parameter in fresh.parameters.items()}
    try:
        loaded = load_checkpoint(folder / "mntp-000003", fresh)
    except BaseException:
        if {name: digest(parameter) for name, parameter in fresh.parameters.items()} != before:
            raise AssertionError("a refused checkpoint has changed the parameters") from None
        raise
    tensors = {f"parameter/{name}": digest(parameter) for name, parameter in loaded.parameters.items()}
    for name, parameter in loaded.parameters.items():
        for slot, value in loaded.optimizer.state[parameter].items():
            tensors[f"optimizer/{slot}/{name}"] = digest(torch.as_tensor(value))
    return loaded.step, tensors


@refused_or
def check_checkpoint(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """A strict reading of the safetensors file; the step of state.json, which is that of the folder's name."""
    stored = oracles.safetensors((case / "mntp-000003/state.safetensors").read_bytes())
    if any(tensor is None for tensor in stored.values()):
        return "a tensor that is not of floating point was accepted"
    content = strict_json((case / "mntp-000003/state.json").read_bytes())
    if not same_value(found[0], 3) or not same_value(content["step"], 3) or content["stage"] != "mntp":
        return f"step {found[0]} of {content}"
    if any(tensor.dtype != torch.float32 for tensor in stored.values()):
        return "a dtype that was never written was accepted"
    return differing({name: digest(tensor) for name, tensor in stored.items()}, found[1])


def read_run(folder: Path) -> Any:
    from bivec.engine.inputs import Inputs
    from bivec.engine.metrics import StepLog
    from bivec.engine.model_card import card_of_run
    from bivec.engine.presets import PRESETS
    from bivec.engine.recipe_arguments import RunOptions
    from bivec.engine.report import results_table
    from bivec.engine.run_files import (
        base_model,
        check_same_data,
        check_same_device,
        earlier_run,
        read_results,
        start_state,
    )
    from bivec.engine.trainer import StepMetrics

    options = RunOptions(folder, resume=True)
    earlier = earlier_run(PRESETS["smollm2-135m"], options)

    class Data(Inputs):
        def __init__(self) -> None:
            pass

        def fingerprints(self) -> dict[str, str]:
            return {"mntp": "300 rows", "simcse": "200 rows"}

    check_same_data(earlier, Data(), folder)
    check_same_device(earlier, "cpu", folder)
    results, seconds, peak = read_results(folder, True)
    table = results_table(results, {"dev": 10, "test": 10})
    card = card_of_run(folder)
    str(card)
    metrics = [asdict(line) for line in StepLog(folder / "metrics.jsonl", StepMetrics).read()]
    return {
        "recipe": without_nulls(earlier["recipe"]),
        "stages": [asdict(result) for result in results],
        "seconds": seconds,
        "peak": peak,
        "table": table,
        "metrics": metrics,
        "base": base_model(str(folder)),
        "state": start_state(str(folder), ()),
    }


def without_nulls(part: Any) -> Any:
    """A hyper-parameter that is null is one that is not there."""
    if not isinstance(part, dict):
        return part
    return {key: without_nulls(value) for key, value in part.items() if value is not None}


@refused_or
def check_run(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """Recipe and data are those of the run; results and metrics are what the files say, number for number."""
    strict_json((case / "run.json").read_bytes(), nan=True)
    content = strict_json((case / "results.json").read_bytes())
    stages = [{"sts_test_spearman": None, **stage} for stage in content["stages"]]
    if not all(
        same_value(list(one.items()), list({k: two[k] for k in one}.items()))
        for one, two in zip(found["stages"], stages, strict=True)
    ):
        return f"stages {found['stages']}, the file says {str(stages)[:200]}"
    if not same_value(content["seconds"], found["seconds"]) or not same_value(
        content["peak_memory_bytes"], found["peak"]
    ):
        return f"seconds {found['seconds']}, bytes {found['peak']}, the file says {str(content)[-120:]}"
    if found["recipe"] != valid["recipe"]:
        return "another recipe was accepted"
    if not (case / "metrics.jsonl").is_file():
        return "metrics of no file" if found["metrics"] else None
    *whole, last = (case / "metrics.jsonl").read_bytes().decode("utf-8", errors="replace").splitlines() or [""]
    kept = [strict_json(line.encode()) for line in whole]
    with contextlib.suppress(Unreadable):  # it may be cut short
        kept.append(strict_json(last.encode()))
    for one, two in zip(found["metrics"], kept, strict=False):
        if differing(one, two):
            return f"metrics: {differing(one, two)}"
    return None if abs(len(found["metrics"]) - len(kept)) <= 1 else "lines of metrics are missing"


def read_corpus(folder: Path) -> Any:
    import numpy as np

    (folder / "partial").rename(folder / ".out.npy.partial")
    return np.load(samples.encode_sample(folder, LLAMA[0]))


@refused_or
def check_corpus(source: Path, case: Path, name: str, valid: Any, found: Any) -> str | None:
    """The rows of a call that nobody stopped; but those of slices that are marked as done are what is in the file."""
    import numpy as np

    expected = valid.copy()
    if name.endswith("vectors.npy"):
        size = source.joinpath(name).stat().st_size
        (data,) = MUTATED
        if data is None:  # begun anew
            return None if found.tobytes() == expected.tobytes() else "other rows"
        if len(data) != size:
            raise Unreadable("another size")
        kept = np.frombuffer(data[size - valid.nbytes :], dtype=valid.dtype).reshape(valid.shape)
        expected[:4] = kept[:4]
    return None if found.tobytes() == expected.tobytes() else "other rows"
