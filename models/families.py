"""The model types that bivec runs, and what the models of a type share beyond the numbers in their config.json.

Two things are stated here: facts of the architecture, and what transformers' configuration class takes for granted
where a file says nothing (read in transformers 5.24). The blocks themselves are in ``llama.py`` and, where they differ
from LLaMA's, in ``qwen.py``, ``smollm.py`` and ``gemma.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Family:
    """The defaults are LLaMA's."""

    trunk: str  # transformers' class without the LM head
    causal_lm: str  # and with it
    reads: frozenset[str] = frozenset()  # optional fields that its config.json may have, beside those of all models
    defaults: dict[str, Any] = field(default_factory=dict)  # of fields that are absent
    activations: tuple[str, ...] = ("silu",)  # names of its one activation in config.json, the first is written
    activation_field: str = "hidden_act"
    qkv_bias: bool = False  # q, k and v have a bias and o has none, whatever the file says
    qk_norm: bool = False  # a norm over every head of q and of k, before the rotation
    layer_norms: int = 2  # norms over the hidden width in a layer; 4: behind attention and feed-forward too
    norm_offset: float = 0.0  # 1: norms multiply by (1 + w)


_LLAMA = {"bos_token_id": 1, "eos_token_id": 2}
_WINDOWS = frozenset({"use_sliding_window", "sliding_window", "layer_types"})
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_GEMMA2 = {**_GEMMA, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096}
# the text_config of a multimodal checkpoint states little
_GEMMA3 = {**_GEMMA2, "vocab_size": 262208, "num_attention_heads": 8, "max_position_embeddings": 131072}

FAMILIES = {
    "llama": Family(
        "LlamaModel",
        "LlamaForCausalLM",
        reads=frozenset({"attention_bias", "mlp_bias"}),
        defaults={**_LLAMA, "max_position_embeddings": 2048},
    ),
    "mistral": Family(
        "MistralModel",
        "MistralForCausalLM",
        reads=frozenset({"sliding_window"}),
        defaults={**_LLAMA, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": Family("Qwen2Model", "Qwen2ForCausalLM", reads=_WINDOWS, defaults=_QWEN, qkv_bias=True),
    "qwen3": Family(
        "Qwen3Model",
        "Qwen3ForCausalLM",
        reads=_WINDOWS | {"attention_bias"},
        defaults={**_QWEN, "head_dim": 128},
        qk_norm=True,
    ),
    "smollm3": Family(
        "SmolLM3Model",
        "SmolLM3ForCausalLM",
        reads=_WINDOWS | {"attention_bias", "mlp_bias", "no_rope_layers"},
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
    "gemma": Family(
        "GemmaModel",
        "GemmaForCausalLM",
        reads=frozenset({"attention_bias"}),
        defaults={**_GEMMA, "num_key_value_heads": 16},
        activations=(GELU, "gelu"),  # the first release wrote "gelu" and meant the tanh form
        norm_offset=1.0,
    ),
    "gemma2": Family(
        "Gemma2Model",
        "Gemma2ForCausalLM",
        reads=frozenset(
            {
                "attention_bias",
                "sliding_window",
                "layer_types",
                "query_pre_attn_scalar",
                "attn_logit_softcapping",
                "final_logit_softcapping",
            }
        ),
        defaults={**_GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        activations=(GELU,),
        activation_field="hidden_activation",
        layer_norms=4,
        norm_offset=1.0,
    ),
    "gemma3_text": Family(
        "Gemma3TextModel",
        "Gemma3ForCausalLM",
        # transformers' Gemma 3 does not cap attention scores, whatever the file says
        reads=frozenset(
            {
                "attention_bias",
                "sliding_window",
                "layer_types",
                "query_pre_attn_scalar",
                "final_logit_softcapping",
                "rope_local_base_freq",
                "use_bidirectional_attention",
            }
        ),
        defaults={**_GEMMA3, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        activations=(GELU,),
        activation_field="hidden_activation",
        qk_norm=True,
        layer_norms=4,
        norm_offset=1.0,
    ),
}
