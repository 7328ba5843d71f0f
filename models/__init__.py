"""Packed decoder models and their checkpoints: the architecture, nothing of training."""

from importlib import import_module
from pkgutil import iter_modules

from bivec.models.batch import PackedBatch
from bivec.models.config import DecoderConfig
from bivec.models.errors import BivecError, CheckpointError, ConfigError
from bivec.models.gemma import Gemma, Gemma2, Gemma3
from bivec.models.llama import Llama
from bivec.models.mistral import Mistral
from bivec.models.qwen import Qwen2, Qwen3
from bivec.models.smollm import SmolLM3
from bivec.models.weights import Checkpoint, load_pretrained, save_pretrained

__all__ = [
    "BivecError",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "DecoderConfig",
    "Gemma",
    "Gemma2",
    "Gemma3",
    "Llama",
    "Mistral",
    "PackedBatch",
    "Qwen2",
    "Qwen3",
    "SmolLM3",
    "load_pretrained",
    "save_pretrained",
]

for _module in iter_modules(__path__):  # the file of a new family registers its class without being named anywhere
    if _module.name.isidentifier():  # an editor's copy is no module
        import_module(f"{__name__}.{_module.name}")
del _module
