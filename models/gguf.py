"""GGUF files of LLaMA, Mistral, Qwen 2 and Qwen 3: configuration, tokenizer metadata and weights.

llama.cpp rotates neighbouring channels, the HF checkpoints (and our models) rotate the two halves of a head: the
converter therefore permuted the rows of q and k, and ``read_tensors`` permutes them back. Qwen's it leaves alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bivec.models.config import DecoderConfig
from bivec.models.config_fields import ORIGINAL_LENGTH
from bivec.models.errors import CheckpointError, ConfigError
from bivec.models.gguf_file import GgufFile, GgufTensor, gguf_package, read_header, read_tensor

__all__ = [
    "GLOBAL_NAMES",
    "LAYER_NAMES",
    "ROPE_TABLE",
    "decoder_config",
    "gguf_package",
    "named_tensors",
    "read_config",
    "read_header",
    "read_tensors",
]

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # of llama.cpp; its "llama" is Mistral too
LARGEST = 2**31 - 1  # of every size in the metadata

GLOBAL_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_TABLE = "rope_freqs.weight"
# llama.cpp stores the llama3 RoPE scaling as a table of divisors; these are the settings that Meta released
LLAMA3_FACTORS = (8.0, 32.0)
LLAMA3_ORIGINAL_LENGTH, LLAMA3_LOW, LLAMA3_HIGH = 8192, 1.0, 4.0
# keys of a RoPE scaling that our models do not have, by the value with which they change nothing
NEUTRAL_SCALING = {
    "attn_factor": 1.0,
    "yarn_attn_factor": 1.0,
    "yarn_ext_factor": 1.0,
    "yarn_log_multiplier": 0.0,
    "alpha": 0.0,
}


def read_config(path: str | Path) -> DecoderConfig:
    """The model configuration in a .gguf file's metadata; raises as ``read_header`` and ``decoder_config`` do."""
    return decoder_config(read_header(path))


def decoder_config(file: GgufFile) -> DecoderConfig:
    """The model configuration that a GGUF header describes.

    Raises:
        ConfigError: another architecture than those of ``ARCHITECTURES``, or a feature of it that our models do not
            have (experts, per-layer head counts, partial rotary dimensions, an unknown RoPE scaling).
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{file.path}: GGUF architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}; "
            "of others give the safetensors checkpoint"
        )

    def field(name: str, default: Any = None, kind: type = int, least: float = 1) -> Any:
        return _field(file, f"{architecture}.{name}", default, kind, least)

    if field("expert_count", 0, least=0):
        raise ConfigError(f"{file.path}: mixture-of-experts models ({architecture}.expert_count) are not supported")
    num_heads, hidden_size = field("attention.head_count"), field("embedding_length")
    num_kv_heads = field("attention.head_count_kv", num_heads)
    head_dim = field("attention.key_length", max(1, hidden_size // num_heads))
    if num_heads % num_kv_heads or head_dim % 2:
        raise ConfigError(
            f"{file.path}: {num_heads} heads, {num_kv_heads} of keys and values, of {head_dim} channels; expected a "
            "multiple, and an even number of channels"
        )
    for name in ("rope.dimension_count", "attention.value_length"):
        if field(name, head_dim) != head_dim:
            raise ConfigError(f"{file.path}: {architecture}.{name} = {field(name)}, but a head has {head_dim} channels")
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing")
    rope_theta = _shortest(field("rope.freq_base", 10000.0, float, least=1.0 + 1e-6))
    sliding_window = field("attention.sliding_window", 0, least=0)
    if sliding_window and architecture != "llama":  # which layers have it is not in the file
        raise ConfigError(f"{file.path}: {architecture}.attention.sliding_window is not supported")
    return DecoderConfig(
        model_type="mistral" if sliding_window else architecture,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden_size,
        intermediate_size=field("feed_forward_length"),
        num_layers=field("block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_shortest(field("attention.layer_norm_rms_epsilon", kind=float, least=1e-30)),
        rope_theta=rope_theta,
        rope_scaling=_rope_scaling(file, rope_theta, head_dim, field("context_length")),
        max_position_embeddings=field("context_length"),
        sliding_window=sliding_window or None,
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        **{name: _optional(file, f"tokenizer.ggml.{name}", int) for name in ("bos_token_id", "eos_token_id")},
        is_causal=_optional(file, f"{architecture}.attention.causal", bool),
        dtype=None,
    )


def _field(file: GgufFile, key: str, default: Any, kind: type, least: float) -> Any:
    """A number of the metadata."""
    value = file.metadata.get(key, default)
    if value is None:
        raise ConfigError(f"{file.path}: the GGUF metadata lack {key}")
    if isinstance(value, list):
        raise ConfigError(f"{file.path}: {key} differs from layer to layer, which is not supported")
    most = LARGEST if kind is int else np.finfo(np.float32).max
    if type(value) not in (kind, int) or not least <= value <= most:
        raise ConfigError(f"{file.path}: {key} is {repr(value)[:80]}, expected {kind.__name__} from {least:g} on")
    return value


def _optional(file: GgufFile, key: str, kind: type) -> Any:
    """A value of the metadata that may be missing."""
    value = file.metadata.get(key)
    if type(value) not in (kind, type(None)):
        raise ConfigError(f"{file.path}: {key} is {repr(value)[:80]}, expected {kind.__name__}")
    return value


def _shortest(value: float) -> float:
    """GGUF stores float32: 9.999999747378752e-06 is the 1e-5 of the original configuration."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GgufFile, theta: float, head_dim: int, context_length: int) -> dict[str, Any] | None:
    kind, key = _scaling_kind(file)
    if ROPE_TABLE in file.tensors:
        if kind != "none" and file.metadata.get(key, 1.0) != 1.0:
            raise ConfigError(
                f"{file.path}: {ROPE_TABLE} and {key} together are not supported; use the safetensors checkpoint"
            )
        return _llama3_scaling(file, theta, head_dim)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ConfigError(
            f"{file.path}: RoPE scaling {repr(kind)[:80]} in a GGUF file is not supported; supported: linear, yarn"
        )
    factor: Any = file.metadata.get(key)
    if type(factor) not in (int, float) or not 1.0 <= _shortest(factor) < math.inf:
        raise ConfigError(f"{file.path}: {key} is {repr(factor)[:80]}, expected a number from 1 on")
    scaling = {"rope_type": kind, "factor": _shortest(factor)}
    return scaling if kind == "linear" else scaling | _yarn_settings(file, context_length)


