"""The start of a run: from a command line to the model on its device, and what an error or Ctrl-C leaves to be said."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from bivec.engine.distributed import ALONE, World, launched, only_main_prints, process_group
from bivec.engine.errors import BivecError, RunError, first_line
from bivec.engine.estimate import describe
from bivec.engine.inputs import model_config
from bivec.engine.recipe import RUN_FILE, TRAINED, Recipe
from bivec.engine.recipe_arguments import RunOptions, parse_arguments
from bivec.engine.run import Run
from bivec.engine.run_files import device_type
from bivec.engine.trainer import is_out_of_memory
from bivec.kernels import BackendError

OUT_OF_MEMORY_ADVICE = (
    "give --memory a size below the device's, such as 20GiB, or lower micro_batch_tokens of the stage: --set "
    "mntp.micro_batch_tokens=2048"
)


@contextmanager
def start(
    recipe: Recipe,
    description: str | None,
    arguments: Sequence[str] | None = None,
    *,
    trains: Sequence[str] = TRAINED,
) -> Iterator[Run]:
    """Reads the command line, checks every input and loads the model, for the steps in the ``with`` block.

    Bad input, and what stops a step (a NaN loss, a full disk), end the process with the error on stderr and exit code
    2; Ctrl-C with the command that goes on and exit code 130; ``--dry-run`` with its figures and exit code 0.

    Of several processes, made by torchrun or srun, rank 0 speaks and writes; the others show errors alone.

    Args:
        recipe: the defaults of the command line.
        description: of the recipe, for ``--help``.
        arguments: of the command; None = those of the process.
        trains: the stages that the ``with`` block calls; ``--stages`` with another one is an error.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    directory, who, world = None, "", ALONE
    try:
        world = launched()
        if not world.is_main:
            who = f"rank {world.rank}: "
        recipe, options = parse_arguments(recipe, description, arguments)
        missing = [name for name in recipe.stages if name in TRAINED and name not in trains]
        if missing:
            raise RunError(
                f"--stages {','.join(recipe.stages)}: this recipe does not train {' and '.join(missing)}, only "
                f"{' and '.join(trains)}; take a recipe that does (recipes/llm2vec_*.py)"
            )
        if options.dry_run:
            if world.is_main:
                print(describe(recipe, model_config(recipe)))
            sys.exit(0)
        directory = options.output_dir
        with opened_run(recipe, options, world) as run:
            yield run
    except (BivecError, BackendError, OSError) as error:
        print(f"{who}error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"{who}error: {first_line(error)}\n{OUT_OF_MEMORY_ADVICE}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        command = shlex.join(["python", sys.argv[0], *(word for word in arguments if word != "--resume"), "--resume"])
        begun = directory is not None and (directory / RUN_FILE).is_file()
        command = "the same command with --resume" if world.size > 1 else command
        if world.is_main:
            print(f"stopped; to go on: {command}" if begun else "stopped before anything was written", file=sys.stderr)
        sys.exit(130)


@contextmanager
def opened_run(recipe: Recipe, options: RunOptions, world: World) -> Iterator[Run]:
    """The run of a recipe, with its processes joined; of several, only rank 0 prints.

    Raises:
        BivecError: bad input, or what stops a step.
    """
    with ExitStack() as stack:
        stack.enter_context(only_main_prints(world))
        of_one = options.shard or recipe.trains_all_weights()
        stack.enter_context(process_group(world, device_type(options.device), options.timeout, of_one=of_one))
        yield Run(recipe, options, world)
