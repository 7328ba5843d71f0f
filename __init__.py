"""bivec: a kernel-optimised training engine for LLM2Vec, which turns decoder-only language models into text encoders.

``bivec.kernels`` holds the operators, ``bivec.models`` the packed models, ``bivec.engine`` the training engine.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Encoder", "__version__"]


def __getattr__(name: str) -> Any:
    # Encoder pulls in the engine: loaded on first use, so that `import bivec` stays light.
    if name == "Encoder":
        from bivec.engine.encoder import Encoder

        return Encoder
    raise AttributeError(f"module 'bivec' has no attribute {name!r}")
