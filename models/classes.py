"""The class of every model type."""

from bivec.models.gemma import Gemma, Gemma2, Gemma3
from bivec.models.llama import Llama
from bivec.models.mistral import Mistral
from bivec.models.qwen import Qwen2, Qwen3
from bivec.models.smollm import SmolLM3

MODEL_CLASSES: dict[str, type[Llama]] = {
    "llama": Llama,
    "mistral": Mistral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "smollm3": SmolLM3,
    "gemma": Gemma,
    "gemma2": Gemma2,
    "gemma3_text": Gemma3,
}
