"""The pooling rule of an encoder, and the files that say it: our own, LLM2Vec's, or those of sentence-transformers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bivec.engine.foreign_settings import (
    LENGTH_FILE,
    MODULES_FILE,
    POOLING_PATTERN,
    PROMPTS_FILE,
    WEIGHTS_PATTERN,
    read_llm2vec,
    read_sentence_transformers,
)
from bivec.engine.json_files import json_text, read_json
from bivec.engine.origin import Origin
from bivec.engine.records import check_types
from bivec.engine.text_format import TextFormat, expand_template
from bivec.models.config import DecoderConfig
from bivec.models.errors import ConfigError
from bivec.models.gguf import read_header
from bivec.models.plain_json import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SETTINGS_FILE = "bivec_config.json"
LLM2VEC_FILE = "llm2vec_config.json"
# what a hub repository may hold of settings, beside weights and tokenizer
CONFIG_PATTERNS = (
    SETTINGS_FILE,
    LLM2VEC_FILE,
    MODULES_FILE,
    LENGTH_FILE,
    PROMPTS_FILE,
    POOLING_PATTERN,
    WEIGHTS_PATTERN,
)
# what our own file says beside the fields of EncoderConfig
ORIGIN, PROMPTS, DIFFERENCES, BOS = "origin", "prompts", "differences_elsewhere", "bos_token"
TRAINED_ON = "trained_on"
OTHERS = (ORIGIN, PROMPTS, DIFFERENCES, BOS, TRAINED_ON)
# llama.cpp's pooling_type; its last_token is ours with an EOS behind the text too
GGUF_POOLING_TYPES = {"mean": 1, "bos_token": 2, "last_token": 3, "eos_token": 3}
GGUF_POOLINGS = {number: name for name, number in GGUF_POOLING_TYPES.items() if name != "eos_token"}
GGUF_KEY = "bivec.encoder"  # in the metadata: the fields of EncoderConfig as JSON
GGUF_ORIGIN, GGUF_PROMPTS = "bivec.origin", "bivec.prompts"
# our and llm2vec's names -> mode of segment_pool
POOLINGS = {
    "mean": "mean",
    "weighted_mean": "weighted_mean",
    "last_token": "last",
    "eos_token": "last",
    "bos_token": "first",
}
SIMILARITIES = ("cosine", "dot")


@dataclass(frozen=True)
class EncoderConfig:
    """How texts become vectors; stored beside the weights as ``bivec_config.json``.

    Raises:
        ConfigError: a field of another type, an unknown pooling or similarity, a length below 2, a template that is
            neither a known name nor has its one ``{text}``.
    """

    pooling: str = "mean"  # see POOLINGS; "eos_token" also puts an EOS behind every text
    pool_bos: bool = True  # False: special tokens in front are left out of the pooled span, as in the released LLM2Vec
    causal: bool = False
    max_length: int = 512  # tokens, special ones included; a longer text loses its last ones
    template: str | None = None  # "[INST] {text} [/INST]"; a short name of TEMPLATES becomes what it stands for
    skip_instruction: bool = True  # False: instruction and template head are pooled too, as in sentence-transformers
    pool_tail: bool = True  # what follows {text} is pooled too (METHOD 5.4); False: the text only
    normalize: bool = False  # to unit length, unless ``encode`` is asked for something else
    similarity: str = "cosine"  # or "dot": by which the vectors are to be compared

    def __post_init__(self) -> None:
        try:
            check_types(self)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling {self.pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")
        if self.similarity not in SIMILARITIES:
            raise ConfigError(f"similarity {self.similarity!r} is unknown; choose one of {', '.join(SIMILARITIES)}")
        if self.max_length < 2:
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
    return stored_encoder_config(folder, is_causal=config.is_causal) or EncoderConfig(causal=bool(config.is_causal))


def stored_encoder_config(folder: Path, *, is_causal: bool | None) -> EncoderConfig | None:
    """See :func:`read_encoder_config`; None where the directory says nothing.

    Of several files the first of ours, LLM2Vec's and sentence-transformers' counts. ``is_causal`` is what the decoder's
    config.json says, and counts where they do not say; a folder of sentence-transformers whose config.json does not say
    it either is causal, since that library runs it so.
    """
    if folder.is_file():
        return _gguf_encoder_config(folder)
    for file, read in (
        (folder / SETTINGS_FILE, _read_own),
        (folder / LLM2VEC_FILE, read_llm2vec),
        (folder / MODULES_FILE, read_sentence_transformers),
    ):
        if file.is_file():
            settings = read(file)
            try:
                causal = is_causal is not False if file.name == MODULES_FILE else bool(is_causal)
                return EncoderConfig(**{"causal": causal, **settings})
            except ConfigError as error:
                raise ConfigError(f"{file}: {error}") from error
    return None


def _read_own(file: Path) -> dict[str, Any]:
    settings = read_json(file, dict)
    settings = {name: value for name, value in settings.items() if name not in OTHERS}
    unknown = settings.keys() - {field.name for field in fields(EncoderConfig)}
    if unknown:
        raise ConfigError(f"{file}: unknown field {min(unknown)!r}")
    return settings


def write_settings(
    folder: Path,
    config: EncoderConfig,
    bos_token: str | None,
    *,
    origin: Origin | None = None,
    trained_on: Origin | None = None,
) -> None:
    """Writes how the result of a stage is to be used.

    Args:
        folder: exists.
        config: the pooling rule.
        bos_token: what the tokenizer puts in front of a text; None = nothing.
        origin: of whole weights; None for an adapter.
        trained_on: of the weights that an adapter was trained on.
    """
    settings = {**asdict(config), BOS: bos_token}
    settings |= {} if origin is None else {ORIGIN: origin.to_dict()}
    settings |= {} if trained_on is None else {TRAINED_ON: trained_on.to_dict()}
    (folder / SETTINGS_FILE).write_text(json_text(settings), encoding="utf-8")


def stored_bos(folder: Path) -> tuple[bool, str | None]:
    """Whether a folder of an adapter of ours says which BOS its training had in front, and which; None = none."""
    file = folder / SETTINGS_FILE
    stored = read_json(file, dict) if file.is_file() else {}
    return BOS in stored, stored.get(BOS)


def stored_trained_on(folder: Path) -> Origin | None:
    """The weights that an adapter of ours was trained on; None where its folder does not say."""
    file = folder / SETTINGS_FILE
    stored = read_json(file, dict).get(TRAINED_ON) if file.is_file() else None
    return None if stored is None else Origin.from_dict(stored, file)


def is_encoder(folder: Path) -> bool:
    """Whether a folder or GGUF file is an encoder's, whose tokenizer is taken as it is, and not a mere decoder's."""
    if folder.is_file():
        return _gguf_encoder_config(folder) is not None
    return any((folder / name).is_file() for name in (SETTINGS_FILE, LLM2VEC_FILE, MODULES_FILE))


def _gguf_encoder_config(file: Path) -> EncoderConfig | None:
    """What llama.cpp's keys say, and ours, which knows more."""
    metadata = read_header(file).metadata
    prefix = metadata.get("general.architecture")
    pooling, causal = metadata.get(f"{prefix}.pooling_type"), metadata.get(f"{prefix}.attention.causal")
    try:
        if GGUF_KEY in metadata:
            return EncoderConfig(**parse_json(metadata[GGUF_KEY]))
        if pooling in GGUF_POOLINGS:
            causal = True if causal is None else bool(causal)  # as llama.cpp runs a decoder
            return EncoderConfig(pooling=GGUF_POOLINGS[pooling], causal=causal)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file}: {GGUF_KEY} is not what bivec writes ({error})") from error
    return None


