"""Packed decoder models and their checkpoints: the architecture, nothing of training."""

from bivec.models.batch import PackedBatch
from bivec.models.config import DecoderConfig
from bivec.models.errors import BivecError, CheckpointError, ConfigError
from bivec.models.llama import Llama
from bivec.models.mistral import Mistral
from bivec.models.weights import Checkpoint, load_pretrained, save_pretrained

__all__ = [
    "BivecError",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "DecoderConfig",
    "Llama",
    "Mistral",
    "PackedBatch",
    "load_pretrained",
    "save_pretrained",
]
