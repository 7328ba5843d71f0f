"""The flags of the commands that open an encoder."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from bivec.engine.cli.output import count, device, dtype

if TYPE_CHECKING:
    from bivec.engine.encoder import Encoder

POOLINGS = ("mean", "weighted_mean", "last_token", "eos_token", "bos_token")  # of engine.encoder_config, without torch
MODEL_HELP = "a run directory, a folder of Hugging Face or sentence-transformers, a .gguf file or a hub id"


def add_model_flags(parser: argparse.ArgumentParser, *, on_disk: bool = False) -> None:
    """How the model is opened, what of its settings is to be another, and, unless it is only written, where it runs."""
    parser.set_defaults(dtype=None, device=None, backend=None)
    add = parser.add_argument
    add("--adapter", action="append", default=[], metavar="DIR", help="merge this PEFT adapter first (repeatable)")
    names = f"{', '.join(POOLINGS[:-1])} or {POOLINGS[-1]}"
    add("--pooling", choices=POOLINGS, metavar="NAME", help=f"{names} (default: as the model says)")
    add("--max-length", type=count, metavar="N", help="tokens of a row, instruction too (default: as the model says)")
    add("--template", help="a chat template, its short name or none (default: as the model says)")
    if on_disk:
        return
    add("--dtype", type=dtype, help="of the weights (default: float32 on a CPU, elsewhere the checkpoint's)")
    add("--device", type=device, help="torch device, such as cuda or cpu (default: cuda where there is one)")
    add("--backend", choices=("torch", "triton"), help="of the kernels (default: chosen by device)")


def open_model(given: argparse.Namespace, device: str | None = None) -> Encoder:
    """The encoder of the flags.

    Args:
        given: with ``model`` and the flags of :func:`add_model_flags`.
        device: None = the flag's, tried.

    Raises:
        BivecError: no such model, damaged files, settings that cannot be, a device or backend that is not here.
    """
    from bivec.engine.encoder import Encoder
    from bivec.engine.hub import prefer_offline
    from bivec.engine.packaged import PACKAGED_MODEL
    from bivec.models.weights import named_dtype

    prefer_offline([name for name in (given.model, *given.adapter) if name != PACKAGED_MODEL])
    return Encoder.from_pretrained(
        given.model,
        adapters=given.adapter,
        pooling=given.pooling,
        max_length=given.max_length,
        template=given.template,
        dtype=named_dtype(given.dtype) if given.dtype else None,
        device=device or open_device(given),
        backend=given.backend,
    )


def open_device(given: argparse.Namespace) -> str:
    """The device of the flags, tried; and that the kernels' backend can be had.

    Raises:
        RunError: one of them is not here.
    """
    from bivec.engine.run_files import chosen_device

    return chosen_device(given.device, given.backend)
