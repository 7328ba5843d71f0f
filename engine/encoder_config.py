"""The pooling rule of an encoder, and the files that say it: our own, LLM2Vec's, or those of sentence-transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bivec.engine.origin import Origin
from bivec.engine.text_format import SLOT, TextFormat, expand_template
from bivec.models.config import DecoderConfig
from bivec.models.errors import ConfigError
from bivec.models.gguf import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONFIG_FILE = "bivec_config.json"
LLM2VEC_FILE = "llm2vec_config.json"
MODULES_FILE = "modules.json"  # sentence-transformers, as the three that follow
LENGTH_FILE, PROMPTS_FILE = "sentence_bert_config.json", "config_sentence_transformers.json"
POOLING_PATTERN = "*_Pooling/config.json"
# what a hub repository may hold of these, beside weights and tokenizer
CONFIG_PATTERNS = (CONFIG_FILE, LLM2VEC_FILE, MODULES_FILE, LENGTH_FILE, PROMPTS_FILE, POOLING_PATTERN)
# what our own file says beside the fields of EncoderConfig
ORIGIN, PROMPTS, DIFFERENCES = "origin", "prompts", "differences_elsewhere"
GGUF_POOLINGS = {1: "mean", 2: "bos_token", 3: "last_token"}  # llama.cpp's pooling_type
GGUF_KEY = "bivec.encoder"  # in the metadata: the fields of EncoderConfig as JSON
GGUF_ORIGIN = "bivec.origin"
UNLIMITED = 10**6  # transformers writes 1e30 as the length of a tokenizer that has none
# our and llm2vec's names -> mode of segment_pool
POOLINGS = {
    "mean": "mean",
    "weighted_mean": "weighted_mean",
    "last_token": "last",
    "eos_token": "last",
    "bos_token": "first",
}
# sentence-transformers' names, with "pooling_mode_" before them as flags or alone in one field -> ours
SENTENCE_TRANSFORMERS_POOLINGS = {
    "mean_tokens": "mean",
    "mean": "mean",
    "weightedmean_tokens": "weighted_mean",
    "weightedmean": "weighted_mean",
    "lasttoken": "last_token",
    "cls_token": "bos_token",
    "cls": "bos_token",
}


@dataclass(frozen=True)
class EncoderConfig:
    """How texts become vectors; stored beside the weights as ``bivec_config.json``.

    Raises:
        ConfigError: an unknown pooling, a length below 2, a template that is neither a known name nor has its one
            ``{text}``.
    """

    pooling: str = "mean"  # see POOLINGS; "eos_token" also puts an EOS behind every text
    pool_bos: bool = True  # False: special tokens in front are left out of the pooled span, as in the released LLM2Vec
    causal: bool = False
    max_length: int = 512  # tokens, special ones included; a longer text loses its last ones
    template: str | None = None  # "[INST] {text} [/INST]"; a short name of TEMPLATES becomes what it stands for
    skip_instruction: bool = True  # False: instruction and template head are pooled too, as in sentence-transformers
    pool_tail: bool = True  # what follows {text} is pooled too (METHOD 5.4); False: the text only

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling {self.pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length!r}, expected an integer of at least 2 tokens")
        if self.template is not None:
            object.__setattr__(self, "template", expand_template(self.template))


def read_encoder_config(folder: Path, config: DecoderConfig) -> EncoderConfig:
    """The pooling rule stored in a model directory; mean, bidirectional, 512 tokens where it says nothing.

    Args:
        folder: the directory, or a ``.gguf`` file.
        config: of the decoder; its ``is_causal`` counts where the files do not say.

    Raises:
        ConfigError: a file that is not JSON, holds unknown fields or asks for a pooling that bivec does not have.
    """
    return stored_encoder_config(folder, config) or EncoderConfig(causal=bool(config.is_causal))


def stored_encoder_config(folder: Path, config: DecoderConfig) -> EncoderConfig | None:
    """See :func:`read_encoder_config`; None where the directory says nothing.

    Of several files the first of ours, LLM2Vec's and sentence-transformers' counts. A folder of sentence-transformers
    whose config.json does not say ``is_causal`` is causal, since that library runs it so.
    """
    if folder.is_file():
        return _gguf_encoder_config(folder)
    for file, read in (
        (folder / CONFIG_FILE, _read_own),
        (folder / LLM2VEC_FILE, _read_llm2vec),
        (folder / MODULES_FILE, _read_sentence_transformers),
    ):
        if file.is_file():
            settings = read(file)
            try:
                causal = config.is_causal is not False if file.name == MODULES_FILE else bool(config.is_causal)
                return EncoderConfig(**{"causal": causal, **settings})
            except ConfigError as error:
                raise ConfigError(f"{file}: {error}") from error
    return None


def _read_own(file: Path) -> dict[str, Any]:
    settings = _read_json(file, dict)
    settings = {name: value for name, value in settings.items() if name not in (ORIGIN, PROMPTS, DIFFERENCES)}
    unknown = settings.keys() - {field.name for field in fields(EncoderConfig)}
    if unknown:
        raise ConfigError(f"{file}: unknown field {min(unknown)!r}")
    return settings


def _read_llm2vec(file: Path) -> dict[str, Any]:
    """Where LLM2Vec skips the instruction it skips BOS too; else its mean runs over the whole row (METHOD 5.4)."""
    stored = _read_json(file, dict)
    skip = bool(stored.get("skip_instruction", True))
    settings = {"pool_bos": not skip, "skip_instruction": skip}
    settings |= {"pooling": stored["pooling_mode"]} if "pooling_mode" in stored else {}
    return settings | ({"max_length": stored["max_length"]} if "max_length" in stored else {})


def _read_sentence_transformers(file: Path) -> dict[str, Any]:
    folder, modules = file.parent, _read_json(file, list)
    try:
        kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
    except (KeyError, TypeError):
        raise ConfigError(f"{file}: every module needs a type and a path") from None
    unknown = kinds.keys() - {"Transformer", "Pooling", "Normalize"}  # Normalize changes no cosine: the caller's choice
    if unknown:
        raise ConfigError(f"{file}: module {min(unknown)!r} is not supported; bivec has a decoder and a pooling")
    settings: dict[str, Any] = {}
    if "Pooling" in kinds:
        pooling_file = folder / kinds["Pooling"] / "config.json"
        pooling = _read_json(pooling_file, dict)
        prefix = "pooling_mode_"
        modes = [key.removeprefix(prefix) for key, value in pooling.items() if key.startswith(prefix) and value is True]
        modes = modes or [str(pooling.get("pooling_mode"))]
        if len(modes) != 1 or modes[0] not in SENTENCE_TRANSFORMERS_POOLINGS:
            raise ConfigError(f"{pooling_file}: pooling {' + '.join(modes)} is not supported")
        settings["pooling"] = SENTENCE_TRANSFORMERS_POOLINGS[modes[0]]
        settings["skip_instruction"] = not pooling.get("include_prompt", True)
    prompts = _read_json(folder / PROMPTS_FILE, dict) if (folder / PROMPTS_FILE).is_file() else {}
    head = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"))
    if head:  # sentence-transformers puts it before every text
        settings["template"] = f"{head}{SLOT}"
    return settings | _stored_length(folder / kinds.get("Transformer", ""))


def _stored_length(folder: Path) -> dict[str, int]:
    """``max_length``, if the folder says it: from version 6 on it is the tokenizer's."""
    for file, name in (
        (folder / LENGTH_FILE, "max_seq_length"),
        (folder / "tokenizer_config.json", "model_max_length"),
    ):
        length = _read_json(file, dict).get(name) if file.is_file() else None
        if length is not None and (name == "max_seq_length" or length < UNLIMITED):
            return {"max_length": length}
    return {}


