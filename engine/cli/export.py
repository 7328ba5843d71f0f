"""Writes an encoder for other libraries, adapters merged.

sentence-transformers: a folder that SentenceTransformer(OUT) and AutoModel load with no code of ours, with a model
card. gguf: a file for llama.cpp, with pooling and mask in its metadata.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

from bivec.engine.cli.models import MODEL_HELP, add_model_flags, open_model
from bivec.engine.cli.output import command_parser, results_only, say, write_document

FORMATS = ("sentence-transformers", "gguf")
SHORT = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # GGUF's names
EPILOG = """examples:
  bivec export runs/llm2vec-smollm2-135m exported/encoder
  bivec export DECODER exported/encoder --adapter DIR-mntp --adapter DIR-simcse --normalize
  bivec export runs/llm2vec-smollm2-135m encoder.gguf                  # GGUF by the name of the file
  bivec export RUN encoder.gguf --dtype bf16 --json"""


def main(arguments: Sequence[str]) -> int:
    """Writes an encoder for other libraries; returns the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    kind = given.format or ("gguf" if given.output.suffix == ".gguf" else "sentence-transformers")
    dtype = SHORT.get(given.dtype, given.dtype)
    if kind == "gguf" and given.normalize is not None:
        parser.error("--normalize and --no-normalize are of a folder; llama.cpp has --embd-normalize")
    given.dtype = None if kind == "gguf" else dtype  # a GGUF file is converted as it is written
    with results_only() as stdout, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        encoder = open_model(given, "cpu")
        if kind == "gguf":
            encoder.save_gguf(given.output, dtype={name: short for short, name in SHORT.items()}[dtype or "float16"])
            files = [given.output]
        else:
            encoder.save_pretrained(given.output, normalize=given.normalize)
            files = sorted(file for file in given.output.rglob("*") if file.is_file())
        notes = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
        size = sum(file.stat().st_size for file in files)
        if given.json:
            document = {"output": str(given.output), "format": kind, "files": [str(file) for file in files]}
            write_document(stdout, document | {"bytes": size, "warnings": notes})
        else:
            print(f"{given.output}: {kind}, {len(files)} files, {size / 2**20:.1f} MiB", file=stdout)
    for note in notes:
        say(f"warning: {note}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("export", __doc__, EPILOG)
    add = parser.add_argument
    add("model", help=MODEL_HELP)
    add("output", type=Path, help="the folder, or the .gguf file, to write")
    add("--format", choices=FORMATS, help="default: by the output's name")
    unit = argparse.BooleanOptionalAction
    add("--normalize", action=unit, help="the folder is to give vectors of unit length (default: as the model says)")
    add("--json", action="store_true", help="print what was written as JSON")
    add_model_flags(parser, on_disk=True)
    add(
        "--dtype",
        choices=(*SHORT.values(), *SHORT),
        help="of the weights that are written (default: float32; of a GGUF file f16)",
    )
    return parser
