"""The shape of a decoder, read from and written to Hugging Face's ``config.json``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bivec.models.errors import ConfigError
from bivec.models.families import FAMILIES, Family
from bivec.models.plain_json import parse_json

LARGEST, MOST_LAYERS = 2**31 - 1, 10_000  # a damaged number must not become a huge list, or a model without end
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
YARN_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
SCORE_SETTINGS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
KV_HEADS, ORIGINAL_LENGTH = "num_key_value_heads", "original_max_position_embeddings"
BIDIRECTIONAL = "use_bidirectional_attention"  # EmbeddingGemma
FULL, SLIDING = "full_attention", "sliding_attention"  # what a layer sees; names of transformers
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
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3" | "yarn", "factor": …, …}
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
        return FAMILIES[self.model_type]

    def layer_type(self, layer: int) -> str:
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
    def from_dict(cls, raw: dict, source: str) -> DecoderConfig:
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
        fields = _Fields({**family.defaults, **raw}, source, family.defaults)
        raw = fields.raw
        num_layers, num_heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
        hidden_size, num_kv_heads = fields.integer("hidden_size"), num_heads
        if raw.get(KV_HEADS) is not None:
            num_kv_heads = fields.integer(KV_HEADS)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"{source}: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
            )
        if raw.get("head_dim") is None and hidden_size % num_heads:
            raise ConfigError(f"{source}: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}")
        head_dim = fields.integer("head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise ConfigError(f"{source}: head_dim {head_dim} is odd; rotary embeddings need an even one")
        no_rope_layers = _no_rope_layers(fields, num_layers) if "no_rope_layers" in family.reads else None
        bidirectional = BIDIRECTIONAL in family.reads and fields.flag(BIDIRECTIONAL, False)
        return cls(
            model_type=raw["model_type"],
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            **_rope_settings(fields, family),
            **_window_settings(fields, family, num_layers, no_rope_layers),
            no_rope_layers=no_rope_layers,
            **{name: fields.optional_number(name) for name in SCORE_SETTINGS if name in family.reads},
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            attention_bias=family.qkv_bias
            or ("attention_bias" in family.reads and fields.flag("attention_bias", False)),
            mlp_bias="mlp_bias" in family.reads and fields.flag("mlp_bias", False),
            **{name: fields.token(name, several=name == "eos_token_id") for name in SPECIAL_TOKENS},
            is_causal=False if bidirectional else fields.flag("is_causal", None),
            dtype=fields.text("dtype") or fields.text("torch_dtype"),
        )

    def to_dict(self) -> dict:
        """The content of a ``config.json`` that transformers reads (without ``architectures``)."""
        family = self.family
        raw = {
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


@dataclass(frozen=True)
class _Fields:
    """The values of a JSON object, checked; null counts as absent, as in transformers."""

    raw: dict
    source: str  # names the object in errors
    defaults: dict = field(default_factory=dict)

    def _fail(self, field: str, expected: str) -> ConfigError:
        if field not in self.raw:
            return ConfigError(f"{self.source}: {field} is missing, expected {expected}")
        return ConfigError(f"{self.source}: {field} is {self.raw[field]!r}, expected {expected}")

    def _value(self, field: str, default: Any) -> Any:
        value = self.raw.get(field)
        return self.defaults.get(field, default) if value is None else value

    def integer(self, field: str, default: int | None = None, least: int = 1) -> int:
        value, most = self._value(field, default), MOST_LAYERS if field == "num_hidden_layers" else LARGEST
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            small = isinstance(value, bool) or not isinstance(value, int) or value < least
            bound = "" if small else f" of at most {most}"
            raise self._fail(field, ("a positive integer" if least else "an integer of at least 0") + bound)
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self._value(field, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self._fail(field, "a positive number")
        return float(value)

    def optional_number(self, field: str) -> int | float | None:
        """As it is written, an int as an int; null is a value."""
        if self.raw.get(field) is not None:
            self.number(field)
        return self.raw.get(field)

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


def _text_trunk(raw: dict, source: str) -> tuple[dict, str]:
    """The text half of a multimodal Gemma 3, with what only the whole says; others as they are."""
    text = raw.get("text_config")
    if raw.get("model_type") != "gemma3" or not isinstance(text, dict):
        return raw, source
    shared = (*SPECIAL_TOKENS, "tie_word_embeddings", "is_causal", "dtype", "torch_dtype", "quantization_config")
    whole = {name: raw[name] for name in shared if raw.get(name) is not None}
    return {**whole, **text, "model_type": "gemma3_text"}, f"{source}: text_config"


def _family(raw: dict, source: str) -> Family:
    """The family that the file names, with what no model of it may ask for."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"{source}: model_type {model_type!r} is not supported; bivec runs {', '.join(FAMILIES)}")
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


