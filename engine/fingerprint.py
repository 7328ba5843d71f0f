"""Checksums that tell one model, or one tokenizer, from another: results on the disk are kept under them."""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch
from torch import nn

ELSEWHERE = {"_name_or_path", "transformers_version"}  # of a configuration: where it was read, and by what


def model_checksum(model: nn.Module) -> str:
    """Eight hexadecimal digits of a model's configuration and of all of its weights; some seconds for a 7B model."""
    config = getattr(model, "config", None)
    settings = {} if config is None else {key: config.to_dict()[key] for key in config.to_dict().keys() - ELSEWHERE}
    checksum = zlib.crc32(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        raw = weight.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
        checksum = zlib.crc32(f"{name} {tuple(weight.shape)} {weight.dtype}".encode(), checksum)
        checksum = zlib.crc32(raw, checksum)
    return f"{checksum:08x}"


def tokenizer_checksum(tokenizer: Any) -> str:
    """Eight hexadecimal digits of a fast tokenizer's rules; the truncation that a call has left is none of them."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return f"{zlib.crc32(json.dumps(rules, sort_keys=True).encode()):08x}"
