"""What tells one run from another, ``run.json`` and ``results.json``, and what ``--resume`` must find there."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bivec.engine.distributed import ALONE, World
from bivec.engine.encoder_config import EncoderConfig, stored_encoder_config
from bivec.engine.errors import RunError, first_line
from bivec.engine.inputs import Inputs
from bivec.engine.json_files import json_text
from bivec.engine.recipe import RUN_FILE, TRAINED, Recipe, as_dict, differences
from bivec.engine.recipe_arguments import RunOptions
from bivec.engine.records import check_types
from bivec.engine.report import StageResult
from bivec.engine.text_format import resolve_template
from bivec.kernels import BackendError
from bivec.kernels.backend import resolve
from bivec.models.files import write_text_atomic
from bivec.models.plain_json import parse_json

LEFT_BY_A_RUN = ("metrics.jsonl", "evaluations.jsonl", "checkpoints", *TRAINED, "results.json")
VERSIONS_OF = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "sentencepiece",
    "numpy",
    "scipy",
    "triton",
)


def write_run_file(directory: Path, recipe: Recipe, inputs: Inputs, device: str, **fields: Any) -> None:
    """Everything that the run's result depends on; ``fields`` do not belong to the recipe."""
    versions = {"bivec": installed_version("bivec"), "python": platform.python_version()}
    versions |= {name: version for name in VERSIONS_OF if (version := installed_version(name))}
    content = {
        "recipe": as_dict(recipe),
        "seed": recipe.seed,
        "versions": versions,
        "data": inputs.fingerprints(),
        "device": device,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        **fields,
    }
    write_text_atomic(directory / RUN_FILE, json_text(content))


def rewrite_run_file(directory: Path, **fields: Any) -> None:
    """Changes fields that do not belong to the recipe."""
    file = directory / RUN_FILE
    content = json.loads(file.read_text(encoding="utf-8")) | fields
    write_text_atomic(file, json_text(content))


def recorded_recipe(directory: Path) -> dict[str, Any]:
    """The recipe of a run, as its ``run.json`` has it.

    Raises:
        RunError: it is not there, or not that of a run.
    """
    file = directory / RUN_FILE
    try:
        recipe = parse_json(file.read_bytes())["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: not the {RUN_FILE} of a run of this version ({error!r})") from error
    if not isinstance(recipe, dict):
        raise RunError(f"{file}: not the {RUN_FILE} of a run of this version (recipe is {repr(recipe)[:80]})")
    return recipe


def earlier_run(recipe: Recipe, options: RunOptions) -> dict[str, Any] | None:
    """The ``run.json`` of the run that ``--resume`` goes on with, None for a new run. Two runs are never mixed."""
    directory, file = options.output_dir, options.output_dir / RUN_FILE
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{directory} is a file; give another --output-dir")
    if not file.is_file():
        if options.resume:
            raise RunError(f"{directory}: --resume was given, but there is no {RUN_FILE}; leave --resume out to start")
        left = [name for name in LEFT_BY_A_RUN if (directory / name).exists()]
        if left:
            raise RunError(
                f"{directory}: holds {', '.join(left)} of a run, but no {RUN_FILE}; give another --output-dir"
            )
        return None
    if not options.resume:
        raise RunError(f"{directory}: holds a run already; give --resume to go on with it, or another --output-dir")
    try:
        earlier: dict[str, Any] = parse_json(file.read_bytes())  # max_grad_norm may be Infinity
        changed = differences(earlier["recipe"], as_dict(recipe))
        data = earlier.get("data", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file}: not the {RUN_FILE} of a recipe ({error}); choose another --output-dir") from error
    if not isinstance(data, dict):
        raise RunError(
            f"{file}: not the {RUN_FILE} of a recipe (data is {repr(data)[:80]}, expected an object); choose another "
            "--output-dir"
        )
    if changed:
        raise RunError(
            f"{directory}: --resume with other hyper-parameters than the run was started with: {'; '.join(changed)}"
        )
    return earlier


def check_same_data(earlier: dict[str, Any] | None, inputs: Inputs, directory: Path) -> None:
    """A data file may change under the same name; the losses of a resumed run would be others."""
    if earlier is None:
        return
    for stage, now in inputs.fingerprints().items():
        before = earlier.get("data", {}).get(stage)
        if before != now:
            raise RunError(
                f"{directory}: --resume with other text: --{stage}-data gives {now}, at the start of the run {before}; "
                "the file or the tokenizer has changed. Put the old one back or start anew in another --output-dir"
            )


def check_shared(directory: Path, world: World, patience: int = 10) -> None:
    """Every process must see what rank 0 has written; a network file system may take some seconds."""
    text = world.from_main((directory / RUN_FILE).read_text(encoding="utf-8") if world.is_main else None)
    for _ in range(patience):
        if (directory / RUN_FILE).is_file() and (directory / RUN_FILE).read_text(encoding="utf-8") == text:
            return
        time.sleep(1)
    raise RunError(
        f"{directory}: rank {world.rank} does not see the {RUN_FILE} that rank 0 has written; give an --output-dir on "
        "a file system that all machines share"
    )


