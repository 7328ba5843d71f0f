"""What the commands share: results on stdout, everything else on stderr, and errors in one line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO


def say(line: str) -> None:
    """A line of ours on stderr; of several processes all but the first say who they are."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    print(f"bivec: {'' if rank == '0' else f'rank {rank}: '}{line}", file=sys.stderr, flush=True)


def command_parser(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of a command: its docstring in front of the flags, examples behind them."""
    return argparse.ArgumentParser(
        f"bivec {name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


@contextmanager
def results_only() -> Iterator[TextIO]:
    """Gives the real stdout, for results; what is printed inside, by whatever library, goes to stderr."""
    stdout = sys.stdout
    with redirect_stdout(sys.stderr):
        yield stdout
    stdout.flush()


def count(text: str) -> int:
    """argparse's type of a number of things: at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return number


def device(text: str) -> str:
    """argparse's type of a torch device; whether it is here is another question."""
    import torch

    try:
        torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of torch, such as cuda, cuda:1 or cpu") from None
    return text


def dtype(text: str) -> str:
    """argparse's type of a dtype of weights."""
    from bivec.engine.errors import BivecError
    from bivec.models.weights import named_dtype

    try:
        named_dtype(text)
    except BivecError:
        raise argparse.ArgumentTypeError(f"{text!r} is none of float32, bfloat16, float16") from None
    return text


def write_document(stdout: TextIO, document: Any) -> None:
    """One JSON document."""
    stdout.write(json.dumps(document, indent=2) + "\n")


def explained(error: Exception) -> str | None:
    """What an error says to whoever typed the command; None = it is a bug of ours, and its traceback is wanted."""
    from bivec.engine.cli.versions import OPTIONAL, install_hint

    if isinstance(error, OSError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        package = _package(error.name)
        if package not in OPTIONAL:
            return None
        return f"this needs the package {package}, which is not installed: {install_hint(package)}"

    from bivec.engine.errors import BivecError, first_line
    from bivec.engine.trainer import is_out_of_memory
    from bivec.kernels import BackendError

    if isinstance(error, (BivecError, BackendError)):
        return str(error)
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return f"{first_line(error)}; give a smaller --tokens-per-batch or --memory"
    return None


def _package(module: str | None) -> str:
    """The package that holds a module, by the name that pip knows."""
    name = (module or "").split(".")[0]
    return {"sklearn": "scikit-learn", "yaml": "pyyaml", "sentence_transformers": "sentence-transformers"}.get(
        name, name
    )
