"""An encoder on the disk as other libraries take it.

It is a folder of sentence-transformers whose root is a plain Hugging Face model, with its tokenizer, our own settings
and a model card.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bivec.engine.encoder_config import (
    DIFFERENCES,
    ORIGIN,
    PROMPTS,
    SETTINGS_FILE,
    read_encoder_config,
    stored_origin,
)
from bivec.engine.errors import CheckpointError, ConfigError
from bivec.engine.json_files import json_text, read_json
from bivec.engine.lora import ADAPTER_CONFIG
from bivec.engine.model_card import CARD_FILE, ModelCard, is_ours, render_card
from bivec.engine.sentence_transformers_files import sentence_transformers_files
from bivec.engine.tokenizer import append_eos, prefix_length
from bivec.models import DecoderConfig, save_pretrained
from bivec.models.files import atomic_directory, write_text_atomic
from bivec.models.weights import MODEL_PATTERNS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from bivec.engine.encoder import Encoder

# of an earlier save: what would still be read
STALE = (*MODEL_PATTERNS, "chat_template*")


def save_encoder(
    encoder: Encoder,
    path: str | Path,
    *,
    normalize: bool | None = None,
    prompts: Mapping[str, str] | None = None,
    card: ModelCard | None = None,
) -> None:
    """See :meth:`bivec.engine.encoder.Encoder.save_pretrained`."""
    path = Path(path)
    if (path / ADAPTER_CONFIG).exists():
        raise CheckpointError(
            f"{path}: holds an adapter ({ADAPTER_CONFIG}), which transformers would put on top of the weights saved "
            "there; choose another directory"
        )
    prompts = dict(encoder.prompts if prompts is None else prompts)
    config = encoder.config if normalize is None else replace(encoder.config, normalize=normalize)
    if not prefix_length(encoder.tokenizer):
        config = replace(config, pool_bos=True)  # says the same, and other libraries' users need not leave a word out
    files = sentence_transformers_files(encoder, normalize=config.normalize, prompts=prompts)
    differences = [*files.plain, *files.other]
    settings = {
        **asdict(config),
        PROMPTS: prompts,
        ORIGIN: encoder.origin.to_dict(),
        DIFFERENCES: differences,
    }
    readme = path / CARD_FILE
    with atomic_directory(path, stale=STALE, last="config.json") as temporary:
        save_pretrained(encoder.model, temporary, is_causal=encoder.config.causal)
        exported_tokenizer(encoder).save_pretrained(temporary)
        files.write(temporary)
        (temporary / SETTINGS_FILE).write_text(json_text(settings), encoding="utf-8")
        if not readme.exists() or is_ours(readme):
            (temporary / CARD_FILE).write_text(
                render_card(
                    config,
                    encoder.model.config,
                    encoder.origin,
                    card or ModelCard(),
                    name=path.resolve().name,
                    differences=differences,
                ),
                encoding="utf-8",
            )
    if files.plain:
        warnings.warn(
            f"{path}: other libraries do not give this encoder's vectors: {'; '.join(files.plain)} (README.md there)",
            stacklevel=3,
        )


def exported_tokenizer(encoder: Encoder) -> PreTrainedTokenizerFast:
    """The encoder's tokenizer as others use it; a copy.

    It pads on the right, where positions and weights do not move; has no chat template, which is of no use to an
    encoder and would have newer libraries wrap texts in it; and puts an EOS behind a text if that is what is pooled.
    """
    tokenizer = copy.deepcopy(encoder.tokenizer)
    backend = tokenizer.backend_tokenizer
    # the truncation that encode_tokens leaves would be saved with it
    backend.no_truncation()
    backend.no_padding()
    tokenizer.chat_template, tokenizer.padding_side = None, "right"
    if encoder.config.pooling == "eos_token":
        append_eos(tokenizer.backend_tokenizer, tokenizer.eos_token, tokenizer.eos_token_id)
    return tokenizer


def rewrite_card(folder: str | Path, card: ModelCard) -> None:
    """Writes the model card of a saved encoder again, with what is known only now; somebody else's README.md stays.

    Raises:
        BivecError: the folder holds no encoder of ours, or the disk is full.
    """
    folder = Path(folder)
    if (folder / CARD_FILE).exists() and not is_ours(folder / CARD_FILE):
        return
    shape = DecoderConfig.from_pretrained(folder)
    stored = read_json(folder / SETTINGS_FILE, dict)
    if DIFFERENCES not in stored:
        raise ConfigError(f"{folder / SETTINGS_FILE}: no {DIFFERENCES!r}: not an encoder that save_pretrained wrote")
    text = render_card(
        read_encoder_config(folder, shape),
        shape,
        stored_origin(folder),
        card,
        name=folder.resolve().name,
        differences=stored[DIFFERENCES],
    )
    write_text_atomic(folder / CARD_FILE, text)
