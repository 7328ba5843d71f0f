"""What the models of one ``model_type`` share, and the table of those that bivec runs.

A family is stated in the file of its model, above its class, by :func:`register`; importing ``bivec.models`` imports
every file of this folder. Two things are stated: facts of the architecture, and what transformers' configuration class
takes for granted where a ``config.json`` says nothing (read in transformers 5.24).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from bivec.models.llama import Llama

Model = TypeVar("Model", bound="type[Llama]")

LLAMA_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}  # defaults that several families share
WINDOW_FIELDS = frozenset({"use_sliding_window", "sliding_window", "layer_types"})


@dataclass(frozen=True)
class Family:
    """The defaults are LLaMA's."""

    trunk: str  # transformers' class without the LM head
    causal_lm: str  # and with it
    reads: frozenset[str] = frozenset()  # optional fields that its config.json may have, beside those of all models
    defaults: dict[str, Any] = field(default_factory=dict)  # of fields that are absent
    activations: tuple[str, ...] = ("silu",)  # names of its one activation in config.json, the first is written
    activation_field: str = "hidden_act"
    qkv_bias: bool = False  # q, k and v have a bias and o has none, whatever the file says
    qk_norm: bool = False  # a norm over every head of q and of k
    layer_norms: int = 2  # norms over the hidden width in a layer; 4: behind attention and feed-forward too
    norm_offset: float = 0.0  # 1: norms multiply by (1 + w)


FAMILIES: dict[str, Family] = {}  # by model_type
MODEL_CLASSES: dict[str, type[Llama]] = {}


def register(model_type: str, family: Family) -> Callable[[Model], Model]:
    """Decorates the class that runs the checkpoints of ``model_type``, the name in their ``config.json``.

    Raises:
        ValueError: another file runs them.
    """

    def enter(model_class: Model) -> Model:
        taken = MODEL_CLASSES.get(model_type, model_class).__module__
        if taken != model_class.__module__:
            raise ValueError(f"model_type {model_type!r} is registered by {taken} and by {model_class.__module__}")
        FAMILIES[model_type], MODEL_CLASSES[model_type] = family, model_class
        return model_class

    return enter
