"""The files by which sentence-transformers (5.4 and later) makes an encoder's vectors, and what it cannot make.

Every token is pooled there, but for those of a prompt where ``include_prompt`` is false. What our rules ask for beyond
that is expressed where its own modules can: a BOS that is not pooled is a ``WordWeights`` of 0 (the mean's sum and
count leave it out), the head of a template without a tail is a default prompt. The rest is returned as sentences, for
the model card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from bivec.engine.encoder_config import EncoderConfig
from bivec.engine.foreign_settings import LENGTH_FILE, MODULES_FILE, PROMPTS_FILE
from bivec.engine.text_format import SLOT, encode_strings
from bivec.engine.tokenizer import prefix_ids, prefix_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from bivec.engine.encoder import Encoder
    from bivec.models import DecoderConfig

# the names of version 5, which later ones, vLLM and TEI read too
MODULE = "sentence_transformers.models."
FLAGS = {
    "bos_token": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "sqrt": "pooling_mode_mean_sqrt_len_tokens",
    "weighted_mean": "pooling_mode_weightedmean_tokens",
    "last_token": "pooling_mode_lasttoken",
}
TEMPLATE_PROMPT = "template"  # the name of the default prompt that is a template's head
PROBES = ("The", "a", "2", "\u4f60\u597d", '"x"')


def attention_elsewhere(model: DecoderConfig) -> str | None:
    """The ``attn_implementation`` without which transformers gives other vectors; None where its own choice is right.

    Before 5.21 it takes "sdpa" for Gemma 2 too, which leaves out the cap on the attention scores.
    """
    return None if model.attn_logit_softcapping is None else "eager"


@dataclass
class SentenceTransformersFiles:
    """What goes beside weights and tokenizer."""

    pooling: dict[str, Any]  # 1_Pooling/config.json
    prompts: dict[str, str]
    default_prompt: str | None
    max_length: int
    normalize: bool
    similarity: str
    attention: str | None  # attn_implementation to load the trunk with; None = the library's choice
    weightless: list[int]  # ids of tokens that the mean leaves out
    vocabulary: list[str]
    plain: list[str] = field(default_factory=list)  # in what the vectors of plain texts differ from ours
    other: list[str] = field(default_factory=list)  # … of texts with an instruction, and of odd texts

    def write(self, folder: Path) -> None:
        """Writes them into an empty folder."""
        modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
        if self.weightless:
            modules.insert(1, ("WordWeights", "0_WordWeights"))
            self._write_weights(folder / "0_WordWeights")
        if self.normalize:
            modules.append(("Normalize", "2_Normalize"))
            _write(folder / "2_Normalize" / "config.json", {})
        entries = [
            {"idx": index, "name": str(index), "path": path, "type": MODULE + kind}
            for index, (kind, path) in enumerate(modules)
        ]
        _write(folder / MODULES_FILE, entries)
        _write(folder / "1_Pooling" / "config.json", self.pooling)
        trunk: dict[str, Any] = {"max_seq_length": self.max_length, "do_lower_case": False}
        if self.attention:
            trunk["model_args"] = {"attn_implementation": self.attention}  # read by 5 and 6
        _write(folder / LENGTH_FILE, trunk)
        settings = {
            "__version__": {"sentence_transformers": "5.4.0"},  # older ones measure a prompt otherwise
            "model_type": "SentenceTransformer",
            "prompts": self.prompts,
            "default_prompt_name": self.default_prompt,
            "similarity_fn_name": self.similarity,
        }
        _write(folder / PROMPTS_FILE, settings)

    def _write_weights(self, folder: Path) -> None:
        weights = torch.ones(len(self.vocabulary), 1)
        weights[self.weightless] = 0.0
        names = {self.vocabulary[i]: 0.0 for i in self.weightless}
        settings = {"vocab": self.vocabulary, "word_weights": names, "unknown_word_weight": 1.0}
        _write(folder / "config.json", settings)
        save_file({"emb_layer.weight": weights}, folder / "model.safetensors")


def sentence_transformers_files(
    encoder: Encoder, *, normalize: bool, prompts: Mapping[str, str]
) -> SentenceTransformersFiles:
    """Works out what sentence-transformers has to be told of an encoder.

    Args:
        encoder: the encoder; its tokenizer as it is saved, but for what pooling "eos_token" adds.
        normalize: unit vectors.
        prompts: by name, to the letter.
    """
    config, tokenizer = encoder.config, encoder.tokenizer
    head, _, tail = (config.template or SLOT).partition(SLOT)
    pooling = "last_token" if config.pooling == "eos_token" else config.pooling
    of_span = pooling in ("mean", "weighted_mean")  # else one token decides, wherever the span begins
    whole = not config.skip_instruction or not of_span  # an instruction is pooled, or it does not matter
    found = SentenceTransformersFiles(
        pooling={
            "word_embedding_dimension": encoder.dimension,
            **{flag: name == pooling for name, flag in FLAGS.items()},
            "include_prompt": whole,
        },
        prompts=dict(prompts),
        default_prompt=None,
        max_length=config.max_length,
        normalize=normalize,
        similarity=config.similarity,
        attention=attention_elsewhere(encoder.model.config),
        weightless=[],
        vocabulary=[],
    )
    if head and not tail:
        name = next((name for name, text in prompts.items() if text == head), TEMPLATE_PROMPT)
        while prompts.get(name, head) != head:
            name += "_"
        found.default_prompt = name
        found.prompts[found.default_prompt] = head
        found.other.append(
            "the template's head is a default prompt, which sentence-transformers alone puts before texts by itself"
        )
    skipped_head = bool(head) and not whole
    if skipped_head and not config.pool_bos and prefix_length(tokenizer) and "" in prompts.values():
        found.other.append("with an empty prompt the BOS is pooled there, not here")
    if config.template is not None:
        _template_differences(found, config, skipped_head, tokenizer, pooling)
    if not config.pool_bos and prefix_length(tokenizer) and of_span and not skipped_head:
        _leave_out_prefix(found, tokenizer, pooling, rows=encoder.model.config.vocab_size)
    if not config.pool_tail and config.template is None and pooling != "bos_token" and _suffix_length(tokenizer):
        found.plain.append("the special tokens that the tokenizer puts behind a text are pooled there, not here")
    if not whole:
        _instruction_differences(found, tokenizer, pooling)
    if config.pooling == "eos_token":
        found.other.append("a text that itself ends with the EOS gets a second one there")
    found.other.append("sentence-transformers 5 strips white space around a text")
    return found


def _template_differences(
    found: SentenceTransformersFiles,
    config: EncoderConfig,
    skipped: bool,
    tokenizer: PreTrainedTokenizerFast,
    pooling: str,
) -> None:
    head, _, tail = (config.template or SLOT).partition(SLOT)
    if tail:
        found.plain.append(
            f"every text is put into the template {config.template!r} here, and there taken as it is; what stands "
            "behind a text cannot be said there"
        )
    elif skipped and pooling == "weighted_mean":
        found.plain.append("weights count from the text's first token here, from the row's there")
    elif skipped and not _measured_alike(head, tokenizer):
        found.plain.append("the template's head takes other tokens alone than before a text: the text's first is lost")


def _leave_out_prefix(
    found: SentenceTransformersFiles, tokenizer: PreTrainedTokenizerFast, pooling: str, *, rows: int
) -> None:
    if pooling == "weighted_mean":
        found.plain.append("the BOS is pooled with weight 1 there and left out here, so all weights are shifted by one")
        return
    found.weightless = sorted(set(prefix_ids(tokenizer)))
    words = tokenizer.convert_ids_to_tokens(list(range(max(rows, len(tokenizer)))))
    found.vocabulary = [word or "" for word in words]
    found.other += [
        "an empty text gives zeros there, the BOS here; a BOS written in a text is left out there",
        "vLLM and TEI do not read the module that leaves the BOS out of the mean: they pool it",
    ]


def _instruction_differences(
    found: SentenceTransformersFiles, tokenizer: PreTrainedTokenizerFast, pooling: str
) -> None:
    if pooling == "weighted_mean":
        found.other.append("behind an instruction the weights begin with the text here, with the row there")
    elif found.weightless:
        found.other.append(
            "behind an instruction the vectors have another length there, since its tokens count in the mean's "
            "divisor; their direction is the same"
        )
    own = [prompt for name, prompt in found.prompts.items() if prompt and name != found.default_prompt]
    if all(_measured_alike(prompt, tokenizer) for prompt in own or ["Find: "]):
        return
    lost = (
        "an instruction is not pooled here; sentence-transformers 6 measures a prompt alone, where its last space is a "
        "token of its own, and so leaves out the text's first token as well. Give the prompt without that space and "
        'the texts with it, model.encode([" " + text for text in texts], prompt="Find the answer:"): then only texts '
        "differ before which the space is a token of its own (in some vocabularies: before a digit)"
    )
    (found.plain if own else found.other).append(lost)


def _measured_alike(prompt: str, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a prompt alone has as many tokens as before a text, as sentence-transformers takes for granted."""
    (alone,) = encode_strings(tokenizer, [prompt])
    length = len(alone.ids) - (alone.ids[-1] in tokenizer.all_special_ids)
    for encoding in encode_strings(tokenizer, [prompt + text for text in PROBES]):
        if next(i for i, (_, end) in enumerate(encoding.offsets) if end > len(prompt)) != length:
            return False
    return True


def _suffix_length(tokenizer: PreTrainedTokenizerFast) -> int:
    """Special tokens that the tokenizer puts behind a text."""
    (encoding,) = encode_strings(tokenizer, ["a"])
    return len(encoding.ids) - 1 - max((i for i, (_, end) in enumerate(encoding.offsets) if end), default=-1)


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