def _no_rope_layers(fields: _Fields, num_layers: int) -> tuple[int, ...]:
    """One number a layer, 0 where it rotates nothing."""
    given = fields.raw.get("no_rope_layers")
    if given is None:
        interval = fields.integer("no_rope_layer_interval", 4)
        return tuple(int((layer + 1) % interval != 0) for layer in range(num_layers))
    whole = isinstance(given, list) and all(type(number) is int and number in (0, 1) for number in given)
    if not whole or len(given) < num_layers:
        raise ConfigError(
            f"{fields.source}: no_rope_layers is {given!r}, expected a 0 or 1 for each of {num_layers} layers"
        )
    return tuple(int(number) for number in given[:num_layers])


def _window_settings(fields: _Fields, family: Family, num_layers: int, no_rope_layers: tuple[int, ...] | None) -> dict:
    """The fields ``sliding_window`` and ``layer_types``."""
    raw, source = fields.raw, fields.source
    window = raw.get("sliding_window") if "sliding_window" in family.reads else None
    if "use_sliding_window" in family.reads and not fields.flag("use_sliding_window", False):
        window = None
    if window is not None:
        window = fields.integer("sliding_window")
        if BIDIRECTIONAL in family.reads and fields.flag(BIDIRECTIONAL, False):
            window //= 2  # the file gives the whole width, not that of a side
    if "layer_types" not in family.reads:
        return {"sliding_window": window, "layer_types": None}
    types = raw.get("layer_types")
    if types is None:
        if raw["model_type"] == "gemma2":
            slides = [layer % 2 == 0 for layer in range(num_layers)]
        elif raw["model_type"] == "gemma3_text":
            pattern = fields.integer("sliding_window_pattern", 6)
            slides = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
        elif no_rope_layers is not None:
            slides = [window is not None and not rotates for rotates in no_rope_layers]
        else:
            first = fields.integer("max_window_layers", least=0)
            slides = [window is not None and layer >= first for layer in range(num_layers)]
        types = [SLIDING if slide else FULL for slide in slides]
    if not isinstance(types, list) or len(types) != num_layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise ConfigError(
            f"{source}: layer_types is {types!r}, expected {FULL!r} or {SLIDING!r} for each of {num_layers} layers"
        )
    if SLIDING in types and window is None:
        raise ConfigError(f"{source}: layer_types has {SLIDING!r}, but sliding_window is not set, or not used")
    same = all(kind == (FULL if window is None else SLIDING) for kind in types)
    return {"sliding_window": window, "layer_types": None if same else tuple(types)}


def _rope_settings(fields: _Fields, family: Family) -> dict:
    """The fields ``rope_theta``, ``rope_scaling`` and ``rope_local_theta``."""
    raw, source = fields.raw, fields.source
    if "rope_local_base_freq" not in family.reads:
        theta, scaling = _rope_fields(raw, source)
        return {"rope_theta": theta, "rope_scaling": scaling}
    nested = raw.get("rope_parameters") or {}
    parts = {kind: nested.get(kind) or {} for kind in (FULL, SLIDING)} if isinstance(nested, dict) else {}
    if not parts or not nested.keys() <= parts.keys() or not all(isinstance(part, dict) for part in parts.values()):
        raise ConfigError(f"{source}: rope_parameters is {nested!r}, expected an object with {FULL} and {SLIDING}")
    scaling = raw.get("rope_scaling") or {}
    merged = {**parts[FULL], **scaling} if isinstance(scaling, dict) else scaling
    theta, scaling = _rope_fields({**raw, "rope_parameters": None, "rope_scaling": merged}, source)
    local = {"rope_theta": fields.number("rope_local_base_freq"), "rope_parameters": parts[SLIDING]}
    local_theta, local_scaling = _rope_fields(local, source)
    if local_scaling is not None:
        raise ConfigError(f"{source}: rope_parameters.{SLIDING} has a scaling, which bivec knows for {FULL} only")
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_local_theta": local_theta}


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