def check_same_device(earlier: dict[str, Any] | None, device: str, directory: Path) -> None:
    """Another kind of device computes in another dtype: the run would go on, but not as the same run."""
    before = None if earlier is None else str(earlier.get("device"))
    if before is not None and before.partition(":")[0] != device.partition(":")[0]:
        raise RunError(
            f"{directory}: --resume on {device}, but the run was started on {before}; give --device {before}"
        )


def device_type(asked: str | None) -> str:
    """The kind of device, "cpu" or "cuda": the one asked for, else a GPU where there is one."""
    return (asked or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")[0]


def chosen_device(asked: str | None, backend: str | None, world: World = ALONE) -> str:
    """The device of this process, tried; and that the kernels' backend can be had.

    Raises:
        RunError: one of them cannot.
    """
    device, kind = asked or device_type(asked), device_type(asked)
    if world.size > 1 and kind != "cpu":
        count = torch.cuda.device_count()
        if ":" in device:
            raise RunError(f"--device {device}: each of {world.size} processes has one of its own; give --device cuda")
        if 1 < count < world.local_size:  # some launchers show each process its own alone
            raise RunError(f"{world.local_size} processes on this machine, but {count} GPUs; start one a GPU")
        device = f"{device}:{world.local_rank if count > 1 else 0}"
    try:
        torch.empty(0, device=device)
        if kind == "cuda":
            torch.cuda.set_device(device)  # where FSDP2 puts what it makes
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {device}: not usable here ({first_line(error)})") from error
    try:
        resolve(backend, "flash_attention", torch.device(device))
    except (BackendError, ValueError) as error:
        raise RunError(f"--backend: {error}") from error
    return device


def read_results(directory: Path, resume: bool) -> tuple[list[StageResult], float, int]:
    """The results so far, with the seconds and the peak memory spent on them."""
    file = directory / "results.json"
    if not (resume and file.is_file()):
        return [], 0.0, 0
    try:
        return _results_of(parse_json(file.read_bytes(), allow_nan=False))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise RunError(f"{file}: not a results file of this version ({error}); delete it to evaluate again") from error


def _results_of(raw: Any) -> tuple[list[StageResult], float, int]:
    results = [StageResult(**stage) for stage in raw["stages"]]
    for result in results:
        check_types(result)
    seconds, peak = raw["seconds"], raw["peak_memory_bytes"]
    if type(seconds) not in (int, float) or type(peak) is not int:
        raise ValueError(f"seconds and peak_memory_bytes are {seconds!r} and {peak!r}, expected numbers")
    return results, float(seconds), peak


def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def base_model(model: str) -> str:
    """The decoder that a model was made of: of a run directory the ``--model`` of that run, and so on.

    Directories that were trained from each other in turn have no known decoder: the one where the circle closes.
    """
    met: set[str] = set()
    while (place := os.path.realpath(model)) not in met:
        met.add(place)
        try:
            content = parse_json((Path(model) / RUN_FILE).read_bytes())
            model = str(content["recipe"]["model"])
        except (OSError, ValueError, KeyError, TypeError):
            break
    return model


def chosen_template(recipe: Recipe, stored: EncoderConfig | None) -> str | None:
    """Of supervised training: the one asked for, else that of the encoder given, else by the decoder's name."""
    asked, base = recipe.supervised.template, base_model(recipe.model)
    given = asked if asked != "auto" else None if stored is None else stored.template
    template = resolve_template(given, base)
    own = stored is not None and stored.template is not None
    why = "as asked for" if asked != "auto" else "as the encoder has it that was given" if own else f"of {base}"
    print(f"supervised: {'no template' if template is None else f'template {template!r}'}, {why}", flush=True)
    return template


def start_settings(model: Path, adapters: Sequence[str], *, is_causal: bool | None) -> EncoderConfig | None:
    """How the model that a run begins with is used: as the last adapter says whose folder says any, else as its own.

    None = a decoder, of which no file says it. ``is_causal``: see ``stored_encoder_config``.
    """
    folders = (*map(Path, reversed(adapters)), model)
    settings = (stored_encoder_config(folder, is_causal=is_causal) for folder in folders)
    return next((found for found in settings if found is not None), None)


def start_state(model: str, adapters: Sequence[str], stored: EncoderConfig | None = None) -> str:
    """What has been done to the model before the run: "bi", or what the run that made it and its adapters say.

    The mask, with which the name begins, is that of ``stored`` (:func:`start_settings`), if it is given.
    """
    try:
        content = parse_json((Path(model) / "results.json").read_bytes())
        state = str(content["stages"][-1]["stage"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        state = "bi"
    mask, *done = state.split("+")
    if stored is not None:
        mask = "uni" if stored.causal else "bi"
    return "+".join([mask, *done, *(name for name in (Path(x).name for x in adapters) if name in TRAINED)])
