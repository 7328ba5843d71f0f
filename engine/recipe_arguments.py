"""The command line that all recipes share: a recipe's fields as flags, and how it is run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from bivec.engine.distributed import check_timeout
from bivec.engine.errors import ConfigError, RunError
from bivec.engine.planner import parse_memory
from bivec.engine.recipe import STAGES, Recipe

# fields of Recipe that have a flag each; the others are reached by --set
OWN_FLAGS = (
    "model",
    "mntp_data",
    "simcse_data",
    "supervised_data",
    "adapters",
    "mntp_column",
    "simcse_column",
    "sts_dev",
    "sts_test",
    "stages",
    "seed",
    "dtype",
)


@dataclass(frozen=True)
class RunOptions:
    """How a recipe is run; none of it changes the result beyond rounding."""

    output_dir: Path
    resume: bool = False
    dry_run: bool = False
    device: str | None = None
    backend: str | None = None
    memory: str | None = None  # "auto" or a size: the planner cuts the steps; None = the recipe's micro-batches
    shard: bool = False  # spread the weights over the processes (FSDP2), instead of a copy in each
    timeout: float = 600.0  # seconds that a process waits for the others

    def __post_init__(self) -> None:
        check_timeout(self.timeout)


def smoke(recipe: Recipe) -> Recipe:
    """A few steps of every stage on a little data: shows that everything works, not that it helps."""
    return replace(
        recipe,
        mntp=replace(
            recipe.mntp, optim=replace(recipe.mntp.optim, steps=3), batch_size=2, sequence_length=32, save_every=2
        ),
        simcse=replace(
            recipe.simcse, optim=replace(recipe.simcse.optim, steps=3), batch_size=4, max_length=32, save_every=2
        ),
        supervised=replace(
            recipe.supervised,
            optim=replace(recipe.supervised.optim, steps=3, warmup_steps=0),
            batch_size=4,
            max_length=64,
            save_every=2,
        ),
        data_limit=200,
        eval_pairs=16,
    )


def parse_arguments(
    recipe: Recipe, description: str | None, arguments: Sequence[str] | None = None
) -> tuple[Recipe, RunOptions]:
    """Reads the command line that all recipes share.

    Returns:
        The recipe with the flags applied, and the options of the run.

    Raises:
        RunError: an unknown stage or hyper-parameter, or a value of the wrong kind or out of range.
    """
    return apply_arguments(recipe, recipe_parser(recipe, description).parse_args(arguments))


def recipe_parser(recipe: Recipe, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """A flag for everything that a recipe and its run can be told; the defaults are the recipe's.

    Args:
        recipe: the defaults.
        description: for ``--help``.
        options: further arguments of ``ArgumentParser``.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options
    )
    _add_input_flags(parser, recipe)
    _add_run_flags(parser, recipe)
    _add_ways(parser, recipe)
    return parser


