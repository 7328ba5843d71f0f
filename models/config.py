"""The shape of a decoder, read from and written to Hugging Face's ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bivec.models.config_fields import (
    BIDIRECTIONAL,
    FULL,
    SLIDING,
    Fields,
    no_rope_layers,
    rope_settings,
    window_settings,
)
from bivec.models.errors import ConfigError
from bivec.models.families import FAMILIES, Family
from bivec.models.plain_json import parse_json

SCORE_SETTINGS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that the architecture of a decoder depends on; ``family`` has what all of its model_type share."""

    model_type: str  # "llama", "mistral", … (models/families.py)
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # {"rope_type": "linear" | "llama3" | "yarn", "factor": …, …}
    sliding_window: int | None = None  # Mistral v0.1: 4096
    layer_types: tuple[str, ...] | None = None  # FULL or SLIDING; None: all SLIDING if there is a window, else all FULL
    no_rope_layers: tuple[int, ...] | None = None  # SmolLM3: 0 = the layer rotates nothing; None: all rotate
    rope_local_theta: float | None = None  # Gemma 3: of SLIDING layers, which no scaling touches; None: rope_theta
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: head_dim
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None  # of the LM head's scores
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k, v and, but for Qwen2, o
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    is_causal: bool | None = None  # None: the file does not say
    dtype: str | None = None  # of the stored weights, "bfloat16" …

    @property
    def family(self) -> Family:
        """What all models of the type share."""
        return FAMILIES[self.model_type]

    def layer_type(self, layer: int) -> str:
        """FULL or SLIDING."""
        if self.layer_types is not None:
            return self.layer_types[layer]
        return FULL if self.sliding_window is None else SLIDING

    def attention_window(self, causal: bool) -> tuple[int, int] | None:
        """Keys that a query of a SLIDING layer sees to its left and right; None = all.

        A window of w keys means the last w when causal, itself included, and w on either side when bidirectional.
        """
        window = self.sliding_window
        return None if window is None else (window - 1, 0) if causal else (window, window)

    @property
    def output_bias(self) -> bool:
        """Whether ``o_proj`` has a bias."""
        return self.attention_bias and not self.family.qkv_bias

    @property
    def softmax_scale(self) -> float | None:
        """Factor of the attention scores; None: 1 / sqrt(head_dim)."""
        return None if self.query_pre_attn_scalar is None else self.query_pre_attn_scalar**-0.5

    @classmethod
    def from_pretrained(cls, path: str | Path) -> DecoderConfig:
        """Reads ``config.json`` of a directory, or the metadata of a ``.gguf`` file.

        Raises:
            ConfigError: no such file, not JSON, a missing or unsupported field (named).
        """
        path = Path(path)
        if path.suffix == ".gguf":
            from bivec.models.gguf import read_config

            return read_config(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"{file}: no such file; a model directory holds a config.json")
        try:
            raw = parse_json(file.read_bytes())
        except ValueError as error:
            raise ConfigError(f"{file}: not a JSON file ({error})") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{file}: expected a JSON object, found {type(raw).__name__}")
        return cls.from_dict(raw, str(file))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str) -> DecoderConfig:
        """Checks and translates the content of a ``config.json``.

        What the file leaves out has transformers' default for the architecture.

        Args:
            raw: the JSON object.
            source: names the file in errors.

        Raises:
            ConfigError: a field that is missing, has a wrong type or value, or asks for something bivec does not do.
        """
        raw, source = _text_trunk(raw, source)
        family = _family(raw, source)
        fields = Fields({**family.defaults, **raw}, source, family.defaults)
        num_layers = fields.integer("num_hidden_layers")
        num_heads, num_kv_heads, head_dim = _heads(fields)
        rotating = no_rope_layers(fields, num_layers) if "no_rope_layers" in family.reads else None
        rope_theta, rope_scaling, rope_local_theta = rope_settings(fields, family)
        sliding_window, layer_types = window_settings(fields, family, num_layers, rotating)
        scores = {name: fields.optional_number(name) for name in SCORE_SETTINGS if name in family.reads}
        bidirectional = BIDIRECTIONAL in family.reads and fields.flag(BIDIRECTIONAL)
        return cls(
            model_type=fields.raw["model_type"],
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rope_local_theta=rope_local_theta,
            sliding_window=sliding_window,
            layer_types=layer_types,
            no_rope_layers=rotating,
            query_pre_attn_scalar=scores.get("query_pre_attn_scalar"),
            attn_logit_softcapping=scores.get("attn_logit_softcapping"),
            final_logit_softcapping=scores.get("final_logit_softcapping"),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=family.qkv_bias or ("attention_bias" in family.reads and fields.flag("attention_bias")),
            mlp_bias="mlp_bias" in family.reads and fields.flag("mlp_bias"),
            bos_token_id=fields.token("bos_token_id"),
            eos_token_id=fields.tokens("eos_token_id"),
            pad_token_id=fields.token("pad_token_id"),
            is_causal=False if bidirectional else fields.optional_flag("is_causal"),
            dtype=fields.text("dtype") or fields.text("torch_dtype"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers reads (without ``architectures``)."""
        family = self.family
        raw: dict[str, Any] = {
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            family.activation_field: family.activations[0],
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "tie_word_embeddings": self.tie_word_embeddings,
            **{name: getattr(self, name) for name in SPECIAL_TOKENS},
            "torch_dtype": self.dtype,
        }
        if self.is_causal is not None:
            raw["is_causal"] = self.is_causal
        optional = {name: getattr(self, name) for name in (*SCORE_SETTINGS, "attention_bias", "mlp_bias")} | {
            "use_sliding_window": self.sliding_window is not None,
            "sliding_window": self.sliding_window,
            "layer_types": [self.layer_type(layer) for layer in range(self.num_layers)],
            "no_rope_layers": self.no_rope_layers and list(self.no_rope_layers),
            "rope_local_base_freq": self.rope_local_theta,
        }
        return raw | {name: value for name, value in optional.items() if name in family.reads}

    def num_parameters(self, *, lm_head: bool = False) -> int:
        """Parameters of the trunk (input embedding included); ``lm_head`` adds an untied head."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        biases = (
            self.attention_bias * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
            + self.output_bias * self.hidden_size
            + self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        )
        norms = self.family.layer_norms * self.hidden_size + self.family.qk_norm * 2 * self.head_dim
        embedding = self.vocab_size * self.hidden_size
        head = embedding if lm_head and not self.tie_word_embeddings else 0
        return self.num_layers * (attention + mlp + biases + norms) + embedding + self.hidden_size + head


def _heads(fields: Fields) -> tuple[int, int, int]:
    """Heads, heads of keys and values, and their width."""
    num_heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    given = fields.raw.get("num_key_value_heads") is not None
    num_kv_heads = fields.integer("num_key_value_heads") if given else num_heads
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{fields.source}: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    if fields.raw.get("head_dim") is None and hidden_size % num_heads:
        raise ConfigError(
            f"{fields.source}: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}"
        )
    head_dim = fields.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise ConfigError(f"{fields.source}: head_dim {head_dim} is odd; rotary embeddings need an even one")
    return num_heads, num_kv_heads, head_dim


def _text_trunk(raw: dict[str, Any], source: str) -> tuple[dict[str, Any], str]:
    """The text half of a multimodal Gemma 3, with what only the whole says; others as they are."""
    text = raw.get("text_config")
    if raw.get("model_type") != "gemma3" or not isinstance(text, dict):
        return raw, source
    shared = (*SPECIAL_TOKENS, "tie_word_embeddings", "is_causal", "dtype", "torch_dtype", "quantization_config")
    whole = {name: raw[name] for name in shared if raw.get(name) is not None}
    return {**whole, **text, "model_type": "gemma3_text"}, f"{source}: text_config"


def _family(raw: dict[str, Any], source: str) -> Family:
    """The family that the file names, with what no model of it may ask for."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"{source}: model_type {model_type!r} is not supported; bivec runs {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    activation = raw.get(family.activation_field, family.activations[0])
    if activation not in family.activations:
        expected = " or ".join(map(repr, family.activations))
        raise ConfigError(f"{source}: {family.activation_field} {activation!r} is not supported; expected {expected}")
    if raw.get("quantization_config"):
        raise ConfigError(f"{source}: quantization_config is set; bivec reads unquantised weights only")
    if raw.get(BIDIRECTIONAL) and model_type in ("gemma", "gemma2"):
        # transformers' Gemma 1 and 2 heed it or not, depending on padding and attention implementation
        raise ConfigError(f"{source}: {BIDIRECTIONAL} is not supported for {model_type}; set is_causal: false")
    return family
