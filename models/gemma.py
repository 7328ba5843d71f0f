"""Gemma 1, 2 and 3 (text): LLaMA with a scaled embedding, norms that multiply by (1 + w), and GeGLU.

Gemma 2 and 3 norm what attention and feed-forward give before it is added, and alternate layers with and without a
sliding window. Gemma 2 caps the attention scores (and those of the LM head); Gemma 3 norms the heads of q and k
instead, and rotates in its layers with a window by a base of their own.

Sources: Gemma Team, "Gemma" (2024), "Gemma 2" (2024), "Gemma 3" (2025); transformers 5.24 where they are silent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bivec.kernels import geglu
from bivec.models.config import DecoderConfig
from bivec.models.families import Family, register
from bivec.models.llama import MLP, AttentionContext, DecoderLayer, Llama, RMSNorm, StreamAndUpdate
from bivec.models.qwen import NormedAttention

GELU = "gelu_pytorch_tanh"
GEMMA_DEFAULTS = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GEMMA2_DEFAULTS = {**GEMMA_DEFAULTS, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096}
GEMMA2_READS = frozenset(
    {"attention_bias", "sliding_window", "layer_types", "query_pre_attn_scalar", "final_logit_softcapping"}
)


class ScaledEmbedding(nn.Embedding):
    """Rows times the root of their width."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """``[T]`` int64 -> ``[T, D]``."""
        # the root is rounded to the weights' dtype, as in training: in bf16 that of 3072 is 55.5
        return super().forward(input_ids) * torch.tensor(self.embedding_dim**0.5, dtype=self.weight.dtype)


class GemmaMLP(MLP):
    """GeGLU instead of SwiGLU."""

    gated_unit = staticmethod(geglu)


class GemmaLayer(DecoderLayer):
    """LLaMA's layer with Gemma's feed-forward."""

    feed_forward = GemmaMLP


class Gemma2Layer(GemmaLayer):
    """Each block between two norms; the residual addition stays fused with the norm after it."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__(config, layer)
        self.pre_feedforward_layernorm = RMSNorm(config)
        self.post_feedforward_layernorm = RMSNorm(config)

    def forward(self, x: Tensor, update: Tensor | None, context: AttentionContext) -> StreamAndUpdate:
        """As that of LLaMA's layer; here there always is an update left."""
        normed, x = self._normed(self.input_layernorm, x, update, context)
        _, update = self.self_attn(normed, None, context)
        update = self.post_attention_layernorm(update, backend=context.backend)
        normed, x = self._normed(self.pre_feedforward_layernorm, x, update, context)
        _, update = self.mlp(normed, None, context)
        return x, self.post_feedforward_layernorm(update, backend=context.backend)


class Gemma3Layer(Gemma2Layer):
    """Gemma 2's layer with norms over the heads of q and k."""

    attention = NormedAttention


@register(
    "gemma",
    Family(
        "GemmaModel",
        "GemmaForCausalLM",
        reads=frozenset({"attention_bias"}),
        defaults={**GEMMA_DEFAULTS, "num_key_value_heads": 16},
        activations=(GELU, "gelu"),  # the first release wrote "gelu" and meant the tanh form
        norm_offset=1.0,
    ),
)
class Gemma(Llama):
    """The decoder of Gemma 1; what differs from LLaMA is in :class:`GemmaLayer` and :class:`ScaledEmbedding`."""

    embedding, decoder_layer = ScaledEmbedding, GemmaLayer


@register(
    "gemma2",
    Family(
        "Gemma2Model",
        "Gemma2ForCausalLM",
        reads=GEMMA2_READS | {"attn_logit_softcapping"},
        defaults={**GEMMA2_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        activations=(GELU,),
        activation_field="hidden_activation",
        layer_norms=4,
        norm_offset=1.0,
    ),
)
class Gemma2(Gemma):
    """Gemma 2; caps and windows are the configuration's."""

    decoder_layer = Gemma2Layer


@register(
    "gemma3_text",
    Family(
        "Gemma3TextModel",
        "Gemma3ForCausalLM",
        # transformers' Gemma 3 does not cap attention scores, whatever the file says
        reads=GEMMA2_READS | {"rope_local_base_freq", "use_bidirectional_attention"},
        defaults={
            **GEMMA2_DEFAULTS,
            # the text_config of a multimodal checkpoint states little
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        activations=(GELU,),
        activation_field="hidden_activation",
        qk_norm=True,
        layer_norms=4,
        norm_offset=1.0,
    ),
)
class Gemma3(Gemma):
    """Gemma 3's text model, and EmbeddingGemma."""

    decoder_layer = Gemma3Layer
