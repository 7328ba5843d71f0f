"""The Mistral decoder: LLaMA with a sliding window in the first release (v0.1: 4096; v0.2 and later: none)."""

from __future__ import annotations

from bivec.models.families import LLAMA_TOKENS, Family, register
from bivec.models.llama import Llama


@register(
    "mistral",
    Family(
        "MistralModel",
        "MistralForCausalLM",
        reads=frozenset({"sliding_window"}),
        defaults={**LLAMA_TOKENS, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
)
class Mistral(Llama):
    """LLaMA's blocks; the window is ``config.sliding_window``."""
