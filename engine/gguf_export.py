"""Encoders as GGUF files, for llama.cpp: weights, tokenizer, and in the metadata pooling and mask.

The rows of LLaMA's q and k are permuted as llama.cpp rotates them (see ``bivec.models.gguf``, which reads the file). A
tokenizer is a list of tokens there and the name of a way to split text; which of these a ``tokenizer.json`` follows is
found out by what it does, and what is written is read back and compared before the file gets its name.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bivec.engine.encoder_config import GGUF_KEY, GGUF_ORIGIN, GGUF_POOLING_TYPES, GGUF_PROMPTS
from bivec.engine.errors import CheckpointError, ConfigError
from bivec.engine.export import exported_tokenizer
from bivec.engine.sentencepiece_bpe import CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from bivec.engine.tokenizer import byte_level_splits, load_tokenizer, prefix_length
from bivec.models import DecoderConfig
from bivec.models.config_fields import ORIGINAL_LENGTH
from bivec.models.files import atomic_file
from bivec.models.gguf import GLOBAL_NAMES, LAYER_NAMES, ROPE_TABLE, decoder_config, gguf_package, read_header
from bivec.models.rope import rotary_frequencies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from bivec.engine.encoder import Encoder

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # ours -> llama.cpp's
DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}  # llama.cpp's general.file_type
YARN_BORDERS = {"beta_fast": 32, "beta_slow": 1}  # llama.cpp's loaders of these architectures leave the file's unread
UNUSED, BYTE = 5, 6  # token types beside those of SentencePiece
PROBE = (
    "The 3rd of 12345 tests isn't \u00e9asy:  two  spaces,\ttabs\n\n and newlines; I'LL say \u4f60\u597d "
    "\U0001f642 !!! x=f(y)[0] // _id 3.14\n"
)


def save_gguf(encoder: Encoder, path: str | Path, *, dtype: str = "f16") -> None:
    """See :meth:`bivec.engine.encoder.Encoder.save_gguf`."""
    path, config, shape = Path(path), encoder.config, encoder.model.config
    _check(encoder, path, dtype)
    package = gguf_package()
    parameters: dict[str, Tensor] = dict(encoder.model.named_parameters())
    if any(".base." in name or "lora_" in name for name in parameters):
        raise CheckpointError(f"{path}: the model carries an adapter; merge it first")
    with atomic_file(path) as temporary:
        writer = package.GGUFWriter(temporary, ARCHITECTURES[shape.model_type])
        _write_shape(writer, shape, package)
        writer.add_pooling_type(package.PoolingType(GGUF_POOLING_TYPES[config.pooling]))
        writer.add_causal_attention(config.causal)
        writer.add_string(GGUF_KEY, json.dumps(asdict(config)))
        writer.add_string(GGUF_ORIGIN, json.dumps(encoder.origin.to_dict()))
        writer.add_string(GGUF_PROMPTS, json.dumps(encoder.prompts))
        writer.add_name(path.stem)
        writer.add_file_type(FILE_TYPES[dtype])
        _write_tokenizer(writer, encoder, path)
        _write_tensors(writer, parameters, shape, dtype, package)
        _check_written(temporary, encoder, path)
    for one in _differences(encoder):
        warnings.warn(f"{path}: llama.cpp does not give this encoder's vectors: {one}", stacklevel=3)


def _check(encoder: Encoder, path: Path, dtype: str) -> None:
    family, pooling = encoder.model.config.model_type, encoder.config.pooling
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if path.suffix != ".gguf" or path.is_dir():
        raise ConfigError(f"{path}: give a file name that ends in .gguf")
    if family not in ARCHITECTURES:
        raise ConfigError(f"{path}: no GGUF of model type {family!r} is written; there is {', '.join(ARCHITECTURES)}")
    if pooling not in GGUF_POOLING_TYPES:
        raise ConfigError(f"{path}: llama.cpp has no pooling {pooling!r}; it has {', '.join(GGUF_POOLING_TYPES)}")
    if encoder.model.config.sliding_window and family != "mistral":
        raise ConfigError(f"{path}: GGUF does not say which layers of a {family} model have the sliding window")
    scaling = encoder.model.config.rope_scaling or {}
    if scaling.get("rope_type") == "llama3" and ARCHITECTURES[family] != "llama":
        raise ConfigError(
            f"{path}: llama.cpp does not load a {family} model with the llama3 scaling of RoPE; use save_pretrained"
        )


def _differences(encoder: Encoder) -> list[str]:
    """In what llama.cpp's vectors of plain texts differ, beyond rounding."""
    config, found = encoder.config, []
    if config.template is not None:
        found.append(f"it does not put texts into the template {config.template!r}")
    if not config.pool_bos and config.pooling == "mean" and prefix_length(encoder.tokenizer):
        found.append("it pools the BOS, which is left out here")
    window = encoder.model.config.sliding_window
    if window is not None and window < config.max_length:
        found.append(f"it does not know the sliding window of {window} tokens, which longer texts feel")
    scaling = encoder.model.config.rope_scaling or {}
    borders = {name: scaling.get(name) for name, usual in YARN_BORDERS.items() if scaling.get(name, usual) != usual}
    if borders:
        found.append(f"of YaRN it does not read {', '.join(f'{name} = {value}' for name, value in borders.items())}")
    return found