def _gguf_encoder_config(file: Path) -> EncoderConfig | None:
    """What llama.cpp's keys say, and ours, which knows more."""
    metadata = read_header(file).metadata
    prefix = metadata.get("general.architecture")
    pooling, causal = metadata.get(f"{prefix}.pooling_type"), metadata.get(f"{prefix}.attention.causal")
    try:
        if GGUF_KEY in metadata:
            return EncoderConfig(**json.loads(metadata[GGUF_KEY]))
        if pooling in GGUF_POOLINGS:
            causal = True if causal is None else bool(causal)  # as llama.cpp runs a decoder
            return EncoderConfig(pooling=GGUF_POOLINGS[pooling], causal=causal)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file}: {GGUF_KEY} is not what bivec writes ({error})") from error
    return None


def stored_prompts(folder: Path) -> dict[str, str]:
    """The named prompts of a folder, ours or of sentence-transformers; those that are empty are left out."""
    for name in (CONFIG_FILE, PROMPTS_FILE):
        stored = _read_json(folder / name, dict).get(PROMPTS) if (folder / name).is_file() else None
        if isinstance(stored, dict):
            return {str(key): str(prompt) for key, prompt in stored.items() if prompt}
    return {}


def stored_origin(folder: Path) -> Origin:
    """What our file, or a GGUF file of ours, says of where the weights come from; nothing where it says nothing."""
    if folder.is_file():
        text = read_header(folder).metadata.get(GGUF_ORIGIN)
        return Origin() if text is None else Origin.from_dict(json.loads(text), folder)
    file = folder / CONFIG_FILE
    stored = _read_json(file, dict).get(ORIGIN) if file.is_file() else None
    return Origin() if stored is None else Origin.from_dict(stored, file)


def _read_json(file: Path, kind: type) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file, though modules.json names it") from None
    except ValueError as error:
        raise ConfigError(f"{file}: not a JSON file ({error})") from error
    if not isinstance(content, kind):
        raise ConfigError(f"{file}: expected a JSON {kind.__name__}, found {type(content).__name__}")
    return content


def text_format(config: EncoderConfig, tokenizer: PreTrainedTokenizerFast) -> TextFormat:
    """The rule by which an encoder, and its training, make rows of texts."""
    first = config.pooling == "bos_token"  # the first token of the row, whatever the spans leave out
    return TextFormat(
        tokenizer,
        config.max_length,
        template=config.template,
        pool_tail=config.pool_tail,
        skip_head=config.skip_instruction and not first,
        pool_bos=config.pool_bos or first,
        append_eos=config.pooling == "eos_token",
    )


def weights_directory(path: str | Path) -> str | Path:
    """A run directory stands for its ``merged/``."""
    merged = Path(path) / "merged"
    return merged if (merged / "config.json").is_file() and not (Path(path) / "config.json").is_file() else path
