"""Qwen 2 and 3: LLaMA with a sliding window in the upper layers where the configuration asks for one.

Qwen 2 (and 2.5) has biases on q, k and v; Qwen 3 instead a norm over every head of q and k, before the rotation.
"""

from __future__ import annotations

from torch import Tensor

from bivec.models.config import DecoderConfig
from bivec.models.families import WINDOW_FIELDS, Family, register
from bivec.models.llama import Attention, AttentionContext, DecoderLayer, Llama, RMSNorm

DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


class NormedAttention(Attention):
    """Attention with norms over the heads of q and k."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__(config, layer)
        self.q_norm = RMSNorm(config, config.head_dim)
        self.k_norm = RMSNorm(config, config.head_dim)

    def positioned(self, q: Tensor, k: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """As LLaMA's, of the normed heads."""
        q, k = self.q_norm(q, backend=context.backend), self.k_norm(k, backend=context.backend)
        return super().positioned(q, k, context)


class Qwen3Layer(DecoderLayer):
    """LLaMA's layer with :class:`NormedAttention`."""

    attention = NormedAttention


@register("qwen2", Family("Qwen2Model", "Qwen2ForCausalLM", reads=WINDOW_FIELDS, defaults=DEFAULTS, qkv_bias=True))
class Qwen2(Llama):
    """LLaMA's blocks; biases and windows are the configuration's."""


@register(
    "qwen3",
    Family(
        "Qwen3Model",
        "Qwen3ForCausalLM",
        reads=WINDOW_FIELDS | {"attention_bias"},
        defaults={**DEFAULTS, "head_dim": 128},
        qk_norm=True,
    ),
)
class Qwen3(Llama):
    """The decoder of :class:`Qwen3Layer`."""

    decoder_layer = Qwen3Layer