def _write_shape(writer: Any, shape: DecoderConfig, package: Any) -> None:
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_vocab_size(shape.vocab_size)
    if shape.sliding_window:
        writer.add_sliding_window(shape.sliding_window)
    scaling = shape.rope_scaling or {}
    kind = scaling.get("rope_type")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(package.RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        original = scaling.get(ORIGINAL_LENGTH, shape.max_position_embeddings)
        writer.add_rope_scaling_orig_ctx_len(original)
        if "beta_fast" in scaling:
            writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        if "beta_slow" in scaling:
            writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])


def _write_tensors(writer: Any, parameters: dict[str, Tensor], shape: DecoderConfig, dtype: str, package: Any) -> None:
    """Announces all tensors, then writes them one by one: no second copy of the model is in memory."""
    kind = package.GGMLQuantizationType[DTYPES[dtype]]
    entries = list(_gguf_tensors(parameters, shape))
    for name, tensor in entries:
        matrix = tensor.dim() == 2
        # the writer takes the shape of the bytes where they are no numpy type
        bytes_each = 4 if not matrix or dtype == "f32" else 2
        numpy_type = np.float32 if bytes_each == 4 else np.float16
        raw = kind if matrix and dtype == "bf16" else None
        size = tensor.numel() * bytes_each
        sizes = tensor.shape if raw is None else (*tensor.shape[:-1], tensor.shape[-1] * 2)
        writer.add_tensor_info(name, list(sizes), np.dtype(np.uint8 if raw else numpy_type), size, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in entries:
        values = _permuted(name, tensor.detach().float().cpu(), shape).contiguous().numpy()
        if tensor.dim() == 2 and dtype != "f32":
            values = package.quants.quantize(values, kind)
        writer.write_tensor_data(values)
    writer.close()


def _gguf_tensors(parameters: dict[str, Tensor], shape: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's names; the head is left out, which llama.cpp takes for tied to the embedding."""
    globals_of = {ours: theirs for theirs, ours in GLOBAL_NAMES.items()}
    layers = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
    for name, parameter in parameters.items():
        stem, _, kind = name.rpartition(".")
        if stem.startswith("layers."):
            _, number, part = stem.split(".", 2)
            yield f"blk.{number}.{layers[part]}.{kind}", parameter
        else:
            yield f"{globals_of[stem]}.{kind}", parameter
    if (shape.rope_scaling or {}).get("rope_type") == "llama3":
        plain, _ = rotary_frequencies(replace(shape, rope_scaling=None))
        yield ROPE_TABLE, plain / rotary_frequencies(shape)[0]


def _permuted(name: str, values: Tensor, shape: DecoderConfig) -> Tensor:
    """q and k of a LLaMA: llama.cpp rotates neighbouring channels together, the checkpoints the halves of a head."""
    part = name.split(".")[2] if name.startswith("blk.") else ""
    if ARCHITECTURES[shape.model_type] != "llama" or part not in ("attn_q", "attn_k"):
        return values
    heads = shape.num_heads if part == "attn_q" else shape.num_kv_heads
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def _write_tokenizer(writer: Any, encoder: Encoder, path: Path) -> None:
    """The vocabulary, the merges or scores, and which token is what."""
    tokenizer, rows = exported_tokenizer(encoder), encoder.model.config.vocab_size
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    if rules["model"].get("type") != "BPE":
        raise ConfigError(f"{path}: a tokenizer of kind {rules['model'].get('type')!r}; GGUF export knows BPE")
    found = tokenizer.convert_ids_to_tokens(list(range(min(rows, len(tokenizer)))))
    words = [f"[PAD{i}]" if word is None else word for i, word in enumerate(found)]
    words += [f"[PAD{i}]" for i in range(len(words), rows)]  # rows of the embedding without a token
    added = {entry["id"]: entry for entry in rules["added_tokens"]}
    splits = None if rules["model"].get("byte_fallback") else _split_name(tokenizer, path)
    types = [_token_type(i, word, added, rules["model"], sentencepiece=splits is None) for i, word in enumerate(words)]
    if splits is None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(words)
        writer.add_token_scores(_scores(words, rules["model"]["merges"]))
        text_rules = json.dumps([rules["normalizer"], rules["pre_tokenizer"]])
        prefixes = ('"Prepend"', '"prepend_scheme": "always"', '"prepend_scheme": "first"')
        writer.add_add_space_prefix(any(prefix in text_rules for prefix in prefixes))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splits)
        writer.add_token_list(words)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in rules["model"]["merges"]]
        writer.add_token_merges(merges)
    writer.add_token_types(types)
    first = tokenizer("a").input_ids[0] if prefix_length(tokenizer) else tokenizer.bos_token_id
    if first is not None:
        writer.add_bos_token_id(first)
    for add, number in (
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_mask_token_id, tokenizer.mask_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(prefix_length(tokenizer) > 0)
    writer.add_add_eos_token(tokenizer("a").input_ids[-1] == tokenizer.eos_token_id)


def _scores(words: list[str], merges: list[str | list[str]]) -> list[float]:
    """SentencePiece merges whatever makes the token of the best score: the order of what the merges make."""
    made = dict.fromkeys("".join(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in merges)
    ranks = {word: rank for rank, word in enumerate(made)}
    return [-float(ranks.get(word, len(ranks))) for word in words]


def _token_type(number: int, word: str, added: dict[int, Any], model: dict[str, Any], *, sentencepiece: bool) -> int:
    """llama.cpp's number for the kind of a token."""
    if number in added:
        if word == model.get("unk_token") and sentencepiece:
            return UNKNOWN
        return CONTROL if added[number]["special"] else USER_DEFINED
    if word == f"[PAD{number}]" and word not in model["vocab"]:
        return UNUSED
    is_byte = sentencepiece and len(word) == 6 and word.startswith("<0x") and word.endswith(">")
    return BYTE if is_byte else NORMAL


def _split_name(tokenizer: PreTrainedTokenizerFast, path: Path) -> str:
    """llama.cpp's name of the way in which a byte-level tokenizer splits text before its merges."""
    own = tokenizer.backend_tokenizer.pre_tokenizer
    if own is not None:
        for name, make in byte_level_splits().items():
            if make().pre_tokenize_str(PROBE) == own.pre_tokenize_str(PROBE):
                return name
    raise ConfigError(
        f"{path}: the tokenizer splits text in none of the ways that GGUF export knows "
        f"({', '.join(byte_level_splits())}); use llama.cpp's convert_hf_to_gguf.py on what save_pretrained writes"
    )


def _with_defaults(shape: DecoderConfig) -> dict[str, Any] | None:
    """The scaling of RoPE, with what holds where it does not say so: a GGUF always has the original length."""
    scaling = shape.rope_scaling
    if scaling is None or scaling["rope_type"] not in ("yarn", "llama3"):
        return scaling
    scaling = {ORIGINAL_LENGTH: shape.max_position_embeddings} | scaling
    if scaling.get("truncate") is True:
        del scaling["truncate"]
    return scaling


def _same(one: Any, other: Any) -> bool:
    """Whether two settings are equal but for what float32 rounds off."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    numbers = isinstance(one, float) and isinstance(other, (int, float))
    return bool(one == other) or (numbers and math.isclose(one, other, rel_tol=1e-6))


def _check_written(file: Path, encoder: Encoder, path: Path) -> None:
    """Reads the file's header and tokenizer back: GGUF has no place for some settings, and nobody would see it."""
    header = read_header(file)
    ours = encoder.model.config
    differing: dict[str, Any] = {
        "model_type": "mistral" if ours.sliding_window else ARCHITECTURES[ours.model_type],
        "tie_word_embeddings": True,
        "is_causal": encoder.config.causal,
        "dtype": None,
        "pad_token_id": None,
    }
    differing |= {name: getattr(decoder_config(header), name) for name in ("bos_token_id", "eos_token_id")}
    differing["rope_scaling"] = _with_defaults(ours)
    expected, found = replace(ours, **differing), decoder_config(header)
    for name, value in asdict(expected).items():
        other = getattr(found, name)
        if not _same(value, other):
            raise ConfigError(f"{path}: GGUF cannot say {name} = {value!r} (it would be read as {other!r})")
    again = load_tokenizer(file, add_bos=False)
    texts, exported = [PROBE, *PROBE.split(), "A man plays the guitar."], exported_tokenizer(encoder)
    for text, row, ours_row in zip(texts, again(texts).input_ids, exported(texts).input_ids, strict=True):
        if row != ours_row:
            at = next((i for i, (one, other) in enumerate(zip(row, ours_row, strict=False)) if one != other), -1)
            part = slice(max(at - 3, 0), at + 5) if at >= 0 else slice(-8, None)
            raise ConfigError(
                f"{path}: the tokenizer cannot be said in GGUF: {text!r} would become … {row[part]} …, here it is … "
                f"{ours_row[part]} …; use llama.cpp's convert_hf_to_gguf.py on what save_pretrained writes"
            )
