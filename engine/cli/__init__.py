"""The command ``bivec``: one module a command, each with ``main(arguments) -> exit code``.

Exit codes: 0 done, 1 failed (the error is on stderr), 2 wrong usage, 130 stopped by Ctrl-C. Wrong usage is what the
flags alone show; what is found with a file, a model or a recipe (a hyper-parameter of ``--set``) has failed.
Results go to stdout, everything else to stderr. Nothing of torch is imported before a command needs it; convert's
``--help`` does, for the recipes' settings that it shows.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from bivec import __version__
from bivec.engine.cli.output import explained, say

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 130

COMMANDS = {  # name: module, what it does
    "convert": ("convert", "turn a decoder into a text encoder: any recipe's stages, from flags or a file"),
    "encode": ("encode", "embed a file of texts into one .npy or .parquet file"),
    "eval": ("evaluate", "score an encoder on STS pairs, MTEB tasks and word tasks"),
    "export": ("export", "write an encoder for sentence-transformers or llama.cpp"),
    "bench": ("bench", "list and run the benchmarks of a clone"),
    "doctor": ("doctor", "check this machine: versions, devices, backends, kernels, numerics"),
}
EPILOG = """examples:
  bivec doctor
  bivec convert --preset smollm2-135m
  bivec encode runs/llm2vec-smollm2-135m corpus.jsonl -o corpus.npy
  bivec eval runs/llm2vec-smollm2-135m --json
  bivec COMMAND --help

exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: None = those of the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: after ``--help`` and ``--version`` (0), and for wrong usage (2).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not words:
        parser.print_help(sys.stderr)
        return USAGE
    name = parser.parse_args(words[:1]).command
    command: Callable[[Sequence[str]], int] = import_module(f"bivec.engine.cli.{COMMANDS[name][0]}").main
    try:
        return command(words[1:])
    except KeyboardInterrupt:
        say("stopped")
        return STOPPED
    except BrokenPipeError:  # whoever read the results has gone, as `head` does
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for what Python still flushes at its end
        return FAILED
    except Exception as error:
        reason = explained(error)
        if reason is None:
            raise
        say(f"error: {reason}")
        return FAILED


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "bivec",
        usage="bivec [--help] [--version] COMMAND ...",
        description=f"Decoder-only language models into text encoders.\n\ncommands:\n{commands}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bivec {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the above")
    return parser
