"""The LLaMA decoder on packed sequences, causal or bidirectional; the other decoders are made of its blocks.

Module names are those of Hugging Face's trunk (``layers.0.self_attn.q_proj`` …), so that checkpoints and PEFT adapters
fit by name. The hidden state is ``[T, D]``: all sequences of the batch one after the other, no padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bivec.kernels import AttentionPlan, apply_rotary, attention_plan, flash_attention, fold_seed, rms_norm, swiglu
from bivec.models.batch import PackedBatch
from bivec.models.config import DecoderConfig
from bivec.models.config_fields import FULL, SLIDING
from bivec.models.families import LLAMA_TOKENS, Family, register
from bivec.models.projection import project, project_gated, project_onto
from bivec.models.recompute import LEVELS, Recipes
from bivec.models.rope import rotary_tables

StreamAndUpdate = tuple[Tensor | None, Tensor | None]  # the residual stream, and what is still to be added to it


@dataclass(frozen=True)
class AttentionContext:
    """What the layers of one forward pass share."""

    batch: PackedBatch
    plan: AttentionPlan
    rotary: dict[str, tuple[Tensor, Tensor]]  # by type of layer: cos, sin [max_position, Dh/2] fp32
    causal: bool
    windows: dict[str, tuple[int, int] | None]  # by type of layer
    dropout_p: float
    seed: int | Tensor | None
    backend: str | None
    recipes: Recipes


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension."""

    def __init__(self, config: DecoderConfig, size: int | None = None):
        super().__init__()
        self.eps, self.offset = config.rms_norm_eps, config.family.norm_offset
        self.weight = nn.Parameter(torch.full((size or config.hidden_size,), 1.0 - self.offset))

    def forward(
        self, x: Tensor, residual: Tensor | None = None, backend: str | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of ``x [..., size]``; with ``residual`` that of their sum, and the sum."""
        return rms_norm(x, self.weight, self.eps, residual=residual, weight_offset=self.offset, backend=backend)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, between its four projections."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer, self.layer_type, self.head_dim = layer, config.layer_type(layer), config.head_dim
        self.scale, self.softcap = config.softmax_scale, config.attn_logit_softcapping
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.output_bias)

    def positioned(self, q: Tensor, k: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """q [T, H, Dh] and k [T, Hkv, Dh] as they are compared: turned by their positions. Overwrites them."""
        cos, sin = context.rotary[self.layer_type]
        return apply_rotary(q, k, cos, sin, context.batch.position_ids, inplace=True, backend=context.backend)

    def forward(self, x: Tensor, stream: Tensor | None, context: AttentionContext) -> StreamAndUpdate:
        """Of the normed stream ``x``; returns the residual stream and the update still to be added to it, if any."""
        batch = context.batch
        projected = project(x, self.q_proj, self.k_proj, self.v_proj, backend=context.backend)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)  # [T, H or Hkv, Dh]
        q, k = self.positioned(q, k, context)
        seed = fold_seed(context.seed, self.layer) if context.dropout_p and context.seed is not None else None
        attended = flash_attention(
            q,
            k,
            v,
            batch.cu_seqlens,
            batch.max_seqlen,
            causal=context.causal,
            window=context.windows[self.layer_type],
            softmax_scale=self.scale,
            softcap=self.softcap,
            dropout_p=context.dropout_p,
            seed=seed,
            sample_ids=batch.sample_ids,
            plan=context.plan,
            backend=context.backend,
        )
        return project_onto(stream, attended.flatten(-2), self.o_proj, backend=context.backend)


class MLP(nn.Module):
    """The gated feed-forward block."""

    gated_unit = staticmethod(swiglu)

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, stream: Tensor | None, context: AttentionContext) -> StreamAndUpdate:
        """As that of :class:`Attention`."""
        unit = self.gated_unit
        product = project_gated(x, self.gate_proj, self.up_proj, backend=context.backend) if unit is swiglu else None
        if product is None:
            gate, up = project(x, self.gate_proj, self.up_proj, backend=context.backend)
            product = unit(gate, up, overwrite=True, backend=context.backend)
            context.recipes.add(product, partial(unit, backend=context.backend), gate, up)
        return project_onto(stream, product, self.down_proj, backend=context.backend)


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    attention, feed_forward = Attention, MLP

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = self.attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = self.feed_forward(config)

    def forward(self, x: Tensor, update: Tensor | None, context: AttentionContext) -> StreamAndUpdate:
        """From the residual stream and the update still to be added to it, None if it is added, to the same pair.

        Leaving the last addition to the next norm fuses every residual addition of the model with a norm.
        """
        normed, x = self._normed(self.input_layernorm, x, update, context)
        x, update = self.self_attn(normed, x, context)
        normed, x = self._normed(self.post_attention_layernorm, x, update, context)
        x, update = self.mlp(normed, x, context)
        return x, update

    def whole(self, x: Tensor, context: AttentionContext) -> Tensor:
        """The residual stream after the layer, its last addition done: one tensor in, one out."""
        x, update = self(x, None, context)
        return x if update is None else x + update

    @staticmethod
    def _normed(norm: RMSNorm, x: Tensor, update: Tensor | None, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """The norm of the residual stream after the update, and that stream."""
        if update is None:
            normed = norm(x, backend=context.backend)
        else:
            normed, x = norm(update, x, backend=context.backend)
        context.recipes.add(normed, partial(norm, backend=context.backend), x)
        return normed, x


@register(
    "llama",
    Family(
        "LlamaModel",
        "LlamaForCausalLM",
        reads=frozenset({"attention_bias", "mlp_bias"}),
        defaults={**LLAMA_TOKENS, "max_position_embeddings": 2048},
    ),
)
class Llama(nn.Module):
    """The trunk: token ids to hidden states after the final norm. The LM head lives outside (``Checkpoint``)."""

    embedding, decoder_layer = nn.Embedding, DecoderLayer

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = self.embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.decoder_layer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config)
        self._rotary: dict[str, tuple[Tensor, Tensor]] | None = None

    def rotary(self, length: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        """The tables for at least ``length`` positions by type of layer, grown by powers of two and kept."""
        tables = self._rotary
        if tables is None or len(tables[FULL][0]) < length or tables[FULL][0].device != device:
            tables = self._rotary = rotary_tables(self.config, 1 << max(length - 1, 63).bit_length(), device)
        return tables

    def forward(
        self,
        batch: PackedBatch,
        *,
        causal: bool = False,
        attention_dropout: float = 0.0,
        seed: int | Tensor | None = None,
        output_hidden_states: bool = False,
        recompute: str = "none",
        backend: str | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Runs the packed batch.

        Args:
            batch: T tokens in B sequences.
            causal: the decoder's own mask; False lets every token see its whole sequence (LLM2Vec, step 1).
            attention_dropout: on the attention probabilities (SimCSE, METHOD 4.2), in training and evaluation alike.
            seed: keys the dropout; the layer number is folded in.
            output_hidden_states: also return the residual stream: embedding, after each layer, and last the final norm.
            recompute: "none", "selective" or "layer": what a backward makes again, by ``models/recompute.py``.
            backend: None, "torch" or "triton".

        Returns:
            hidden_states [T, D], whose graph can be walked backward once: a backward overwrites what it has read; with
            ``output_hidden_states`` the pair (hidden_states, num_layers + 1 tensors).

        Raises:
            ValueError: what ``PackedBatch.check`` refuses, dropout without a seed, an unknown ``recompute``.
        """
        batch.check(self.config.max_position_embeddings, self.config.vocab_size)
        if attention_dropout and seed is None:
            raise ValueError(f"attention_dropout={attention_dropout} needs a seed: an int, or an int64 tensor")
        if recompute not in LEVELS:
            raise ValueError(f"recompute is {recompute!r}, expected one of {', '.join(LEVELS)}")
        context = AttentionContext(
            batch=batch,
            plan=attention_plan(batch.cu_seqlens, batch.max_seqlen),
            rotary=self.rotary(batch.max_seqlen, batch.input_ids.device),
            causal=causal,
            windows={FULL: None, SLIDING: self.config.attention_window(causal)},
            dropout_p=attention_dropout,
            seed=seed,
            backend=backend,
            recipes=Recipes(recompute == "selective" and torch.is_grad_enabled()),
        )
        x, update, states = self.embed_tokens(batch.input_ids), None, []
        with context.recipes:
            for layer in self.layers:
                if output_hidden_states:
                    states.append(x if update is None else x + update)
                if recompute == "layer" and torch.is_grad_enabled():
                    # the generators of the dropouts have no state that would have to be put back
                    x = checkpoint(layer.whole, x, context, use_reentrant=False, preserve_rng_state=False)
                else:
                    x, update = layer(x, update, context)
                context.recipes.forget()
        hidden_states = self.norm(x, backend=backend) if update is None else self.norm(update, x, backend=backend)[0]
        return (hidden_states, (*states, hidden_states)) if output_hidden_states else hidden_states