def _scaling_kind(file: GgufFile) -> tuple[Any, str]:
    """The type of the scaling and the key of its factor, as llama.cpp finds them.

    Without a type a factor is that of a linear scaling, and the older name of a factor counts too. Otherwise than
    there a scaling without a factor, or with a factor of 0, is an error and not none; so are settings that we do not
    have, and YaRN's borders are heeded, whether or not llama.cpp's loader of the architecture reads them.

    Raises:
        ConfigError: a setting that our models do not have.
    """
    architecture = file.metadata["general.architecture"]
    prefix = f"{architecture}.rope.scaling."
    for name, neutral in NEUTRAL_SCALING.items():
        value = file.metadata.get(prefix + name, neutral)
        if value != neutral:
            raise ConfigError(
                f"{file.path}: {prefix}{name} is {repr(value)[:80]}, and only {neutral} is supported; "
                "use the safetensors checkpoint"
            )
    new, old = prefix + "factor", f"{architecture}.rope.scale_linear"
    key = old if old in file.metadata and new not in file.metadata else new
    return file.metadata.get(prefix + "type", "linear" if key in file.metadata else "none"), key


def _yarn_settings(file: GgufFile, context_length: int) -> dict[str, Any]:
    """Of YaRN, beside its factor; without an original length it is the whole one, as in llama.cpp."""
    prefix = f"{file.metadata['general.architecture']}.rope.scaling."
    original = _optional(file, prefix + "original_context_length", int)
    original = context_length if original is None else original
    if original < 1:
        raise ConfigError(f"{file.path}: {prefix}original_context_length is {original}, expected at least 1")
    settings: dict[str, Any] = {ORIGINAL_LENGTH: original}
    for key, name in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if prefix + name in file.metadata:
            settings[key] = _shortest(_optional(file, prefix + name, float))
            if not 0 < settings[key] < math.inf:
                raise ConfigError(f"{file.path}: {prefix}{name} is {settings[key]}, expected a positive number")
    return settings


def _llama3_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Recognises the llama3 scaling by its table of frequency divisors."""
    stored = read_tensor(file, file.tensors[ROPE_TABLE]).double()
    wavelength = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = (LLAMA3_ORIGINAL_LENGTH / wavelength - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
    smooth = smooth.clamp(0, 1)  # 1: short wavelengths, untouched; 0: long ones, divided by the whole factor
    for factor in LLAMA3_FACTORS:
        divisors = 1 / ((1 - smooth) / factor + smooth)
        if stored.shape == divisors.shape and torch.allclose(stored, divisors, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                ORIGINAL_LENGTH: LLAMA3_ORIGINAL_LENGTH,
            }
    raise ConfigError(
        f"{file.path}: {ROPE_TABLE} is not the llama3 scaling with factor 8 or 32; use the safetensors checkpoint"
    )


def named_tensors(file: GgufFile) -> dict[str, GgufTensor]:
    """The model's tensors by HF trunk name (``layers.0.self_attn.q_proj.weight``, ``lm_head.weight``), still unread.

    Raises:
        CheckpointError: a tensor that belongs to no part of these models.
    """
    # the table of frequency divisors is part of the configuration
    return {_hf_name(file, name): tensor for name, tensor in file.tensors.items() if name != ROPE_TABLE}


def read_tensors(file: GgufFile, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``named_tensors`` one by one, float32, q and k in the HF layout."""
    permuted = file.metadata["general.architecture"] == "llama"
    for name, tensor in named_tensors(file).items():
        values = read_tensor(file, tensor)
        if permuted and ".q_proj." in name:
            values = _unpermute(values, config.num_heads)
        elif permuted and ".k_proj." in name:
            values = _unpermute(values, config.num_kv_heads)
        yield name, values


def _hf_name(file: GgufFile, name: str) -> str:
    stem, _, kind = name.rpartition(".")  # kind: "weight" or "bias"
    if stem in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[stem]}.{kind}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{kind}"
    raise CheckpointError(
        f"{file.path}: tensor {name} belongs to no part of a LLaMA or Qwen model; is it a fine-tuned variant?"
    )


def _unpermute(values: Tensor, num_heads: int) -> Tensor:
    """[num_heads * head_dim, …] from interleaved rotary pairs to the HF order (first halves, then second halves)."""
    paired = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return paired.transpose(1, 2).reshape(values.shape)
