"""The shape of a decoder, read from and written to Hugging Face's ``config.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bivec.models.errors import ConfigError

ARCHITECTURES = {"llama": "LlamaModel", "mistral": "MistralModel"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


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
        """Checks and translates the content of a ``config.json``; ``source`` names it in errors."""
        model_type = raw.get("model_type")
        if model_type not in ARCHITECTURES:
            raise ConfigError(
                f"{source}: model_type {model_type!r} is not supported; bivec runs {', '.join(sorted(ARCHITECTURES))}"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"{source}: hidden_act {raw['hidden_act']!r} is not supported; expected 'silu'")
        if raw.get("quantization_config"):
            raise ConfigError(f"{source}: quantization_config is set; bivec reads unquantised weights only")

        def integer(field: str, default: int | None = None) -> int:
            value = raw.get(field)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ConfigError(f"{source}: {field} is {value!r}, expected a positive integer")
            return value

        hidden_size, num_heads = integer("hidden_size"), integer("num_attention_heads")
        num_kv_heads = integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"{source}: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
            )
        if raw.get("head_dim") is None and hidden_size % num_heads:
            raise ConfigError(f"{source}: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}")
        theta, scaling = _rope_fields(raw, source)
        return cls(
            model_type=model_type,
            vocab_size=integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=integer("intermediate_size"),
            num_layers=integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=integer("head_dim", hidden_size // num_heads),
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6, source),
            max_position_embeddings=integer("max_position_embeddings", 2048),
            rope_theta=theta,
            rope_scaling=scaling,
            sliding_window=integer("sliding_window") if model_type == "mistral" and raw.get("sliding_window") else None,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_id=raw.get("eos_token_id"),
            is_causal=raw.get("is_causal"),
            dtype=raw.get("dtype") or raw.get("torch_dtype"),
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


def _number(raw: dict, field: str, default: float, source: str) -> float:
    value = raw.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(f"{source}: {field} is {value!r}, expected a positive number")
    return float(value)


def _rope_fields(raw: dict, source: str) -> tuple[float, dict | None]:
    """rope_theta and the scaling from the old layout (rope_theta, rope_scaling) or the new one (rope_parameters)."""
    field = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    parameters = raw.get(field) or {}
    if not isinstance(parameters, dict):
        raise ConfigError(f"{source}: {field} is {parameters!r}, expected an object")
    theta = _number({"rope_theta": parameters.get("rope_theta", raw.get("rope_theta"))}, "rope_theta", 10000.0, source)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ConfigError(f"{source}: {field}.rope_type {kind!r} is not supported; bivec knows {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return theta, None
    scaling = {key: value for key, value in parameters.items() if key not in ("type", "rope_type", "rope_theta")}
    required = ("factor",)
    if kind == "llama3":
        required = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for name in required:
        _number(scaling, name, 0.0, f"{source}: {field}")
    return theta, {"rope_type": kind, **scaling}
