"""Where the weights of an encoder come from: the decoder, and the adapters that were merged into it.

It goes with every encoder that is saved (in ``bivec_config.json``), so that a model card can name the decoder and no
adapter is merged twice: merging one again changes every vector and nothing else would show it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bivec.engine.lora import Adapter, LoraConfig
from bivec.models.errors import CheckpointError, ConfigError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# who publishes the decoders that bivec knows, and LLM2Vec's adapters
OWNERS = (
    "meta-llama",
    "mistralai",
    "princeton-nlp",
    "TinyLlama",
    "HuggingFaceTB",
    "Qwen",
    "google",
    "McGill-NLP",
    "NousResearch",
    "unsloth",
    "huggyllama",
)


@dataclass(frozen=True)
class MergedAdapter:
    """One adapter in the weights, or a stage that trained all of them."""

    name: str  # of its folder
    sha256: str  # see :func:`adapter_fingerprint`, or :func:`weights_fingerprint`
    whole: bool = False  # all weights were trained


@dataclass(frozen=True)
class Origin:
    """The decoder of an encoder, and what was merged into its weights, in this order."""

    base_model: str | None = None  # hub id, or the name of a folder or file, without its path
    adapters: tuple[MergedAdapter, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        adapters = [
            {"name": one.name, "sha256": one.sha256} | ({"whole": True} if one.whole else {}) for one in self.adapters
        ]
        return {"base_model": self.base_model, "adapters": adapters}

    @classmethod
    def from_dict(cls, stored: Any, source: Path) -> Origin:
        """The reverse.

        Raises:
            ConfigError: not what :meth:`to_dict` writes.
        """
        told = f"{source}: origin is {repr(stored)[:200]}, not what bivec writes"
        try:
            adapters = tuple(
                MergedAdapter(one["name"], one["sha256"], one.get("whole", False)) for one in stored["adapters"]
            )
            base = stored["base_model"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{told} ({error!r})") from None
        texts = ["" if base is None else base, *(text for one in adapters for text in (one.name, one.sha256))]
        if not all(isinstance(text, str) for text in texts) or any(type(one.whole) is not bool for one in adapters):
            raise ConfigError(f"{told} (a name that is no string, or whole that is neither true nor false)")
        return cls(base, adapters)

    def with_adapter(self, folder: str | Path, sha256: str, *, whole: bool = False) -> Origin:
        """With one adapter more, or one stage that trained all weights.

        Raises:
            CheckpointError: it is in the weights already.
        """
        for one in self.adapters:
            if one.sha256 == sha256:
                raise CheckpointError(
                    f"{folder}: this adapter is in the weights already: {one.name} was merged into them (same "
                    "matrices); leave it out of the adapters, or give the model as it was before it"
                )
        return replace(self, adapters=(*self.adapters, MergedAdapter(folder_name(folder), sha256, whole)))

    def check_trained_on(self, folder: str | Path, trained_on: Origin | None) -> None:
        """Whether these are the weights that an adapter was trained on; anywhere else it makes no sense.

        Args:
            folder: of the adapter.
            trained_on: what its folder says; None = nothing, as others' adapters.

        Raises:
            CheckpointError: something is missing in the weights, is there besides, or in another order.
        """
        if trained_on is None or [x.sha256 for x in self.adapters] == [x.sha256 for x in trained_on.adapters]:
            return
        wanted, there = (", ".join(one.name for one in x.adapters) or "nothing" for x in (trained_on, self))
        raise CheckpointError(
            f"{folder}: was trained on weights that hold {wanted} (by its bivec_config.json), these hold {there}. Give "
            f"what is missing before it, in this order: {_advice(Path(folder), trained_on)}; or, if these are the "
            "right weights all the same, take the field trained_on out of that file"
        )


def _advice(folder: Path, trained_on: Origin) -> str:
    """The call that opens an adapter, as far as the stages before it lie beside it."""
    places = [str(folder.parent / x.name) if (folder.parent / x.name).is_dir() else x.name for x in trained_on.adapters]
    first = max((number for number, one in enumerate(trained_on.adapters) if one.whole), default=-1)
    model = trained_on.base_model if first < 0 else places[first]
    return f"Encoder.from_pretrained({model!r}, adapters={[*places[first + 1 :], str(folder)]!r})"


def folder_name(folder: str | Path) -> str:
    """A name for a folder: its own, or, in the hub's cache, that of the repository."""
    place = Path(folder).resolve()
    if place.parent.name == "snapshots":
        return place.parent.parent.name.rpartition("--")[2]
    return place.name


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a few of a decoder's own weights, in fp32: enough to tell one training's end from another's."""
    digest = hashlib.sha256()
    for name in ("norm.weight", "layers.0.input_layernorm.weight", "layers.0.self_attn.q_proj.weight"):
        digest.update(name.encode())
        digest.update(model.get_parameter(name).detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def adapter_fingerprint(config: LoraConfig, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what an adapter adds: its matrices in fp32 by trunk name, and the scaling; no name of a file."""
    digest = hashlib.sha256(f"{config.scaling:.8g}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def loaded_fingerprint(adapter: Adapter) -> str:
    """:func:`adapter_fingerprint` of one that is in a model, not sharded."""
    return adapter_fingerprint(adapter.config, adapter.named_parameters())


def check_same_base(folder: str | Path, recorded: str | None, names: Collection[str]) -> None:
    """Two decoders of one shape (Mistral-7B and Llama-3-8B are) take each other's adapters without a word.

    Only names that are surely the hub's are compared, since a folder may be called anything.

    Args:
        folder: of the adapter.
        recorded: the base model that its adapter_config.json names.
        names: those under which the model is known.

    Raises:
        CheckpointError: the adapter names another model of the hub than this one.
    """
    known = sorted({name for name in names if is_known_hub_id(name)})
    if recorded and is_known_hub_id(recorded) and known and recorded not in names:
        raise CheckpointError(
            f"{folder}: its adapter_config.json says that it was trained on {recorded}, the model is {known[0]}; give "
            f"the adapter's own base model, or, if they are the same, write {known[0]!r} as base_model_name_or_path "
            f"into {Path(folder) / 'adapter_config.json'}"
        )


def is_hub_id(name: str) -> bool:
    """Whether a name can be ``owner/name`` of the hub; a folder in a folder can be called so too."""
    return bool(HUB_ID.fullmatch(name)) and not name.startswith(".")


def is_known_hub_id(name: str) -> bool:
    """Whether a name is of the hub for sure: its owner publishes decoders there, or adapters for them."""
    return is_hub_id(name) and name.partition("/")[0] in OWNERS


def shown_name(name: str) -> str:
    """What may be written down of a model's name: a hub id, or a path's last part."""
    return name if is_hub_id(name) and not Path(name).exists() else Path(name).name
