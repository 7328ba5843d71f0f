"""The Mistral decoder: LLaMA with a sliding window in the first release (v0.1: 4096; v0.2 and later: none)."""

from __future__ import annotations

from bivec.models.llama import Llama


class Mistral(Llama):
    """LLaMA's blocks; the window is ``config.sliding_window``."""
