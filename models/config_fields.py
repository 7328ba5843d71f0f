"""The content of a ``config.json``, value by value and checked: numbers, windows, rotary settings.

``models/config.py`` makes a ``DecoderConfig`` of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from bivec.models.errors import ConfigError
from bivec.models.families import Family

LARGEST, MOST_LAYERS = 2**31 - 1, 10_000  # a damaged number must not become a huge list, or a model without end
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
YARN_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
ORIGINAL_LENGTH = "original_max_position_embeddings"
BIDIRECTIONAL = "use_bidirectional_attention"  # EmbeddingGemma
FULL, SLIDING = "full_attention", "sliding_attention"  # what a layer sees; names of transformers


@dataclass(frozen=True)
class Fields:
    """The values of a JSON object, checked; null counts as absent, as in transformers."""

    raw: dict[str, Any]
    source: str  # names the object in errors
    defaults: dict[str, Any] = field(default_factory=dict)

    def _fail(self, field: str, expected: str) -> ConfigError:
        if field not in self.raw:
            return ConfigError(f"{self.source}: {field} is missing, expected {expected}")
        return ConfigError(f"{self.source}: {field} is {self.raw[field]!r}, expected {expected}")

    def _value(self, field: str, default: Any) -> Any:
        value = self.raw.get(field)
        return self.defaults.get(field, default) if value is None else value

    def integer(self, field: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least ``least``, and no larger than anything real is."""
        value, most = self._value(field, default), MOST_LAYERS if field == "num_hidden_layers" else LARGEST
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            small = isinstance(value, bool) or not isinstance(value, int) or value < least
            bound = "" if small else f" of at most {most}"
            raise self._fail(field, ("a positive integer" if least else "an integer of at least 0") + bound)
        return value

    def number(self, field: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(field, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self._fail(field, "a positive number")
        return float(value)

    def optional_number(self, field: str) -> int | float | None:
        """As it is written, an int as an int; null is a value."""
        value: int | float | None = self.raw.get(field)
        if value is not None:
            self.number(field)
        return value

    def flag(self, field: str) -> bool:
        """False where it is absent."""
        return bool(self.optional_flag(field))

    def optional_flag(self, field: str) -> bool | None:
        """None where it is absent."""
        value: object = self._value(field, None)
        if value is not None and not isinstance(value, bool):
            raise self._fail(field, "true or false")
        return value

    def text(self, field: str) -> str | None:
        """A string; None where it is absent."""
        value: object = self.raw.get(field)
        if value is not None and not isinstance(value, str):
            raise self._fail(field, "a string")
        return value

    def token(self, field: str) -> int | None:
        """A token id; None where it is absent."""
        value: int | None = self.raw.get(field)
        if value is not None and not _is_token(value):
            raise self._fail(field, "a token id")
        return value

    def tokens(self, field: str) -> int | list[int] | None:
        """A token id or a list of them; None where it is absent."""
        value: int | list[int] | None = self.raw.get(field)
        if value is not None and not all(map(_is_token, value if isinstance(value, list) else [value])):
            raise self._fail(field, "a token id or a list of them")
        return value


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def no_rope_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
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


def window_settings(
    fields: Fields, family: Family, num_layers: int, rotating: tuple[int, ...] | None
) -> tuple[int | None, tuple[str, ...] | None]:
    """``sliding_window`` and ``layer_types``; ``rotating`` is what :func:`no_rope_layers` gave."""
    window = _window(fields, family)
    if "layer_types" not in family.reads:
        return window, None
    types = fields.raw.get("layer_types")
    if types is None:
        slides = _sliding_layers(fields, num_layers, window, rotating)
        types = [SLIDING if slide else FULL for slide in slides]
    if not isinstance(types, list) or len(types) != num_layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise ConfigError(
            f"{fields.source}: layer_types is {types!r}, "
            f"expected {FULL!r} or {SLIDING!r} for each of {num_layers} layers"
        )
    if SLIDING in types and window is None:
        raise ConfigError(f"{fields.source}: layer_types has {SLIDING!r}, but sliding_window is not set, or not used")
    same = all(kind == (FULL if window is None else SLIDING) for kind in types)
    return window, None if same else tuple(types)


def _window(fields: Fields, family: Family) -> int | None:
    """Tokens to a side, the row's own among them; None: no layer has a window."""
    used = "use_sliding_window" not in family.reads or fields.flag("use_sliding_window")
    if not used or "sliding_window" not in family.reads or fields.raw.get("sliding_window") is None:
        return None
    window = fields.integer("sliding_window")
    # EmbeddingGemma's file gives the whole width, not that of a side
    return window // 2 if BIDIRECTIONAL in family.reads and fields.flag(BIDIRECTIONAL) else window


def _sliding_layers(
    fields: Fields, num_layers: int, window: int | None, rotating: tuple[int, ...] | None
) -> list[bool]:
    """Which layers have the window where the file does not list them: each family has a rule of its own."""
    if fields.raw["model_type"] == "gemma2":
        return [layer % 2 == 0 for layer in range(num_layers)]
    if fields.raw["model_type"] == "gemma3_text":
        pattern = fields.integer("sliding_window_pattern", 6)
        return [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    if rotating is not None:
        return [window is not None and not rotates for rotates in rotating]
    first = fields.integer("max_window_layers", least=0)
    return [window is not None and layer >= first for layer in range(num_layers)]


def rope_settings(fields: Fields, family: Family) -> tuple[float, dict[str, Any] | None, float | None]:
    """``rope_theta``, ``rope_scaling`` and ``rope_local_theta``."""
    raw, source = fields.raw, fields.source
    if "rope_local_base_freq" not in family.reads:
        return *_rope_fields(raw, source), None
    nested = raw.get("rope_parameters") or {}
    parts = {kind: nested.get(kind) or {} for kind in (FULL, SLIDING)} if isinstance(nested, dict) else {}
    if not parts or not nested.keys() <= parts.keys() or not all(isinstance(part, dict) for part in parts.values()):
        raise ConfigError(f"{source}: rope_parameters is {nested!r}, expected an object with {FULL} and {SLIDING}")
    given = raw.get("rope_scaling") or {}
    merged = {**parts[FULL], **given} if isinstance(given, dict) else given
    theta, scaling = _rope_fields({**raw, "rope_parameters": None, "rope_scaling": merged}, source)
    local = {"rope_theta": fields.number("rope_local_base_freq"), "rope_parameters": parts[SLIDING]}
    local_theta, local_scaling = _rope_fields(local, source)
    if local_scaling is not None:
        raise ConfigError(f"{source}: rope_parameters.{SLIDING} has a scaling, which bivec knows for {FULL} only")
    return theta, scaling, local_theta


def _rope_fields(raw: dict[str, Any], source: str) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and the scaling from the old layout (rope_theta, rope_scaling) or the new one (rope_parameters)."""
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"  # transformers' precedence
    parameters = raw.get(field) or {}
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        raise ConfigError(f"{source}: {field} is {parameters!r}, expected one flat object for all layers")
    outer, inner = Fields(raw, source), Fields(parameters, f"{source}: {field}")
    theta = inner.number("rope_theta", outer.number("rope_theta", 10000.0))
    if theta <= 1.0:
        raise ConfigError(f"{source}: rope_theta is {theta}, expected a number above 1")
    for fields in (outer, inner):
        if fields.number("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"{fields.source}: partial_rotary_factor is not supported; bivec rotates whole heads")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ConfigError(f"{source}: {field}.rope_type {kind!r} is not supported; bivec knows {', '.join(ROPE_TYPES)}")
    return theta, None if kind == "default" else _rope_scaling(kind, inner, outer)


def _rope_scaling(kind: str, inner: Fields, outer: Fields) -> dict[str, Any]:
    """The scaling ``kind``; ``inner`` is its object, ``outer`` the one around it."""
    scaling: dict[str, Any] = {"rope_type": kind, "factor": inner.number("factor")}
    if kind == "linear":
        return scaling
    # some configurations hold the original length outside the scaling; transformers prefers that one
    for fields in (inner, outer):
        if fields.raw.get(ORIGINAL_LENGTH) is not None:
            scaling[ORIGINAL_LENGTH] = fields.integer(ORIGINAL_LENGTH)
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if low >= high:
            raise ConfigError(f"{inner.source}.low_freq_factor {low} must be below high_freq_factor {high}")
        return {**scaling, "low_freq_factor": low, "high_freq_factor": high}
    for name in YARN_NUMBERS:
        if inner.raw.get(name) is not None:
            scaling[name] = inner.number(name)
    if inner.raw.get("truncate") is not None:
        scaling["truncate"] = inner.flag("truncate")
    return scaling