def stored_prompts(folder: Path) -> dict[str, str]:
    """The named prompts of a folder or GGUF file, ours or of sentence-transformers, to the letter."""
    if folder.is_file():
        stored = _gguf_json(folder, GGUF_PROMPTS)
        return _checked_prompts(stored, folder) if stored is not None else {}
    for file in (folder / SETTINGS_FILE, folder / PROMPTS_FILE):
        stored = read_json(file, dict).get(PROMPTS) if file.is_file() else None
        if stored is not None:
            return _checked_prompts(stored, file)
    return {}


def _checked_prompts(stored: Any, file: Path) -> dict[str, str]:
    if not isinstance(stored, dict) or not all(isinstance(prompt, str) for prompt in stored.values()):
        raise ConfigError(f"{file}: prompts are {stored!r}, expected a string for every name")
    return dict(stored)


def stored_origin(folder: Path) -> Origin:
    """What our file, or a GGUF file of ours, says of where the weights come from; nothing where it says nothing."""
    if folder.is_file():
        stored = _gguf_json(folder, GGUF_ORIGIN)
        return Origin() if stored is None else Origin.from_dict(stored, folder)
    file = folder / SETTINGS_FILE
    stored = read_json(file, dict).get(ORIGIN) if file.is_file() else None
    return Origin() if stored is None else Origin.from_dict(stored, file)


def _gguf_json(file: Path, key: str) -> Any:
    text = read_header(file).metadata.get(key)
    try:
        return None if text is None else parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{file}: {key} in the metadata is not JSON ({error})") from error


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
