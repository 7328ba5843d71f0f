"""Turns a decoder into a text encoder: bidirectional attention, MNTP, SimCSE, supervised training.

The settings are those of a preset (the paper's for its models, or those of the quick start), changed by the file of
--config, changed by the flags here. A run that was stopped goes on with --resume.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bivec.engine.cli.config_file import as_flags, read_config
from bivec.engine.cli.output import device, dtype, results_only, say, write_document
from bivec.engine.distributed import launched
from bivec.engine.errors import BivecError, ConfigError, RunError
from bivec.engine.estimate import describe
from bivec.engine.inputs import model_config
from bivec.engine.presets import PAPER, PRESETS
from bivec.engine.recipe import RUN_FILE, STAGES, Recipe
from bivec.engine.recipe_arguments import RunOptions, apply_arguments, recipe_parser
from bivec.engine.run import Run
from bivec.engine.run_start import opened_run

SWITCHES = ("shard", "full-eval", "resume", "smoke", "dry-run")
OF_THE_RUN = ("output_dir", "resume", "dry_run", "device", "backend", "memory", "shard", "timeout")  # no recipe's
EPILOG = f"""the file of --config has the flags' names for keys, and what --set takes, nested or with dots:
  model: path/to/decoder
  mntp-data: articles.txt
  simcse-data: sentences.txt
  mntp: {{optim: {{steps: 500}}, batch_size: 16}}

examples:
  bivec convert --preset smollm2-135m                                  # ten minutes on two CPU cores
  bivec convert --preset mistral-7b --dry-run                          # what it would cost
  bivec convert --model DIR --preset sheared-llama-1.3b --mntp-data articles.txt --simcse-data sentences.txt
  bivec convert --config convert.yaml --set simcse.batch_size=64 --output-dir runs/mine
  bivec convert --preset supervised --model runs/mine --supervised-data triples.jsonl
  torchrun --nproc_per_node=8 -m bivec.engine.cli convert --preset mistral-7b --shard

presets: {", ".join(PRESETS)}"""


def main(arguments: Sequence[str]) -> int:
    """Turns a decoder into an encoder; returns the exit code."""
    recipe, options, as_json = parse(arguments)
    world = launched()
    with results_only() as stdout:
        if options.dry_run:
            text = describe(recipe, model_config(recipe))
            if world.is_main and as_json:
                write_document(stdout, {"dry_run": text.splitlines()})
            elif world.is_main:
                print(text, file=stdout)
            return 0
        try:
            with opened_run(recipe, options, world) as run:
                all_steps(run)
        except KeyboardInterrupt:
            if world.is_main and (options.output_dir / RUN_FILE).is_file():
                command = ["bivec", "convert", *(word for word in arguments if word != "--resume"), "--resume"]
                say(f"to go on: {shlex.join(command) if world.size == 1 else 'the same command with --resume'}")
            raise
        if world.is_main and as_json:
            results = json.loads((options.output_dir / "results.json").read_text(encoding="utf-8"))
            places = {"output_dir": str(options.output_dir), "encoder": str(options.output_dir / "merged")}
            write_document(stdout, places | results)
        elif world.is_main:
            table = (options.output_dir / "results.md").read_text(encoding="utf-8")
            print(f"{table}\nThe encoder is in {options.output_dir / 'merged'}", file=stdout)
    return 0


def all_steps(run: Run) -> None:
    """The paper's steps, as far as the run's stages ask for them; the scores of the decoder as it is stand in front."""
    if run.state == "bi":  # what an earlier run has trained is no plain decoder any more
        run.evaluate("uni", causal=True)
        run.evaluate("uni weighted-mean", causal=True, pooling="weighted_mean")
        run.evaluate("bi")
    run.evaluate()
    run.mntp()
    run.evaluate()
    run.simcse()
    run.evaluate()
    run.supervised()
    run.evaluate()
    run.finish()


def parse(arguments: Sequence[str]) -> tuple[Recipe, RunOptions, bool]:
    """The recipe and its run as preset, file and flags say, and whether JSON is wanted.

    Raises:
        BivecError: no preset or file of that name, no model, an unknown key or hyper-parameter, a bad value.
    """
    first = _first_look(arguments)
    # these decide what else may be given, and with what default
    told = {name: value for name, value in vars(first).items() if name != "config" and value not in (None, True)}
    settings = ({} if first.config is None else read_config(first.config)) | told
    for name in ("preset", "model"):
        if not isinstance(settings.get(name), (str, type(None))):
            raise ConfigError(f"{first.config}: {name} is {repr(settings[name])[:80]}, expected text; put it in quotes")
    try:
        recipe = _preset(settings.pop("preset", None), settings.get("model"))
        parser = _parser(recipe)
        parser.exit_on_error = False
        given = parser.parse_args(as_flags(first.config or "", settings, parser, recipe))
        recipe, _ = apply_arguments(recipe, given)
    except (BivecError, argparse.ArgumentError) as error:
        text, flags = str(error), tuple(f"--{name}" for name in told)
        of_the_file = first.config is not None and not text.startswith((first.config, *flags))
        raise RunError(f"{first.config}: {text}" if of_the_file else text) from error
    last = _parser(recipe)
    from_file = [name for name in OF_THE_RUN if settings.get(name) is not None]
    last.set_defaults(**{name: getattr(given, name) for name in from_file})
    given = last.parse_args(arguments)
    if not given.model:
        last.error("--model is needed, or a --preset that has one")
    return *apply_arguments(recipe, given), given.json


def _first_look(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags that decide what the others' defaults are, and those that undo what a file has switched on."""
    parser = argparse.ArgumentParser("bivec convert", usage="bivec convert ...", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME")
    parser.add_argument("--stages", type=_stages)
    for name in ("--config", "--model"):
        parser.add_argument(name)
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
    return parser.parse_known_args(arguments)[0]


def _stages(text: str) -> str:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{(unknown or [text])[0]!r} is none of {', '.join(STAGES)}")
    return text


def _preset(name: str | None, model: str | None) -> Recipe:
    """The one of this name; else the one made for the model; else the paper's settings."""
    if name is None:
        made_for = {recipe.model: preset for preset, recipe in PRESETS.items() if recipe.shape or recipe.bos_token}
        name = made_for.get(model or "", "paper")
    if name not in PRESETS:
        raise ConfigError(f"--preset {name}: choose one of {', '.join(PRESETS)}")
    if name == "paper" and model:
        return replace(PAPER, name=f"llm2vec-{Path(model).name or 'model'}")
    return PRESETS[name]


def _parser(recipe: Recipe) -> argparse.ArgumentParser:
    parser = recipe_parser(recipe, __doc__, prog="bivec convert", epilog=EPILOG, allow_abbrev=False)
    kinds = {"device": device, "dtype": dtype, "stages": _stages}
    for action in parser._actions:  # noqa: SLF001 - argparse has no public way to list a parser's flags
        action.type = kinds.get(action.dest, action.type)
        if action.dest == "model" and not recipe.model:
            action.help = "decoder: a directory, a .gguf file or a hub id"
    add = parser.add_argument
    add("--preset", metavar="NAME", help=f"start from these settings: {', '.join(PRESETS)} (default: by the model)")
    add("--config", metavar="FILE", help="a .yaml or .json file of flags and hyper-parameters")
    add("--json", action="store_true", help="print the results as JSON")
    return parser