def _add_input_flags(parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    """What the recipe reads."""
    add = parser.add_argument
    add("--model", default=recipe.model, help="decoder: a directory, a .gguf file or a hub id (default: %(default)s)")
    add(
        "--mntp-data",
        default=recipe.mntp_data,
        help="text for MNTP: .txt (one text a line), .jsonl, .csv, .parquet or a hub id (default: %(default)s)",
    )
    add(
        "--simcse-data",
        default=recipe.simcse_data,
        help="sentences for SimCSE, one a row, same formats (default: %(default)s)",
    )
    add(
        "--supervised-data",
        default=recipe.supervised_data,
        help="queries with positives and hard negatives: .jsonl, .parquet, a folder of them or a hub id "
        "(default: %(default)s)",
    )
    add(
        "--adapters",
        default=",".join(recipe.adapters),
        help="PEFT adapters to merge into the model first, separated by commas, such as runs/x/mntp; the run "
        "begins with pooling, mask, template and length as the last one's folder says them",
    )
    add(
        "--mntp-column",
        default=recipe.mntp_column,
        help="column of --mntp-data that holds the text (default: text, else the only string column)",
    )
    add("--simcse-column", default=recipe.simcse_column, help="the same for --simcse-data")
    add(
        "--sts-dev",
        default=recipe.sts_dev,
        help="CSV with sentence1,sentence2,score, evaluated after every stage (default: the STS-B dev set that ships)",
    )
    add(
        "--sts-test",
        default=recipe.sts_test,
        help="the same, read once at the end (default: the STS-B test set that ships)",
    )


def _add_run_flags(parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    """Where it runs, and which of its stages."""
    add = parser.add_argument
    add(
        "--output-dir",
        type=Path,
        default=Path("runs") / recipe.name,
        help="where the run is written (default: %(default)s)",
    )
    add(
        "--stages",
        default=",".join(recipe.stages),
        help="which of bi,mntp,simcse,supervised to run (default: %(default)s)",
    )
    add("--seed", type=int, default=recipe.seed, help="of data order, masks, dropout and LoRA (default: %(default)s)")
    add("--device", help="torch device, such as cuda or cpu (default: cuda where there is one)")
    add(
        "--dtype",
        default=recipe.dtype,
        help="of the frozen weights: float32, bfloat16 … (default: float32 on a CPU, bfloat16 elsewhere)",
    )
    add("--backend", choices=("torch", "triton"), help="of the kernels (default: chosen by device)")
    add(
        "--memory",
        metavar="auto|24GiB",
        help="cut every step so that it fits: what is free on the device, or this much (default: the recipe's cut)",
    )
    add(
        "--shard",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="spread the weights over the processes of torchrun or srun (FSDP2): for models that do not fit on one "
        "device (default: each has a copy; full-weight stages are always spread)",
    )
    add(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long a process waits for the others before the run ends (default: %(default)g)",
    )


def _add_ways(parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    """How it runs: whole or in small, anew or from where it was; and every hyper-parameter, by ``--set``."""
    add = parser.add_argument
    add(
        "--on-bad-line",
        choices=("error", "skip"),
        default=recipe.supervised.on_bad_line,
        help="what to do with a line of --supervised-data that holds no triple (default: %(default)s)",
    )
    add(
        "--full-eval",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="evaluate on all STS pairs instead of the first 500",
    )
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="go on with the run in --output-dir from its last checkpoint",
    )
    add(
        "--smoke",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="a few steps of every stage on a little data: a test of the installation",
    )
    add(
        "--dry-run",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="print parameters, tokens and FLOPs a step and predicted memory, then stop",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other hyper-parameter, e.g. mntp.optim.steps=500 or simcse.batch_size=64 (repeatable)",
    )


def apply_arguments(recipe: Recipe, given: argparse.Namespace) -> tuple[Recipe, RunOptions]:
    """What the flags make of a recipe.

    Args:
        recipe: the one whose parser has read them.
        given: the flags.

    Raises:
        RunError: see :func:`parse_arguments`.
    """
    before = recipe
    stages = _stages(given.stages)
    adapters = tuple(name.strip() for name in given.adapters.split(",") if name.strip())
    if given.memory is not None:
        parse_memory(given.memory)
    if given.model != recipe.model:  # what the recipe knows of its own model says nothing about another
        recipe = replace(recipe, shape=None, bos_token=None)
    flags = {name: getattr(given, name) for name in OWN_FLAGS}
    recipe = replace(recipe, **flags | {"stages": stages, "adapters": adapters})
    recipe = replace(recipe, supervised=replace(recipe.supervised, on_bad_line=given.on_bad_line))
    if "supervised" not in recipe.stages and given.supervised_data != before.supervised_data:
        needed = ",".join([*recipe.stages, "supervised"])
        raise RunError(f"--supervised-data {given.supervised_data}: is not read without --stages {needed}")
    if given.smoke:
        recipe = smoke(recipe)
    if given.full_eval:
        recipe = replace(recipe, eval_pairs=None)
    for assignment in given.set:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise RunError(f"--set {assignment}: expected KEY=VALUE, such as mntp.optim.steps=500")
        if key in OWN_FLAGS:
            raise RunError(f"--set {key}: it has a flag of its own, --{key.replace('_', '-')}")
        try:
            recipe = _assign(recipe, key.split("."), value, key)
        except ConfigError as error:
            raise RunError(f"--set {assignment}: {error}") from error
    options = RunOptions(
        given.output_dir,
        given.resume,
        given.dry_run,
        given.device,
        given.backend,
        given.memory,
        given.shard,
        given.timeout,
    )
    return recipe, options


def _stages(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        raise RunError(
            f"--stages {text!r}: unknown stage {', '.join(unknown) or '(none given)'}; choose from {', '.join(STAGES)}"
        )
    return tuple(stage for stage in STAGES if stage in names or stage == "bi")


def _assign(settings: Any, path: list[str], text: str, key: str) -> Any:
    """A copy of the nested dataclasses with one field set from its text."""
    known = {f.name: f for f in fields(settings)}
    name = path[0]
    if name not in known:
        raise RunError(f"--set {key}: no such hyper-parameter; here are {', '.join(known)}")
    current = getattr(settings, name)
    if len(path) > 1:
        if not is_dataclass(current):
            raise RunError(f"--set {key}: {name} has no parts")
        return replace(settings, **{name: _assign(current, path[1:], text, key)})
    if is_dataclass(current):
        raise RunError(f"--set {key}: give one of its parts: {', '.join(f.name for f in fields(current))}")
    return replace(settings, **{name: _parse(text, str(known[name].type), key)})


def _parse(text: str, annotation: str, key: str) -> Any:
    """The value of a field from its text, by the field's annotation, which is a string here."""
    kinds = [kind.strip() for kind in annotation.split("|")]
    if "None" in kinds and text.lower() == "none":
        return None
    try:
        if kinds[0] == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kinds[0] in ("int", "float", "str"):
            return {"int": int, "float": float, "str": str}[kinds[0]](text)
        if kinds[0] == "tuple[str, ...]":
            return tuple(part.strip() for part in text.split(","))
        if kinds[0] == "tuple[int, ...]":
            return tuple(int(part) for part in text.split(",") if part.strip())
        if kinds[0] == "tuple[float, float]":
            first, second = text.split(",")
            return float(first), float(second)
    except (ValueError, KeyError):
        raise RunError(f"--set {key}={text}: expected {annotation}") from None
    raise RunError(f"--set {key}: a {annotation} cannot be given on the command line")
