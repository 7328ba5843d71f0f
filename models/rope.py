"""The rotary tables of a decoder: frequencies with the scalings in use, cosines and sines per position.

Sources: Su et al. 2021 (RoFormer); linear: Chen et al. 2023 (position interpolation); yarn: Peng et al. 2023; llama3:
the frequency-banded interpolation that Llama 3.1 was released with. Field names are those of Hugging Face configs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bivec.models.config import DecoderConfig
from bivec.models.config_fields import FULL, ORIGINAL_LENGTH, ROPE_TYPES, SLIDING
from bivec.models.errors import ConfigError


def _original_length(config: DecoderConfig, scaling: dict[str, Any]) -> int:
    """The context length before it was extended; where the scaling does not say, transformers takes the whole one."""
    return scaling.get(ORIGINAL_LENGTH) or config.max_position_embeddings


def _llama3(config: DecoderConfig, frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Long wavelengths are interpolated by ``factor``, short ones kept, those between blended."""
    original = _original_length(config, scaling)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    rotations = original * frequencies / (2 * math.pi)  # turns over the original context
    blend = ((rotations - low) / (high - low)).clamp(0, 1)
    interpolated: Tensor = frequencies * (blend + (1 - blend) / scaling["factor"])
    return interpolated


def _yarn(config: DecoderConfig, frequencies: Tensor, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    factor, dim = scaling["factor"], config.head_dim
    original = _original_length(config, scaling)

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(scaling.get("beta_fast") or 32), dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 0.001
    interpolate = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    frequencies = frequencies / factor * interpolate + frequencies * (1 - interpolate)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            attention_factor = mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
        else:
            attention_factor = mscale(1.0)
    return frequencies, attention_factor


def rotary_frequencies(config: DecoderConfig) -> tuple[Tensor, float]:
    """Angle per position of every pair of dimensions, and the factor on cosines and sines.

    Returns:
        ([Dh/2] fp32, attention factor: 1 but for yarn).

    Raises:
        ConfigError: a scaling that is not supported.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] == "default":
        return frequencies, 1.0
    kind = scaling["rope_type"]
    if kind == "linear":
        return frequencies / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(config, frequencies, scaling), 1.0
    if kind == "yarn":
        return _yarn(config, frequencies, scaling)
    raise ConfigError(f"rope_scaling: rope_type {kind!r} is not supported; bivec knows {', '.join(ROPE_TYPES)}")


def rotary_table(config: DecoderConfig, length: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions 0 … length-1: two tensors [length, Dh/2] fp32."""
    frequencies, factor = rotary_frequencies(config)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)  # [length, Dh/2]
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def rotary_tables(
    config: DecoderConfig, length: int, device: torch.device | str | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """``rotary_table`` for both types of layers; one table where they do not differ."""
    full = sliding = rotary_table(config, length, device)
    if config.rope_local_theta is not None:
        local = replace(config, rope_theta=config.rope_local_theta, rope_scaling=None)
        sliding = rotary_table(local, length, device)
    return {FULL: full, SLIDING: sliding}
