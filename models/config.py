"""The shape of a decoder, read from and written to Hugging Face's ``config.json``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bivec.models.errors import ConfigError

MODEL_TYPES = ("llama", "mistral")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
YARN_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
KV_HEADS, ORIGINAL_LENGTH = "num_key_value_heads", "original_max_position_embeddings"


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that the architecture of a LLaMA- or Mistral-style decoder depends on."""

    model_type: str  # "llama" | "mistral"
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
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3" | "yarn", "factor": …, …}
    sliding_window: int | None = None  # Mistral v0.1: 4096
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    is_causal: bool | None = None  # None: the file does not say
    dtype: str | None = None  # of the stored weights, "bfloat16" …

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
            raw = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: not a JSON file ({error})") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{file}: expected a JSON object, found {type(raw).__name__}")
        return cls.from_dict(raw, str(file))

    @classmethod
    def from_dict(cls, raw: dict, source: str) -> DecoderConfig:
        """Checks and translates the content of a ``config.json``.

        What the file leaves out has transformers' default for the architecture.

        Args:
            raw: the JSON object.
            source: names the file in errors.

        Raises:
            ConfigError: a field that is missing, has a wrong type or value, or asks for something bivec does not do.
        """
        fields = _Fields(raw, source)
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
            raise ConfigError(
                f"{source}: model_type {model_type!r} is not supported; bivec runs {', '.join(MODEL_TYPES)}"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"{source}: hidden_act {raw['hidden_act']!r} is not supported; expected 'silu'")
        if raw.get("quantization_config"):
            raise ConfigError(f"{source}: quantization_config is set; bivec reads unquantised weights only")
        mistral = model_type == "mistral"
        hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        num_kv_heads = fields.integer(KV_HEADS, 8 if mistral and KV_HEADS not in raw else num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"{source}: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
            )
        if raw.get("head_dim") is None and hidden_size % num_heads:
            raise ConfigError(f"{source}: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}")
        head_dim = fields.integer("head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise ConfigError(f"{source}: head_dim {head_dim} is odd; rotary embeddings need an even one")
        theta, scaling = _rope_fields(raw, source)
        window = raw.get("sliding_window", 4096) if mistral else None  # a LLaMA has none, whatever the file says
        return cls(
            model_type=model_type,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            max_position_embeddings=fields.integer("max_position_embeddings", 131072 if mistral else 2048),
            rope_theta=theta,
            rope_scaling=scaling,
            sliding_window=None if window is None else fields.integer("sliding_window", window),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            # transformers' Mistral has no biases and does not read these
            attention_bias=not mistral and fields.flag("attention_bias", False),
            mlp_bias=not mistral and fields.flag("mlp_bias", False),
            bos_token_id=fields.token("bos_token_id"),
            eos_token_id=fields.token("eos_token_id", several=True),
            is_causal=fields.flag("is_causal", None),
            dtype=fields.text("dtype") or fields.text("torch_dtype"),
        )

    def to_dict(self) -> dict:
        """The content of a ``config.json`` that transformers reads (without ``architectures``)."""
        raw = {
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "torch_dtype": self.dtype,
        }
        if self.is_causal is not None:
            raw["is_causal"] = self.is_causal
        if self.model_type == "mistral":
            raw["sliding_window"] = self.sliding_window
        else:
            raw |= {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}
        return raw

    def num_parameters(self, *, lm_head: bool = False) -> int:
        """Parameters of the trunk (input embedding included); ``lm_head`` adds an untied head."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        biases = self.attention_bias * (
            self.head_dim * (self.num_heads + 2 * self.num_kv_heads) + self.hidden_size
        ) + self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        per_layer = attention + mlp + biases + 2 * self.hidden_size
        embedding = self.vocab_size * self.hidden_size
        head = embedding if lm_head and not self.tie_word_embeddings else 0
        return self.num_layers * per_layer + embedding + self.hidden_size + head


@dataclass(frozen=True)
class _Fields:
    """The values of a JSON object, checked; null counts as absent, as in transformers."""

    raw: dict
    source: str  # names the object in errors

    def _fail(self, field: str, expected: str) -> ConfigError:
        if field not in self.raw:
            return ConfigError(f"{self.source}: {field} is missing, expected {expected}")
        return ConfigError(f"{self.source}: {field} is {self.raw[field]!r}, expected {expected}")

    def _value(self, field: str, default: Any) -> Any:
        value = self.raw.get(field)
        return default if value is None else value

    def integer(self, field: str, default: int | None = None) -> int:
        value = self._value(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self._fail(field, "a positive integer")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self._value(field, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self._fail(field, "a positive number")
        return float(value)

    def flag(self, field: str, default: bool | None) -> bool | None:
        value = self._value(field, default)
        if value is not None and not isinstance(value, bool):
            raise self._fail(field, "true or false")
        return value

    def text(self, field: str) -> str | None:
        value = self.raw.get(field)
        if value is not None and not isinstance(value, str):
            raise self._fail(field, "a string")
        return value

    def token(self, field: str, *, several: bool = False) -> int | list[int] | None:
        value = self.raw.get(field)
        ids = value if several and isinstance(value, list) else [value]
        if value is not None and not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise self._fail(field, "a token id" + (" or a list of them" if several else ""))
        return value


def _rope_fields(raw: dict, source: str) -> tuple[float, dict | None]:
    """rope_theta and the scaling from the old layout (rope_theta, rope_scaling) or the new one (rope_parameters)."""
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"  # transformers' precedence
    parameters = raw.get(field) or {}
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        raise ConfigError(f"{source}: {field} is {parameters!r}, expected one flat object for all layers")
    outer, inner = _Fields(raw, source), _Fields(parameters, f"{source}: {field}")
    theta = inner.number("rope_theta", outer.number("rope_theta", 10000.0))
    if theta <= 1.0:
        raise ConfigError(f"{source}: rope_theta is {theta}, expected a number above 1")
    for fields in (outer, inner):
        if fields.number("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"{fields.source}: partial_rotary_factor is not supported; bivec rotates whole heads")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ConfigError(f"{source}: {field}.rope_type {kind!r} is not supported; bivec knows {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return theta, None
    scaling: dict = {"rope_type": kind, "factor": inner.number("factor")}
    if kind == "linear":
        return theta, scaling
    # some configurations hold the original length outside the scaling; transformers prefers that one
    for fields in (inner, outer):
        if fields.raw.get(ORIGINAL_LENGTH) is not None:
            scaling[ORIGINAL_LENGTH] = fields.integer(ORIGINAL_LENGTH)
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if low >= high:
            raise ConfigError(f"{source}: {field}.low_freq_factor {low} must be below high_freq_factor {high}")
        return theta, {**scaling, "low_freq_factor": low, "high_freq_factor": high}
    for name in YARN_NUMBERS:
        if parameters.get(name) is not None:
            scaling[name] = inner.number(name)
    if parameters.get("truncate") is not None:
        scaling["truncate"] = inner.flag("truncate", True)
    return theta, scaling
