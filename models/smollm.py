"""SmolLM 3: LLaMA that rotates nothing in every fourth layer (NoPE). SmolLM 1 and 2 are plain LLaMA.

Source: Yang et al., "Rope to Nope and Back Again" (2025).
"""

from __future__ import annotations

from torch import Tensor

from bivec.models.config import DecoderConfig
from bivec.models.families import WINDOW_FIELDS, Family, register
from bivec.models.llama import Attention, AttentionContext, DecoderLayer, Llama


class SmolLM3Attention(Attention):
    """Attention that may do without positions."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__(config, layer)
        self.rotates = config.no_rope_layers is None or bool(config.no_rope_layers[layer])

    def positioned(self, q: Tensor, k: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """As LLaMA's, or q and k as they are."""
        return super().positioned(q, k, context) if self.rotates else (q, k)


class SmolLM3Layer(DecoderLayer):
    """LLaMA's layer with :class:`SmolLM3Attention`."""

    attention = SmolLM3Attention


@register(
    "smollm3",
    Family(
        "SmolLM3Model",
        "SmolLM3ForCausalLM",
        reads=WINDOW_FIELDS | {"attention_bias", "mlp_bias", "no_rope_layers"},
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "pad_token_id": 128004,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
    ),
)
class SmolLM3(Llama):
    """The decoder of :class:`SmolLM3Layer`."""

    decoder_layer = SmolLM3Layer
