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
from bivec.models.llama import MLP, AttentionContext, DecoderLayer, Llama, RMSNorm, StreamAndUpdate
from bivec.models.qwen import NormedAttention


class ScaledEmbedding(nn.Embedding):
    def forward(self, input_ids: Tensor) -> Tensor:
        # the root is rounded to the weights' dtype, as in training: in bf16 that of 3072 is 55.5
        return super().forward(input_ids) * torch.tensor(self.embedding_dim**0.5, dtype=self.weight.dtype)


class GemmaMLP(MLP):
    gated_unit = staticmethod(geglu)


class GemmaLayer(DecoderLayer):
    feed_forward = GemmaMLP


class Gemma2Layer(GemmaLayer):
    """Each block between two norms; the residual addition stays fused with the norm after it."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__(config, layer)
        self.pre_feedforward_layernorm = RMSNorm(config)
        self.post_feedforward_layernorm = RMSNorm(config)

    def forward(self, x: Tensor, update: Tensor | None, context: AttentionContext) -> StreamAndUpdate:
        normed, x = self._normed(self.input_layernorm, x, update, context)
        _, update = self.self_attn(normed, None, context)
        update = self.post_attention_layernorm(update, backend=context.backend)
        normed, x = self._normed(self.pre_feedforward_layernorm, x, update, context)
        _, update = self.mlp(normed, None, context)
        return x, self.post_feedforward_layernorm(update, backend=context.backend)


class Gemma3Layer(Gemma2Layer):
    attention = NormedAttention


class Gemma(Llama):
    embedding, decoder_layer = ScaledEmbedding, GemmaLayer


class Gemma2(Gemma):
    decoder_layer = Gemma2Layer


class Gemma3(Gemma):
    decoder_layer = Gemma3Layer
