"""What a path stands for: the weights, the adapters that belong into them, and the folder that says how to use them.

Known layouts: a run (its ``merged/``), a Hugging Face folder, one of sentence-transformers, LLM2Vec's released and
local folders, which are an adapter with or without a config.json (METHOD 9.2), and a ``.gguf`` file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bivec.engine.encoder_config import (
    CONFIG_PATTERNS,
    EncoderConfig,
    is_encoder,
    read_encoder_config,
    stored_bos,
    stored_encoder_config,
    stored_origin,
    stored_prompts,
    stored_trained_on,
    weights_directory,
)
from bivec.engine.errors import CheckpointError, ConfigError
from bivec.engine.foreign_settings import MODULES_FILE, TRANSFORMER, module_folders
from bivec.engine.json_files import json_or_none
from bivec.engine.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, adapter_base, load_adapter
from bivec.engine.origin import Origin, check_same_base, loaded_fingerprint, shown_name
from bivec.engine.packaged import PACKAGED_MODEL, find_smollm2
from bivec.engine.recipe import RUN_FILE
from bivec.engine.tokenizer import load_tokenizer
from bivec.models import load_pretrained
from bivec.models.weights import CONFIG_FILE, MODEL_PATTERNS, TOKENIZER_PATTERNS, Checkpoint, resolve_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ADAPTER_PATTERNS = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
# early versions of sentence-transformers gave the decoder a folder
NESTED_PATTERNS = tuple(f"0_Transformer/{name}" for name in (*MODEL_PATTERNS, *TOKENIZER_PATTERNS, *CONFIG_PATTERNS))
PATTERNS = (*MODEL_PATTERNS, *TOKENIZER_PATTERNS, *CONFIG_PATTERNS, *ADAPTER_PATTERNS, *NESTED_PATTERNS)
WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Source:
    """What a path stands for."""

    weights: Path  # a folder with config.json and weights, or a .gguf file
    adapters: tuple[Path, ...]  # to be merged into them before any other
    settings: Path  # the folder whose files say how to make vectors
    tokenizer: Path
    names: tuple[str, ...]  # under which the decoder is known, the one to show first


@dataclass(frozen=True)
class Opened:
    """An encoder's parts, loaded."""

    checkpoint: Checkpoint  # adapters are merged
    config: EncoderConfig
    tokenizer: PreTrainedTokenizerFast
    prompts: dict[str, str]
    origin: Origin  # of the weights: an adapter beside them is not in it
    adapter: Adapter | None  # the last one, where it was to stay out of the weights


