"""The error types that users of bivec can catch: all ``ValueError``; messages name the file, the field and the fix."""


class BivecError(ValueError):
    """Base of every error that bivec raises about its input."""


class ConfigError(BivecError):
    """A model configuration that is missing a field, contradicts itself or names something bivec does not support."""


class CheckpointError(BivecError):
    """A checkpoint (safetensors, GGUF, adapter, training state) that is missing, cut off or does not fit the model."""