def open_encoder(
    path: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    merge: bool = True,
    tokenizer: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Opened:
    """Loads what a path stands for and merges the adapters.

    The settings are those of the last adapter whose folder says any, as in LLM2Vec, else those of ``path``.

    Args:
        path: see :meth:`bivec.engine.encoder.Encoder.from_pretrained`, as the following.
        adapters: PEFT adapters, directories or hub ids, merged in this order after those that belong to ``path``.
        merge: False = the last one of ``adapters`` stays beside the weights.
        tokenizer: None = that of ``path``.
        settings: fields of EncoderConfig that count instead of what the files say; None = as they say.
        dtype: of the weights.
        device: None = CPU.

    Raises:
        BivecError: see :func:`find_source`; an adapter that does not fit, or is in the weights already; settings that
            cannot be.
    """
    source = find_source(path)
    given = [resolve_checkpoint(adapter, (*ADAPTER_PATTERNS, *CONFIG_PATTERNS)) for adapter in adapters]
    checkpoint = load_pretrained(source.weights, dtype=dtype, device=device)
    origin = stored_origin(source.weights)
    names = [*source.names, *([origin.base_model] if origin.base_model else [])]
    asked = {field: value for field, value in (settings or {}).items() if value is not None}
    length, positions = asked.get("max_length"), checkpoint.config.max_position_embeddings
    if length is not None and length > positions:
        raise ConfigError(f"max_length {length} exceeds the {positions} positions of {path}; give at most these")
    config, adapter = read_encoder_config(source.settings, checkpoint.config), None
    folders, own = (*source.adapters, *given), len(source.adapters)
    for number, folder in enumerate(folders):
        adapter = load_adapter(checkpoint.model, folder)
        recorded = adapter_base(folder)
        if number >= own:
            check_same_base(folder, recorded, names)
        with_it = origin.with_adapter(folder, loaded_fingerprint(adapter))
        origin.check_trained_on(folder, stored_trained_on(folder))
        if merge or number < own or number + 1 < len(folders):
            adapter.merge()
            adapter, origin = None, with_it
        names += [str(folder), *([recorded] if recorded else [])]
        if number >= own:
            config = stored_encoder_config(folder, is_causal=checkpoint.config.is_causal) or config
    add_bos, token = _bos(source, folders)
    words = load_tokenizer(source.tokenizer if tokenizer is None else tokenizer, bos_token=token, add_bos=add_bos)
    # tokens that somebody added may have no embedding, as long as no text holds them
    largest = max(words.backend_tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    if largest >= checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{source.tokenizer if tokenizer is None else tokenizer}: its vocabulary has the token id {largest}, the "
            f"model {checkpoint.config.vocab_size} embeddings; use the tokenizer of this checkpoint"
        )
    origin = replace(origin, base_model=origin.base_model or shown_name(source.names[0]))
    return Opened(checkpoint, replace(config, **asked), words, stored_prompts(source.settings), origin, adapter)


def _bos(source: Source, adapters: Sequence[Path]) -> tuple[bool, str | None]:
    """Whether the tokenizer is made to put a BOS in front, and which; None = the decoder's.

    A decoder's tokenizer is. Whoever made an encoder of it, or an adapter, used it as it was, or says what he did.
    """
    for folder in (*reversed(adapters), source.settings):
        says, token = stored_bos(folder) if folder.is_dir() else (False, None)
        if says:
            return token is not None, token
    return not adapters and not is_encoder(source.settings), None


def find_source(path: str | Path) -> Source:
    """Finds out which layout a path has, and where its parts are. Reads no weights.

    Raises:
        CheckpointError: none of the known layouts (what was looked for); an adapter beside whole weights; an adapter
            whose base model is not here.
    """
    return _find(path, ())


def _find(path: str | Path, met: tuple[Path, ...]) -> Source:
    folder = resolve_checkpoint(find_smollm2() if str(path) == PACKAGED_MODEL else weights_directory(path), PATTERNS)
    if folder.is_file():
        return Source(folder, (), folder, folder, (folder.stem,))
    if folder.resolve() in met:
        raise CheckpointError(f"{folder}: its adapter_config.json names itself as the base model; give the decoder")
    whole = any(any(folder.glob(pattern)) for pattern in WEIGHTS)
    if (folder / ADAPTER_CONFIG).is_file():
        if whole:
            raise CheckpointError(
                f"{folder}: holds whole weights and an adapter ({ADAPTER_CONFIG}), and nothing says whether the one is "
                "in the other; move the adapter into a folder of its own and give both: "
                "Encoder.from_pretrained(model, adapters=[adapter])"
            )
        return _adapter_source(path, folder, met)
    root = folder
    if not (folder / CONFIG_FILE).is_file() and (folder / MODULES_FILE).is_file():
        folder = module_folders(folder / MODULES_FILE).get(TRANSFORMER, folder)
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(_nothing_known(folder))
    return Source(folder, (), root, folder, _names(path, folder))


def _adapter_source(path: str | Path, folder: Path, met: tuple[Path, ...]) -> Source:
    """LLM2Vec's ``-mntp`` repositories and everything that its training leaves: the base model is named inside."""
    base = _beside(folder, adapter_base(folder))
    if base is None:
        raise CheckpointError(
            f"{folder}: an adapter whose {ADAPTER_CONFIG} names no base_model_name_or_path; give the model: "
            f"Encoder.from_pretrained(model, adapters=[{str(folder)!r}])"
        )
    try:
        found = _find(base, (*met, folder.resolve()))
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: an adapter on {base}, which cannot be opened ({error}); give the model by its path: "
            f"Encoder.from_pretrained(model, adapters=[{str(folder)!r}])"
        ) from error
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZERS)
    names = dict.fromkeys((*found.names, base, *_names(path, folder)))
    return Source(
        found.weights,
        (*found.adapters, folder),
        folder if is_encoder(folder) else found.settings,
        folder if has_tokenizer else found.tokenizer,
        tuple(names),
    )


def _beside(folder: Path, base: str | None) -> str | None:
    """A base model's name as an adapter has it; a relative path may be meant from the adapter."""
    if base is None or Path(base).is_absolute() or Path(base).exists():
        return base
    near = next((place for place in (folder / base, folder.parent / base) if place.exists()), None)
    return base if near is None else str(near)


def _names(path: str | Path, folder: Path) -> tuple[str, ...]:
    """Under which the weights of a folder may be known: as they were asked for, by their config.json, by the run."""
    own = _json(folder / CONFIG_FILE).get("_name_or_path")
    of_runs = [(_json(place / RUN_FILE).get("recipe") or {}).get("model") for place in (folder, folder.parent)]
    return tuple(dict.fromkeys(str(name) for name in (own, *of_runs, path, folder.name) if name))


def _json(file: Path) -> dict[str, Any]:
    """A file that may be missing or damaged; whoever needs it complains."""
    content = json_or_none(file)
    return content if isinstance(content, dict) else {}


def _nothing_known(folder: Path) -> str:
    """The error for a folder that is none of the known layouts."""
    if not folder.is_dir():
        return f"{folder}: no such directory, though {MODULES_FILE} names it"
    if (folder / RUN_FILE).is_file():
        return f"{folder}: a run that has written no merged/ yet; go on with it (--resume) or give one of its stages"
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if files:
        return f"{folder}: holds GGUF files; give the file itself: {folder / files[0]}"
    return (
        f"{folder}: none of the known layouts. Looked for config.json with model.safetensors (Hugging Face, "
        f"sentence-transformers), merged/config.json (a run), {ADAPTER_CONFIG} with adapter_model.safetensors (PEFT, "
        f"LLM2Vec), {MODULES_FILE} (sentence-transformers) and *.gguf; there is "
        f"{', '.join(sorted(item.name for item in folder.iterdir())[:8]) or 'nothing'}"
    )
